"""What every test runs under."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def compile_only_when_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let ``torch.compile`` compile only in tests marked ``compile``; elsewhere it runs eagerly."""
    if request.node.get_closest_marker("compile"):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def pytest_configure() -> None:
    """One thread for each worker: workers that each start one for every core are many times slower."""
    torch.set_num_threads(1)
