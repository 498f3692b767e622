"""Every example runs, and shows what it is there to show."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_any_module_is_best_by_two_stage(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "any_module.py"), run_name="__main__")
    found = re.findall(r"2 bits, (\S+)\s*: cross-entropy (\d+\.\d+)", capsys.readouterr().out)
    entropy = {method: float(value) for method, value in found}
    assert entropy["two-stage"] < min(entropy["gptq"], entropy["rtn"])
