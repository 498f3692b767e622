"""`TwoStageGroupQuantizer`: the paper's algorithm box, one layer at a time.

    1.  scales, zeros  ←  group-wise reconstruction loss, or what GPTQ will leave of it   (stage 1)
    2.  codes          ←  GPTQ on these grids
    3.  scales         ←  layer-wise loss, codes frozen, closed form                      (stage 2)
    4.  codes, scales  ←  the same loss, in turn, if asked for                            (joint)

The error R of earlier layers changes the target of all, or of steps 3 and 4 only. The other methods
fit the same box: ``"rtn"`` is min-max grids and nearest codes, ``"gptq"`` is weight-MSE grids and
step 2, and ``"quantease"`` and ``"cdquant"`` go on from there with descents on the codes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsq_layers import grid
from tsq_layers.config import QuantConfig
from tsq_layers.errors import LayerError, StateError
from tsq_layers.precision import full_precision
from tsq_layers.records import LayerStatistics, QuantizedWeight
from tsq_layers.solver import blocks, cyclic, gptq, greedy, joint, objective, pairs, stage1, stage2
from tsq_layers.solver.result import SolverResult
from tsq_layers.sync import clock

__all__ = ["SolverResult", "TwoStageGroupQuantizer"]


@dataclass(eq=False)
class _Progress:
    """What the steps have found so far."""

    scales: Tensor | None = None
    zeros: Tensor | None = None
    codes: Tensor | None = None
    residual: tuple[Tensor, Tensor] | None = None  # Q − W' and (Q − W') H of the present state, once asked for
    objective: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


_DESCENTS = ("quantease", "cdquant")


class TwoStageGroupQuantizer:
    """Quantise one weight matrix, or several stacked ones that share their input.

    Two-Stage Grid Optimization for Group-wise Quantization of LLMs, arXiv 2602.02126. Inputs are
    not modified. Every row is independent, so a stack of layers is solved as one. Where the
    statistics have B blocks, the rows are B contiguous blocks of N/B, each solved with its own:
    the groups of a convolution are solved together.

    Args:
        weight: W, any float dtype (N, K).
        statistics: sums over the calibration tokens; may be ``None`` for ``method="rtn"``.
        config: how; ``skip`` and ``overrides`` are not looked at, nor what a layer does to its input
            (``rotation``, ``channel_scaling``, ``activation_bits``): give weight and statistics in that basis.
        name: how messages call the layer.

    Raises:
        LayerError, CalibrationError, SingularHessianError: as :func:`objective.build` says.

    Example:
        >>> x, w = torch.randn(512, 64), torch.randn(32, 64)
        >>> statistics = LayerStatistics(x.T @ x, torch.tensor(512))
        >>> quantizer = TwoStageGroupQuantizer(w, statistics, QuantConfig(bits=2, group_size=16))
        >>> result = quantizer.run()
        >>> bool(result.losses["refine"].sum() <= result.losses["assign"].sum() * 1.01)
        True
    """

    @full_precision()
    def __init__(
        self, weight: Tensor, statistics: LayerStatistics | None, config: QuantConfig, *, name: str = "layer"
    ) -> None:
        if weight.dim() != 2 or not weight.is_floating_point():
            raise LayerError(
                f"{name}: weight is {weight.dtype} of shape {tuple(weight.shape)}; give a floating-point matrix (N, K)"
            )
        if statistics is None and config.needs_calibration:
            raise LayerError(
                f"{name}: method {config.method!r} needs statistics of the layer's input; calibrate, or use method='rtn'"
            )
        self.config, self.name = config, name
        self.group_size = min(config.group_size or weight.shape[1], weight.shape[1])
        self._weight = weight.detach().to(torch.float32)
        self._state = _Progress()
        started = clock(weight)
        if statistics is None:
            objective.check_values(self._weight, None, name)
        self.problem = None if statistics is None else objective.build(weight, statistics, config, name)
        self._state.seconds["factorise"] = clock(weight) - started

    @full_precision()
    def initialize_scales(self) -> None:
        """Step 1: scales and zero points, by the grids of the configured method."""
        started, config = clock(self._weight), self.config
        if config.method == "two-stage":
            scales, zeros = stage1.fit_grids(
                self.target, self._metric(), config.bits, self.group_size, config.symmetric
            )
        elif config.method == "rtn":
            scales, zeros = grid.minmax(self._weight, config.bits, self.group_size, config.symmetric)
        else:
            scales, zeros = stage1.weight_grids(self.target, config.bits, self.group_size, config.symmetric)
        self._state = _Progress(seconds={"factorise": self._state.seconds["factorise"]})
        self._state.scales, self._state.zeros = grid.storable(scales, config.torch_scale_dtype), zeros
        self._state.seconds["initialize"] = clock(self._weight) - started

    @full_precision()
    def assign_codes(self) -> None:
        """Step 2: codes on the present grids, by GPTQ (the nearest, for ``"rtn"`` and where a descent starts there)."""
        started, config = clock(self._weight), self.config
        scales, zeros = self._grids()
        if config.method == "rtn":
            self._state.codes = grid.quantize(self._weight, scales, zeros, config.bits, self.group_size)
        elif config.method in _DESCENTS and config.descent_start == "nearest":
            self._state.codes = grid.quantize(self.target, scales, zeros, config.bits, self.group_size)
        else:
            problem = self._problem
            self._state.codes = gptq.assign(
                self.target, problem.factor, problem.order, scales, zeros, config.bits, self.group_size
            )
        self._state.residual = None
        self._state.seconds["assign"] = clock(self._weight) - started

    @full_precision()
    def descend_codes(self) -> None:
        """Coordinate descent on the codes, grids frozen; quantease and cdquant only."""
        config = self.config
        if config.method not in _DESCENTS:
            return
        started, given = clock(self._weight), self._integers()
        if config.method == "quantease":
            self._state.codes = cyclic.descend(*given, config.descent_sweeps, relax=config.descent_relax)
        else:
            self._state.codes = greedy.descend(*given, self._moves)
        self._state.residual = None
        self._state.seconds["descend"] = clock(self._weight) - started

    @full_precision()
    def descend_pairs(self) -> None:
        """Coordinate descent on pairs of codes, grids frozen; cdquant only, if asked for."""
        if self.config.method != "cdquant" or not self.config.greedy_pairs:
            return
        started, given = clock(self._weight), self._integers()
        self._state.codes = pairs.descend(*given, self._moves, reach=1)
        self._state.residual = None
        self._state.seconds["pairs"] = clock(self._weight) - started

    @full_precision()
    def refine_scales(self) -> None:
        """Step 3: all scales on the layer-wise loss, codes frozen; two-stage only."""
        if self.config.method != "two-stage" or self.config.refine == "none":
            return
        started = clock(self._weight)
        scales, zeros = self._grids()
        steps = grid.centered(self._codes(), zeros, self.group_size)
        difference, pulled = self._residual()
        small = stage2.small_problem(
            steps, pulled, self._problem.hessian, scales, self.group_size, self.config.refine_ridge
        )
        solutions = {"descent": stage2.descent(small, self.config.refine_sweeps)}
        solutions["exact"] = stage2.exact(small, fallback=solutions["descent"])
        self._state.scales = stage2.accept(small, solutions[self.config.refine], self.config.torch_scale_dtype)
        self._state.residual = None
        self._state.seconds["refine"] = clock(self._weight) - started
        before = (pulled * difference).sum(1)
        found = {"assign": scales, **solutions}
        self._state.objective = {step: before + small.objective(value) for step, value in found.items()}

    @full_precision()
    def refine_jointly(self) -> None:
        """Step 4: codes and scales in turn, on what step 3 minimises; two-stage only, if asked for."""
        config = self.config
        if config.method != "two-stage" or not config.joint_rounds:
            return
        started = clock(self._weight)
        self._state.codes, self._state.scales = joint.refine(
            *self._integers(),
            rounds=config.joint_rounds,
            sweeps=config.joint_sweeps,
            ridge=config.refine_ridge,
            dtype=config.torch_scale_dtype,
        )
        self._state.residual = None
        self._state.seconds["joint"] = clock(self._weight) - started

    @full_precision()
    def run(self, held_out: LayerStatistics | None = None) -> SolverResult:
        """All steps, with the loss after each; ``held_out`` adds losses on tokens not fitted."""
        losses: dict[str, Tensor] = {}
        held_out_losses: dict[str, Tensor] = {}
        for step, action in (
            ("initialize", self.initialize_scales),
            ("assign", self.assign_codes),
            ("descend", self.descend_codes),
            ("pairs", self.descend_pairs),
            ("refine", self.refine_scales),
            ("joint", self.refine_jointly),
        ):
            action()
            if self.problem is None or step not in self._state.seconds:
                continue
            losses[step] = self.row_losses()
            if held_out is not None:
                held_out_losses[step] = self.row_losses(held_out)
        return SolverResult(
            weight=self.quantized_weight(),
            losses=losses,
            held_out_losses=held_out_losses,
            signal=None if self.problem is None else self._signal(),
            objective=self._state.objective,
            damping=None if self.problem is None else self.problem.damping,
            seconds=self._state.seconds,
        )

    def loss(self, statistics: LayerStatistics | None = None) -> Tensor:
        """Mean squared output error per token, summed over rows, of the present state (a scalar).

        Measured against the target under the undamped H of the fitted statistics, or of the
        given (held-out) ones. Before :meth:`assign_codes` the nearest codes are taken.
        """
        return self.row_losses(statistics).sum()

    @full_precision()
    def row_losses(self, statistics: LayerStatistics | None = None) -> Tensor:
        """:meth:`loss` of each row, float32 (N,).

        Raises:
            LayerError: statistics that do not fit the weight.
        """
        difference, pulled = self._residual()
        if statistics is not None:
            objective.check_shapes(difference, statistics, self.name)
            return objective.squared_error(difference, (statistics.hessian / statistics.count).to(torch.float32))
        return self._undamped(difference, pulled)

    def quantized_weight(self) -> QuantizedWeight:
        """The present codes, scales and zero points."""
        scales, zeros = self._grids()
        return QuantizedWeight(
            codes=self._codes(),
            scales=scales.to(self.config.torch_scale_dtype),
            zeros=zeros.to(torch.uint8),
            bits=self.config.bits,
            group_size=self.group_size,
            symmetric=self.config.symmetric,
        )

    @property
    def target(self) -> Tensor:
        """W', what grids and codes approximate, float32 (N, K)."""
        return self._problem.grid_target

    @property
    def _problem(self) -> objective.Problem:
        if self.problem is None:
            raise StateError(
                f"{self.name}: no statistics were given, so there is no loss to speak of; pass LayerStatistics"
            )
        return self.problem

    def _metric(self) -> Tensor:
        problem = self._problem
        return (
            problem.hessian
            if self.config.grid_metric == "blocks"
            else stage1.feedback_metric(problem.factor, problem.order)
        )

    def _grids(self) -> tuple[Tensor, Tensor]:
        if self._state.scales is None or self._state.zeros is None:
            raise StateError(f"{self.name}: there are no scales yet; call initialize_scales() first, or run()")
        return self._state.scales, self._state.zeros

    def _codes(self) -> Tensor:
        if self._state.codes is None:
            raise StateError(f"{self.name}: there are no codes yet; call assign_codes() first, or run()")
        return self._state.codes

    @property
    def _moves(self) -> int:
        return max(1, round(self.config.greedy_steps * self._weight.shape[1]))

    def _integers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
        """What the steps on codes start from: codes, target, metric and grids."""
        problem, (scales, zeros) = self._problem, self._grids()
        return (
            self._codes(), problem.refine_target, problem.hessian, scales, zeros, self.config.bits, self.group_size
        )  # fmt: skip

    def _dequantized(self) -> Tensor:
        scales, zeros = self._grids()
        codes = self._state.codes
        if codes is None:
            codes = grid.quantize(self.target, scales, zeros, self.config.bits, self.group_size)
        return grid.dequantize(codes, scales, zeros, self.group_size)

    def _residual(self) -> tuple[Tensor, Tensor]:
        """Q − W' and (Q − W') H, H damped; computed once for each state."""
        if self._state.residual is None:
            difference = self._dequantized() - self._problem.refine_target
            self._state.residual = difference, blocks.product(difference, self._problem.hessian)
        return self._state.residual

    def _signal(self) -> Tensor:
        target = self._problem.refine_target
        return self._undamped(target, blocks.product(target, self._problem.hessian))

    def _undamped(self, difference: Tensor, pulled: Tensor) -> Tensor:
        """Row losses under the undamped H; exactly 0 where that is 0."""
        return ((pulled - blocks.scaled(difference, self._problem.ridge)) * difference).sum(1)
