"""What the package offers, that all of it is described, and that importing it brings nothing heavy along."""

import inspect
import subprocess
import sys

import pytest

import tsq_layers
from tsq_layers import errors

PUBLIC = [
    "Composite",
    "HessianObserver",
    "LayerKind",
    "LayerReport",
    "LayerStatistics",
    "Plan",
    "QuantConfig",
    "QuantLinear",
    "QuantizedWeight",
    "Report",
    "SolverResult",
    "TwoStageGroupQuantizer",
    "calibrate",
    "convert",
    "export",
    "fold_scaling",
    "import_checkpoint",
    "load",
    "perplexity",
    "plan",
    "prepare",
    "quantize",
    "refine",
    "register",
    "report",
    "save",
    "unprepare",
    "unregister",
    "warmup",
]


def test_public_names_are_these():
    assert sorted(tsq_layers.__all__) == PUBLIC
    assert all(hasattr(tsq_layers, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_says_what_it_is_with_arguments_or_an_example(name):
    thing = getattr(tsq_layers, name)
    text = inspect.getdoc(thing)
    assert text is not None
    assert len(text.splitlines()[0]) > 20
    arguments = [
        parameter for parameter in inspect.signature(thing).parameters if parameter != "model"
    ]
    described = any(f"{section}:" in text for section in ("Args", "Example", "Attributes"))
    assert described or not arguments


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_described(name):
    thing = getattr(tsq_layers, name)
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
