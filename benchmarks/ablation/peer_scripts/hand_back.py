"""What the scripts of the peers share: they stand alone, in the interpreter of the peer."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Task:
    """The arguments of a script, a clock, and the way back.

    Attributes:
        model: directory of the float model, with its tokenizer.
        windows: int64 (windows, length).
        bits, group_size: of the codes; zero points are asked for.
    """

    def __init__(self) -> None:
        self.model, tokens, out, bits, group_size = sys.argv[1:]
        self.windows = load_file(tokens)["input_ids"]
        self.bits, self.group_size, self.out = int(bits), int(group_size), Path(out)
        self._started = time.perf_counter(), time.process_time()

    def samples(self) -> list[dict[str, torch.Tensor]]:
        """The windows as a list of dicts."""
        return [
            {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            for ids in self.windows
        ]

    def stop(self) -> None:
        """Quantising is over: what follows is not the peer's work."""
        started, cpu_started = self._started
        times = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
        }
        (self.out / "times.json").write_text(json.dumps(times), encoding="utf-8")

    def hand_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Dequantised weights (N, K) by the names of the layers."""
        save_file(
            {name: weight.float().contiguous() for name, weight in weights.items()},
            self.out / "weights.safetensors",
        )


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all linear layers but the head."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
