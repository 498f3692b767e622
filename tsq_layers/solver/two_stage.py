"""`TwoStageGroupQuantizer`: the paper's algorithm box, one layer at a time.

    1.  scales, zeros  ←  group-wise reconstruction loss, or what GPTQ will leave of it   (stage 1)
    2.  codes          ←  GPTQ on these grids
    3.  scales         ←  layer-wise loss, codes frozen, closed form                      (stage 2)
    4.  codes, scales  ←  the same loss, in turn, if asked for                            (joint)

The error R of earlier layers changes the target of all, or of steps 3 and 4 only. The other methods
fit the same box: ``"rtn"`` is min-max grids and nearest codes, ``"gptq"`` is weight-MSE grids and
step 2, ``"quantease"`` and ``"cdquant"`` go on from there with descents on the codes, and ``"lnq"`` has
tables instead of grids and improves codes and tables in turn. What each does is in steps.py.
"""

import dataclasses

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.errors import LayerError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.sync import clock
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.passes.modes import full_precision
from tsq_layers.solver import problem as objective
from tsq_layers.solver import steps
from tsq_layers.solver.result import SolverResult
from tsq_layers.solver.state import Layer, State

__all__ = ["SolverResult", "TwoStageGroupQuantizer"]


_ACTIONS = {
    "initialize": "initialize_scales",
    "assign": "assign_codes",
    "descend": "descend_codes",
    "pairs": "descend_pairs",
    "refine": "refine_scales",
    "joint": "refine_jointly",
}
"""Step → the method that runs it; a subclass may replace these."""


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
        self,
        weight: Tensor,
        statistics: LayerStatistics | None,
        config: QuantConfig,
        *,
        name: str = "layer",
    ) -> None:
        if weight.dim() != 2 or not weight.is_floating_point():
            raise LayerError(
                f"{name}: weight is {weight.dtype} of shape {tuple(weight.shape)}; give a floating-point matrix (N, K)"
            )
        if statistics is None and config.needs_calibration:
            raise LayerError(
                f"{name}: method {config.method!r} needs statistics of the layer's input; "
                "calibrate, or use method='rtn'"
            )
        self.config, self.name = config, name
        self.group_size = min(config.group_size or weight.shape[1], weight.shape[1])
        values = weight.detach().to(torch.float32)
        self._recipe = steps.recipe(config)
        self._state = State()
        start = clock(weight)
        if statistics is None:
            objective.check_values(values, None, name)
        self.problem = (
            None if statistics is None else objective.build(weight, statistics, config, name)
        )
        self._state.seconds["factorise"] = clock(weight) - start
        free = values != 0 if config.keep_zeros and config.holds_zero else None
        self._layer = Layer(values, self.problem, config, self.group_size, name, free)

    def initialize_scales(self) -> None:
        """Fit the grids, or tables, of the method (step 1)."""
        self._state = State(seconds={"factorise": self._state.seconds["factorise"]})
        self._run_step("initialize")

    def start_from(self, weight: QuantizedWeight) -> None:
        """Take over codes and grids in the place of steps 1 and 2.

        Args:
            weight: (N, K), of the width, group size, symmetry and kind of grid (and the
                ``scale_dtype``) of the configuration.

        Raises:
            LayerError: it is of another shape or kind.
        """
        self._state = State(seconds={"factorise": self._state.seconds["factorise"]})
        start = clock(self._layer.weight)
        self._state.adopt(self._layer, weight)
        self._state.seconds["assign"] = clock(self._layer.weight) - start

    def assign_codes(self) -> None:
        """Choose codes on the present grids (step 2).

        By GPTQ; the nearest codes for ``"rtn"``, ``"lnq"`` and ``descent_start="nearest"``.
        """
        self._run_step("assign")

    def descend_codes(self) -> None:
        """Improve the codes by coordinate descent; quantease, cdquant and lnq only."""
        self._run_step("descend")

    def descend_pairs(self) -> None:
        """Improve pairs of codes, grids frozen; cdquant with ``greedy_pairs`` only."""
        self._run_step("pairs")

    def refine_scales(self) -> None:
        """Solve for all scales on the layer-wise loss, codes frozen (step 3); two-stage only."""
        self._run_step("refine")

    def refine_jointly(self) -> None:
        """Improve codes and grids in turn, on the loss of step 3 (step 4).

        Two-stage with ``joint_rounds`` only.
        """
        self._run_step("joint")

    @full_precision()
    def _run_step(self, name: str) -> None:
        """Run a step, if the configuration asks for it, and take its time."""
        step = self._recipe.get(name)
        if step is None:
            return
        layer, state = self._layer, self._state
        start = clock(layer.weight)
        if name != "refine":  # which makes use of the loss and the error that GPTQ has left
            state.change()
        before = None if layer.free is None else dataclasses.replace(state)
        step.run(layer, state, self.config.options)
        state.keep_zeros(layer)
        if before is not None and name in ("descend", "pairs", "joint"):
            # Moves of pairs count on both codes; where a zero was put back, the row has lost.
            state.restore_rows(layer, before)
        state.seconds[name] = clock(layer.weight) - start

    @full_precision()
    def run(
        self, held_out: LayerStatistics | None = None, start: QuantizedWeight | None = None
    ) -> SolverResult:
        """Run all steps, with the loss after each; ``held_out`` adds losses on tokens not fitted.

        With ``start`` its codes and grids take the place of steps 1 and 2.
        """
        losses: dict[str, Tensor] = {}
        held_out_losses: dict[str, Tensor] = {}
        for step in self._recipe:
            if start is None or step not in ("initialize", "assign"):
                getattr(self, _ACTIONS[step])()
            elif step == "assign":
                self.start_from(start)
            if self.problem is None or step not in self._state.seconds:
                continue
            losses[step] = self.row_losses()
            if held_out is not None:
                held_out_losses[step] = self.row_losses(held_out)
        return SolverResult(
            weight=self.quantized_weight(),
            losses=losses,
            held_out_losses=held_out_losses,
            signal=None if self.problem is None else self._target_energy(),
            held_out_signal=None
            if self.problem is None or held_out is None
            else self._target_energy(held_out),
            objective=self._state.objective,
            damping=None if self.problem is None else self.problem.damping,
            seconds=self._state.seconds,
        )

    def loss(self, statistics: LayerStatistics | None = None) -> Tensor:
        """Return the mean squared output error per token, summed over rows, of the present state (a scalar).

        Measured against the target under the undamped H of the fitted statistics, or of the
        given (held-out) ones. Before :meth:`assign_codes` the nearest codes are taken.
        """
        return self.row_losses(statistics).sum()

    @full_precision()
    def row_losses(self, statistics: LayerStatistics | None = None) -> Tensor:
        """Return :meth:`loss` of each row, float32 (N,).

        Raises:
            LayerError: statistics that do not fit the weight.
        """
        if statistics is None:
            if self._state.loss is None and self._is_next("refine"):
                self._state.errors(self._layer)  # which that step needs
            return self._state.losses(self._layer)
        difference = self._state.difference(self._layer)
        objective.check_shapes(difference, statistics, self.name)
        return objective.squared_error(
            difference, (statistics.hessian / statistics.count).to(torch.float32)
        )

    def quantized_weight(self) -> QuantizedWeight:
        """Return the present codes, with scales and zero points or tables."""
        return self._state.stored(self._layer)

    @property
    def target(self) -> Tensor:
        """Return W', what grids and codes approximate, float32 (N, K)."""
        return self._layer.known.grid_target

    def _is_next(self, step: str) -> bool:
        """Return whether a step is the next one of the recipe."""
        remaining = [name for name in self._recipe if name not in self._state.seconds]
        return remaining[:1] == [step]

    @full_precision()
    def _target_energy(self, statistics: LayerStatistics | None = None) -> Tensor:
        problem = self._layer.known
        if statistics is None:
            return objective.squared_error(problem.refine_target, problem.hessian, problem.ridge)
        return objective.squared_error(
            problem.refine_target, (statistics.hessian / statistics.count).to(torch.float32)
        )
