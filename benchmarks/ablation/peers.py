"""Other libraries on the same tokens: each in an interpreter of its own, which hands back dequantised weights.

`--python` names that interpreter; what must be installed there is at the head of each script.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.ablation.records import Run
from tsq_layers.integrations.transformers import load_causal_lm

_SCRIPTS = Path(__file__).with_name("peer_scripts")
PEERS = {
    "GPTQModel GPTQ": "gptqmodel_gptq",
    "llm-compressor GPTQ": "llmcompressor_gptq",
    "AutoRound": "autoround",
}


def quantized(
    run: Run,
    directory: Path,
    batches: list[dict[str, Tensor]],
    python: Path | None,
    threads: int | None,
) -> tuple[nn.Module, float, float]:
    """The model with a peer's weights in it, the seconds that the peer took, and those of all its threads.

    Raises:
        SystemExit: no interpreter was named, or the peer failed.
    """
    if python is None:
        raise SystemExit(
            f"{run.name}: name the interpreter that has it with --python; see {_SCRIPTS}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch) / "tokens.safetensors", Path(scratch) / "out"
        out.mkdir()
        save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, tokens)
        command = [
            str(python),
            str(_SCRIPTS / f"{PEERS[run.name]}.py"),
            str(directory),
            str(tokens),
            str(out),
        ]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "GPTQMODEL_CPU_WORKERS": str(max(2, threads or 2)),
        }
        environment.pop("PYTHONPATH", None)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        result = subprocess.run(  # noqa: S603  (no shell, fixed arguments)
            [*command, str(run.bits), str(run.group_size)],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise SystemExit(f"{run.name} failed: {result.stderr.strip()[-2000:]}")
        model = load_causal_lm(directory)
        _fill(model, load_file(out / "weights.safetensors"))
        times: dict[str, Any] = json.loads((out / "times.json").read_text(encoding="utf-8"))
        return model, times["seconds"], times["cpu_seconds"]


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        with torch.no_grad():
            modules[name].weight.copy_(weight)  # type: ignore[operator]
