"""What the package offers, that all of it is described, and that importing it brings nothing heavy along."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tsq_layers
from tsq_layers import errors
from tsq_layers.config import versions
from tsq_layers.errors import TSQDeprecationWarning

PUBLIC = [
    "HessianObserver",
    "LayerStatistics",
    "Plan",
    "QuantConfig",
    "QuantLinear",
    "QuantizedWeight",
    "Report",
    "TwoStageGroupQuantizer",
    "__version__",
    "calibrate",
    "convert",
    "export_checkpoint",
    "fold_scaling",
    "import_checkpoint",
    "layers",
    "load",
    "perplexity",
    "plan",
    "prepare",
    "quantize",
    "refine",
    "save",
    "unprepare",
    "warmup",
]
EXTENDERS = ["Composite", "LayerKind", "register", "unregister"]
DESCRIBED = [name for name in PUBLIC if name not in ("__version__", "layers")] + EXTENDERS
MOVED = [*EXTENDERS, "LayerReport", "SolverResult", "export", "report"]


def test_public_names_are_these():
    assert sorted(tsq_layers.__all__) == PUBLIC
    assert all(hasattr(tsq_layers, name) for name in PUBLIC)


def test_no_function_is_called_like_a_package_or_module():
    modules = {path.stem for path in Path(tsq_layers.__file__).parent.iterdir()}
    functions = {name for name in PUBLIC if inspect.isfunction(getattr(tsq_layers, name))}
    assert functions & modules == set()


def test_version_comes_from_one_place():
    assert tsq_layers.__version__ == versions.VERSION == versions.library_versions()["tsq_layers"]


@pytest.mark.parametrize("name", MOVED)
def test_name_of_version_0_1_is_there_with_a_warning_that_names_the_new_one(name):
    with pytest.warns(TSQDeprecationWarning, match=rf"tsq_layers\.{name} is (\S+) now") as caught:
        thing = getattr(tsq_layers, name)
    place = re.search(r"is (\S+) now", str(caught[0].message))[1]
    assert caught[0].filename == __file__
    if place != "model.tsq_report":
        module, _, attribute = place.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is thing


def test_other_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tsq_layers' has no attribute 'quantise'"):
        _ = tsq_layers.quantise


def test_pickled_layers_of_version_0_1_name_a_module_that_is_there():
    assert importlib.import_module("tsq_layers.linear").QuantLinear is tsq_layers.QuantLinear


@pytest.mark.parametrize("name", DESCRIBED)
def test_public_name_says_what_it_is_with_arguments_or_an_example(name):
    thing = getattr(tsq_layers.layers if name in EXTENDERS else tsq_layers, name)
    text = inspect.getdoc(thing)
    assert text is not None
    assert len(text.splitlines()[0]) > 20
    arguments = [
        parameter for parameter in inspect.signature(thing).parameters if parameter != "model"
    ]
    described = any(f"{section}:" in text for section in ("Args", "Example", "Attributes"))
    assert described or not arguments


@pytest.mark.parametrize("name", DESCRIBED)
def test_public_methods_are_described(name):
    thing = getattr(tsq_layers.layers if name in EXTENDERS else tsq_layers, name)
    if inspect.isclass(thing):
        own = [value for key, value in vars(thing).items() if not key.startswith("_")]
        own = [
            value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            for value in own
        ]
        assert [
            function.__qualname__
            for function in own
            if inspect.isfunction(function) and not function.__doc__
        ] == []


def test_every_error_and_warning_is_described_and_has_its_base():
    for kind in vars(errors).values():
        if inspect.isclass(kind) and kind.__module__ == errors.__name__:
            assert kind.__doc__
            assert issubclass(kind, (errors.TSQError, errors.TSQWarning))


def test_import_brings_no_optional_or_heavy_package():
    code = """
import sys, torch
before = set(sys.modules)
import tsq_layers
new = {name for name in set(sys.modules) - before}
heavy = ("transformers", "accelerate", "gguf", "torchao", "matplotlib", "torch.ao.quantization", "pytest", "hypothesis")
print(sorted(name for name in new if name.startswith(heavy)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_import_changes_no_global_setting():
    code = """
import torch
def settings():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32, torch.initial_seed(),
            torch._dynamo.config.recompile_limit if "torch._dynamo" in __import__("sys").modules else None)
torch.manual_seed(5)
before = settings()
import tsq_layers
after = settings()
print(before[:-1] == after[:-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")
