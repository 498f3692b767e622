"""Frameworks are told of quantised models of theirs: by registration, by entry points, or with a warning."""

import importlib.metadata
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from tsq_layers.errors import HostWarning
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


@pytest.mark.usefixtures("none_known")
def test_entry_point_is_loaded_once_its_framework_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models: list[nn.Module] = []
    entry = types.SimpleNamespace(name="framework", load=lambda: models.append)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (entry,))
    hosts.tell_hosts(nn.Linear(2, 2))
    assert models == []
    monkeypatch.setitem(sys.modules, "framework", types.ModuleType("framework"))
    hosts.tell_hosts(nn.Linear(2, 2))
    hosts.tell_hosts(nn.Linear(2, 2))
    assert len(models) == 2


@pytest.mark.usefixtures("none_known")
def test_model_of_a_framework_without_a_function_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PreTrainedModel(nn.Module):
        pass

    module = types.SimpleNamespace(PreTrainedModel=PreTrainedModel)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", module)
    hosts.tell_hosts(nn.Linear(2, 2))
    with pytest.warns(HostWarning, match=r"import tsq_layers\.integrations\.transformers before"):
        hosts.tell_hosts(nn.Sequential(PreTrainedModel()))


def test_transformers_is_an_entry_point() -> None:
    entries = importlib.metadata.entry_points(group=hosts.GROUP)
    assert "tsq_layers.integrations.transformers.quantizer:attach" in {
        entry.value for entry in entries
    }


CHILD = """
import sys, warnings
import torch, transformers
import tsq_layers as tsq
warnings.simplefilter("ignore", tsq.errors.FewTokensWarning)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config).eval()
assert "tsq_layers.integrations.transformers" not in sys.modules
ids = torch.randint(64, (2, 8))
model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=16, method="rtn"))
model.save_pretrained(sys.argv[1])
import tsq_layers.integrations.transformers
again = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert torch.equal(again(ids).logits, model(ids).logits)
print("equal")
"""


def test_save_pretrained_works_without_importing_the_integration(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == ["equal"], result.stderr
