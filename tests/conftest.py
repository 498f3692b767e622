"""What every test runs under."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tsq_layers.runtime import kernels, native


@pytest.fixture(autouse=True)
def compile_only_when_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let ``torch.compile`` compile only in tests marked ``compile``; elsewhere it runs eagerly."""
    if request.node.get_closest_marker("compile"):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


@pytest.fixture
def count_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Compile packed layers with a backend that only counts the graphs, starting from none."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(kernels, "_uncompilable", set())
    monkeypatch.setattr(native, "_usable", False)
    return lambda: counter.frame_count


def pytest_configure() -> None:
    """One thread for each worker: workers that each start one for every core are many times slower."""
    torch.set_num_threads(1)
