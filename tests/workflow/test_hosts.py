"""Frameworks are told of quantised models of theirs: by registration, by entry points, or with a warning."""

import importlib.metadata
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import HostWarning
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.workflow import hosts


@pytest.fixture
def none_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No framework is registered, and no entry point is installed."""
    monkeypatch.setattr(hosts, "_hosts", {})
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    yield


@pytest.mark.usefixtures("none_known")
def test_registered_function_is_called_with_the_model() -> None:
    models: list[nn.Module] = []
    hosts.register_host("framework", models.append)
    model = nn.Linear(2, 2)
    hosts.tell_hosts(model)
    assert models == [model]


class OfFramework(nn.Linear):
    """A module whose class is defined in a framework."""


class Derived(OfFramework):
    """A user's own class of a framework's model."""


OfFramework.__module__ = "framework.models"


@pytest.mark.usefixtures("none_known")
@pytest.mark.parametrize("kind", [OfFramework, Derived])
def test_entry_point_is_loaded_once_a_model_is_of_its_framework(
    monkeypatch: pytest.MonkeyPatch, kind: type[OfFramework]
) -> None:
    models: list[nn.Module] = []
    loads = []

    def load() -> hosts.Attach:
        loads.append("framework")
        return models.append

    entry = types.SimpleNamespace(name="framework", load=load)
    other = types.SimpleNamespace(name="another", load=pytest.fail)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (entry, other))
    monkeypatch.setitem(sys.modules, "framework", types.ModuleType("framework"))
    hosts.tell_hosts(nn.Sequential(nn.Linear(2, 2)))
    assert (loads, models) == ([], [])
    wrapped = [nn.Sequential(kind(2, 2)) for _ in range(2)]
    for model in wrapped:
        hosts.tell_hosts(model)
    assert loads == ["framework"]
    assert models == wrapped


@pytest.mark.usefixtures("none_known")
def test_layers_of_torch_and_of_this_library_read_no_metadata(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", pytest.fail)
    hosts.tell_hosts(nn.Sequential(nn.Linear(2, 2), QuantLinear(32, 32, bits=4, group_size=32)))


def failing(error: Exception) -> types.SimpleNamespace:
    """An entry point that cannot be loaded."""

    def load() -> None:
        raise error

    return types.SimpleNamespace(name="framework", value="plugin:attach", load=load)


@pytest.mark.usefixtures("none_known")
@pytest.mark.parametrize(
    "error", [ImportError("no module plugin"), AttributeError("no attribute attach")], ids=type
)
def test_entry_point_that_cannot_be_loaded_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    models: list[nn.Module] = []
    hosts.register_host("another", models.append)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (failing(error),))
    model = OfFramework(2, 2)
    message = f"framework does not know .* OfFramework .* plugin:attach cannot be loaded: {error}"
    with pytest.warns(HostWarning, match=message):
        hosts.tell_hosts(model)
    assert models == [model]


@pytest.mark.usefixtures("none_known")
def test_second_entry_point_of_a_framework_is_loaded_where_the_first_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models: list[nn.Module] = []
    entry = types.SimpleNamespace(name="framework", load=lambda: models.append)
    entries = (failing(ImportError("old")), entry)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    hosts.tell_hosts(OfFramework(2, 2))
    assert len(models) == 1


@pytest.mark.usefixtures("none_known")
def test_model_of_a_framework_without_a_function_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PreTrainedModel(nn.Module):
        pass

    module = types.SimpleNamespace(PreTrainedModel=PreTrainedModel)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", module)
    hosts.tell_hosts(nn.Linear(2, 2))
    with pytest.warns(HostWarning, match=r"import tsq_layers\.integrations\.transformers first"):
        hosts.tell_hosts(nn.Sequential(PreTrainedModel()))


@pytest.mark.usefixtures("none_known")
def test_warning_points_at_the_call_of_quantize_convert_and_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class PreTrainedModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

    module = types.SimpleNamespace(PreTrainedModel=PreTrainedModel)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", module)
    config = tsq.QuantConfig(method="rtn", group_size=32)
    with pytest.warns(HostWarning) as caught:
        model = tsq.quantize(PreTrainedModel(), config)
        tsq.convert(tsq.prepare(PreTrainedModel(), config))
        tsq.save(model, tmp_path)
        tsq.load(tmp_path, PreTrainedModel())
    assert [warning.filename for warning in caught] == [__file__] * 3


def test_transformers_is_an_entry_point() -> None:
    entries = importlib.metadata.entry_points(group=hosts.GROUP)
    assert "tsq_layers.integrations.transformers.quantizer:attach" in {
        entry.value for entry in entries
    }


CHILD = """
import sys, warnings
import torch, transformers
import tsq_layers as tsq
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config).eval()
assert "tsq_layers.integrations.transformers" not in sys.modules
ids = torch.randint(64, (2, 8))
with warnings.catch_warnings(record=True) as caught:
    model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=16, method="rtn"))
print(*(f"{warning.category.__name__}: {warning.message}" for warning in caught))
if "attach" in sys.argv:
    import tsq_layers.integrations.transformers
    tsq_layers.integrations.transformers.attach(model)
model.save_pretrained(sys.argv[1])
import tsq_layers.integrations.transformers
again = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert torch.equal(again(ids).logits, model(ids).logits)
print("equal")
"""


def run(code: str, *arguments: object, path: Path | None = None) -> list[str]:
    """Lines that code prints in a process of its own, with a folder before all others on its path."""
    environment = dict(os.environ)
    if path is not None:
        paths = [str(path), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_save_pretrained_works_without_importing_the_integration(tmp_path: Path) -> None:
    assert run(CHILD, tmp_path / "model")[-2:] == ["", "equal"]


PLAIN = """
import sys
import transformers
from torch import nn
import tsq_layers as tsq
before = {name for name in sys.modules if name.startswith("transformers")}
tsq.quantize(nn.Sequential(nn.Linear(32, 32)), tsq.QuantConfig(method="rtn", group_size=32))
after = {name for name in sys.modules if name.startswith("transformers")}
print(sorted(after - before))
"""


def test_plain_model_loads_nothing_of_transformers() -> None:
    assert run(PLAIN)[-1:] == ["[]"]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("", "it has no entry point in 'tsq_layers.hosts'"),
        (
            "[tsq_layers.hosts]\ntransformers = tsq_layers.gone:attach\n",
            "tsq_layers.gone:attach cannot be loaded: No module named 'tsq_layers.gone'",
        ),
    ],
    ids=["no entry point", "entry point of another version"],
)
def test_source_tree_beside_metadata_of_another_version_warns_and_can_save(
    tmp_path: Path, entries: str, reason: str
) -> None:
    # The first metadata of a distribution on the path counts.
    metadata = tmp_path / "tsq_layers-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tsq_layers\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(entries)
    *_, warning, last = run(CHILD, tmp_path / "model", "attach", path=tmp_path)
    assert warning.startswith("HostWarning: transformers does not know that layers of this Llama")
    assert reason in warning
    assert "call tsq_layers.integrations.transformers.attach(model) before" in warning
    assert last == "equal"
