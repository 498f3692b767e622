"""The code in the README runs, block after block, as a reader would run it."""

import os
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SKIP = "# not run in the tests: "


def blocks(text):
    """Line number and source of every python block."""
    found = re.finditer(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


def test_blocks_finds_python_blocks_with_their_lines():
    text = "text\n```python\na = 1\n```\n```sh\nrm\n```\n\n```python\nb = 2\nc = 3\n```\n"
    assert blocks(text) == [(2, "a = 1\n"), (9, "b = 2\nc = 3\n")]


def test_blocks_that_are_not_run_give_a_reason():
    for line, source in blocks(README.read_text(encoding="utf-8")):
        if source.startswith(SKIP.strip()):
            assert len(source.splitlines()[0]) > len(SKIP) + 5, (
                f"README.md, line {line + 1}: say why it is not run"
            )


@pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
def test_readme_code_runs_in_order(tmp_path, monkeypatch):
    found = [
        (line, source)
        for line, source in blocks(README.read_text(encoding="utf-8"))
        if not source.startswith(SKIP)
    ]
    assert found, "README.md has no python block that is run"
    monkeypatch.chdir(tmp_path)  # where it may save a model
    namespace = {"__name__": "readme"}
    for line, source in found:
        # Padded with empty lines, so that a traceback shows the line of the README.
        exec(compile("\n" * line + source, os.fspath(README), "exec"), namespace)
