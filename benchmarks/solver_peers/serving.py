"""What the scripts of the peers share: they stand alone, in the interpreter of the peer, and solve
whenever they are asked.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Solve = Callable[[Tensor, Tensor, int, int], Tensor]


def serve(solve: Solve) -> None:
    """Answer each line of standard input, a problem as JSON, with a line: CPU seconds and the loss,
    relative to the weight's.

    A problem names a file with ``weight`` (N, K) and ``hessian`` (K, K), ``bits`` and
    ``group_size``. The seconds of one that
    the peer cannot solve are not a number.
    """
    for line in sys.stdin:
        problem: dict[str, Any] = json.loads(line)
        torch.set_num_threads(problem["threads"])
        tensors = load_file(problem["file"])
        weight, hessian = tensors["weight"], tensors["hessian"]
        started = time.process_time()
        try:
            found = solve(weight.clone(), hessian.clone(), problem["bits"], problem["group_size"])
        except RuntimeError as error:  # groups that do not divide K, for one
            print(json.dumps({"seconds": math.nan, "error": str(error)}), flush=True)
            continue
        seconds = time.process_time() - started
        error = found.float() - weight
        loss = (error @ hessian).mul_(error).sum() / (weight @ hessian).mul_(weight).sum()
        print(json.dumps({"seconds": seconds, "loss": float(loss)}), flush=True)
