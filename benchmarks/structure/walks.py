"""Count how often a value goes from one package up into another, while a small model is quantised.

Every call of a function of the package is looked at, in all threads. Where one of its arguments is
the value, and the caller is of another package that lies lower in the contract, the value goes up:
a callback that a lower package calls counts like any other call. Counted are pairs of functions.
"""

import inspect
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.structure import imports

_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def walks(project: Path) -> dict[str, set[tuple[str, str]]]:
    """Quantise, save, load and run a small model, and return the upward calls of each value.

    Args:
        project: the checkout that is measured; its package must be the one that is imported.
    """
    tsq = _package()
    tracker = Tracker(project)
    torch.manual_seed(0)
    for method in ("two-stage", "rtn", "gptq"):
        model = _Attending()
        batches = [torch.randn(2, 24, 16) for _ in range(3)]
        config = tsq.QuantConfig(bits=4, group_size=8, method=method, skip=())
        tracker.track("model", lambda value, model=model: value is model)
        tracker.track("batch", lambda value, batches=batches: any(value is b for b in batches))
        tracker.track("config", lambda value: isinstance(value, tsq.QuantConfig))
        tracker.track("statistics", lambda value: isinstance(value, tsq.LayerStatistics))
        with tracker.tracking():
            tsq.plan(model, config, batches[0], len(batches))
            quantised = tsq.quantize(model, config, batches, progress=False)
            with tempfile.TemporaryDirectory() as folder:
                tsq.save(quantised, folder)
                tsq.load(folder, _Attending())
        x = torch.randn(3, 16)
        tracker.track("input", lambda value, x=x: value is x)
        with tracker.tracking():
            quantised.up(x)
    return tracker.upward


def _package() -> Any:
    import tsq_layers  # noqa: PLC0415 - a checkout of its own, found by PYTHONPATH

    return tsq_layers


class _Attending(nn.Module):
    """Attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        output: Tensor = self.down(torch.relu(self.up(x)))
        return output


class Tracker:
    """Notes upward calls that take one of the tracked values."""

    def __init__(self, project: Path) -> None:
        self._root = str(project / "tsq_layers") + "/"
        self._heights = imports.heights(imports.layers_of(project))
        self._tests: dict[str, Callable[[Any], bool]] = {}
        self.upward: dict[str, set[tuple[str, str]]] = {}

    def track(self, kind: str, test: Callable[[Any], bool]) -> None:
        """Track the values for which the test holds, from now on."""
        self._tests[kind] = test
        self.upward.setdefault(kind, set())

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Look at the calls of all threads."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:  # noqa: ARG002
        if event != "call" or not frame.f_code.co_filename.startswith(self._root):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self._root):
            caller = caller.f_back
        if caller is None:
            return
        below, above = self._child(caller.f_code), self._child(frame.f_code)
        if below == above or below not in self._heights or above not in self._heights:
            return
        if self._heights[above] <= self._heights[below]:
            return
        for value in _arguments(frame):
            for kind, test in self._tests.items():
                if test(value):
                    self.upward[kind].add((self._name(caller.f_code), self._name(frame.f_code)))

    def _child(self, code: CodeType) -> str:
        return code.co_filename[len(self._root) :].split("/")[0].removesuffix(".py")

    def _name(self, code: CodeType) -> str:
        return f"{code.co_filename[len(self._root) :]}:{code.co_qualname}"


def _arguments(frame: FrameType) -> Iterator[Any]:
    """Yield the arguments of a call that has just begun."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    for name in code.co_varnames[:count]:
        value = frame.f_locals.get(name)
        yield value
        if isinstance(value, tuple):
            yield from value
