"""Define the result of the solver."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tsq_layers.numerics.weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class SolverResult:
    """The result of a solver: the weight, and the losses of every row after each step.

    Attributes:
        weight: codes, scales, zero points.
        losses: step → mean squared output error of each row against the target, undamped H, float32
            (N,). The steps are, in this order, those of ``"initialize"``, ``"assign"``, ``"descend"``,
            ``"pairs"``, ``"refine"`` and ``"joint"`` that the configuration asks for.
        held_out_losses: the same on held-out statistics, if there were any.
        signal: mean squared target output of each row, (N,); losses ÷ signal are relative.
        held_out_signal: the same on held-out statistics, for the losses on these.
        objective: what stage 2 minimises (damped H and pull, made non-negative by its constant),
            of each row: after GPTQ (``"assign"``) and for both solvers (``"descent"``, ``"exact"``).
        damping: the λ that was used (the largest, where blocks differ); ``None`` if H was not needed.
        seconds: step → wall time.
    """

    weight: QuantizedWeight
    losses: Mapping[str, Tensor]
    held_out_losses: Mapping[str, Tensor]
    signal: Tensor | None
    held_out_signal: Tensor | None
    objective: Mapping[str, Tensor]
    damping: float | None
    seconds: Mapping[str, float]
