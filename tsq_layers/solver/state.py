"""Define the layer that is solved, and the state that its steps change."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.errors import LayerError, StateError
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import Outliers, QuantizedWeight
from tsq_layers.solver import gptq, offsets
from tsq_layers.solver import lnq as codebook
from tsq_layers.solver.blocks import in_original_order, product, scaled
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.problem import Problem, squared_error

_SLACK = 64  # units of rounding: a loss that is less than so many of the part that damping has in it is none
_CHUNK_ELEMENTS = 2**20  # weights whose errors are squared at once: bounds the temporaries


@dataclass(frozen=True, eq=False)
class Layer:
    """The layer that is solved; it does not change.

    Attributes:
        weight: W, float32 (N, K).
        problem: target and metric; ``None`` without statistics.
        config: how.
        group_size: columns that share a scale, at most K.
        name: how messages call the layer.
        free: bool (N, K); where it is false the weight is zero, and stays so. ``None``: nowhere.
    """

    weight: Tensor
    problem: Problem | None
    config: QuantConfig
    group_size: int
    name: str
    free: Tensor | None = None

    @property
    def known(self) -> Problem:
        """Return the problem, where there must be one."""
        if self.problem is None:
            raise StateError(
                f"{self.name}: no statistics were given, so there is no loss to speak of; pass LayerStatistics"
            )
        return self.problem


@dataclass(eq=False)
class State:
    """The results of the steps so far, which they change.

    After the first step there are ``scales`` and ``zeros``, or ``tables``.

    Attributes:
        scales: made of values that are stored, float32 (N, G).
        zeros: float32 (N, G); 0 everywhere where there are offsets.
        offsets: added to scales · codes, float32 (N, G), made of values that are stored.
        tables: levels of lnq, float32 (N, T, 2^bits), made of values that are stored.
        codes: uint8 (N, K).
        sparse: outliers, added to what the codes stand for, float32 (N, K), made of values that are stored.
        outliers: the same, as they are stored.
        residual: Q − W' and (Q − W') H of the present state, once asked for.
        whitened: E = (Q − W') V of the present state, as ``gptq.Assigned`` has it, until (Q − W') H is made of it.
        loss: (Q − W') H (Q − W')ᵀ of each row of the present state, where a step knows it, (N,); H damped.
        objective: see ``SolverResult``.
        seconds: step → wall time.
    """

    scales: Tensor | None = None
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    tables: Tensor | None = None
    codes: Tensor | None = None
    sparse: Tensor | None = None
    outliers: Outliers | None = None
    residual: tuple[Tensor, Tensor] | None = None
    whitened: Tensor | None = None
    loss: Tensor | None = None
    objective: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def adopt(self, layer: Layer, weight: QuantizedWeight) -> None:
        """Take codes and grids as they are.

        Raises:
            LayerError: they are not what the layer's configuration says.
        """
        config = layer.config
        required = (
            *layer.weight.shape,
            config.bits,
            layer.group_size,
            config.symmetric,
            config.has_offsets,
        )
        form = (weight.bits, weight.group_size, weight.symmetric, weight.offsets is not None)
        actual = (*weight.codes.shape, *form)
        if (
            actual != required
            or weight.scales.dtype != config.torch_scale_dtype
            or weight.tables is not None
        ):
            raise LayerError(
                f"{layer.name}: codes to start from are of rows, columns, bits, group size, "
                f"symmetry, offsets {actual} in "
                f"{weight.scales.dtype}, the layer is of {required} in {config.scale_dtype}; give a "
                "configuration of the codes"
            )
        self.codes, self.scales = weight.codes, weight.scales.to(torch.float32)
        self.offsets = None if weight.offsets is None else weight.offsets.to(torch.float32)
        self.zeros = weight.zeros.to(torch.float32)

    def grids(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return scales and zero points."""
        if self.scales is None or self.zeros is None:
            raise StateError(
                f"{layer.name}: there are no scales yet; call initialize_scales() first, or run()"
            )
        return self.scales, self.zeros

    def chosen(self, layer: Layer) -> Tensor:
        """Return the codes."""
        if self.codes is None:
            raise StateError(
                f"{layer.name}: there are no codes yet; call assign_codes() first, or run()"
            )
        return self.codes

    def reduced(self, layer: Layer, target: Tensor) -> Tensor:
        """Return a target less what is added to the grid's values: W' itself, (N, K), without offsets and outliers."""
        if self.offsets is not None:
            target = target - offsets.spread(self.offsets, layer.group_size, target.shape[1])
        return target if self.sparse is None else target - self.sparse

    def integers(self, layer: Layer) -> Coded:
        """Return the problem from which steps on codes start."""
        (scales, zeros), problem = self.grids(layer), layer.known
        target = self.reduced(layer, problem.refine_target)
        codes, bits = self.chosen(layer), layer.config.bits
        return Coded(
            codes, target, problem.hessian, scales, zeros, bits, layer.group_size, layer.free
        )

    def nearest(self, layer: Layer, target: Tensor) -> Tensor:
        """Return the codes of the present grids or tables that are nearest to a target, uint8 (N, K)."""
        if self.tables is not None:
            return codebook.nearest(target, self.tables, layer.group_size)
        scales, zeros = self.grids(layer)
        return grid.quantize(
            self.reduced(layer, target), scales, zeros, layer.config.bits, layer.group_size
        )

    def dequantized(self, layer: Layer, rows: slice = slice(None)) -> Tensor:
        """Return Q (N, K), or some rows of it; of the nearest codes, if there are none yet."""
        if self.tables is None:
            self.grids(layer)
        codes = self.codes
        if codes is None:
            codes = self.nearest(layer, layer.known.grid_target)
        if self.tables is not None:
            return codebook.dequantize(codes[rows], self.tables[rows], layer.group_size)
        scales, zeros = self.grids(layer)
        values = grid.dequantize(codes[rows], scales[rows], zeros[rows], layer.group_size)
        if self.offsets is not None:
            values += offsets.spread(self.offsets[rows], layer.group_size, values.shape[1])
        return values if self.sparse is None else values + self.sparse[rows]

    def keep_zeros(self, layer: Layer) -> None:
        """Put codes back to zero where the weight is."""
        if layer.free is not None and self.codes is not None and self.zeros is not None:
            zeros = offsets.spread(self.zeros, layer.group_size, self.codes.shape[1]).to(
                torch.uint8
            )
            self.codes = torch.where(layer.free, self.codes, zeros)

    def restore_rows(self, layer: Layer, before: "State") -> None:
        """Take rows back as they were whose loss has risen, codes and grids."""
        worse = (self.losses(layer) > before.losses(layer)).unsqueeze(1)
        for name in ("codes", "scales", "zeros"):
            old, new = getattr(before, name), getattr(self, name)
            setattr(self, name, torch.where(worse, old, new))
        self.change()

    def change(self) -> None:
        """Forget what is known of the state before."""
        self.residual = self.whitened = self.loss = None

    def difference(self, layer: Layer) -> Tensor:
        """Return Q − W', (N, K)."""
        if self.residual is not None:
            return self.residual[0]
        return self.dequantized(layer).sub_(layer.known.refine_target)

    def errors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return Q − W' and (Q − W') H, H damped; computed once for each state."""
        if self.residual is None:
            difference = self.difference(layer)
            self.residual = difference, product(difference, layer.known.hessian)
        return self.residual

    def error_H(self, layer: Layer) -> Tensor:
        """Return (Q − W') H, H damped, by the cheaper of the ways that there are."""
        problem = layer.known
        if self.whitened is None:
            return self.errors(layer)[1]
        error_H, self.whitened = gptq.error_times_hessian(self.whitened, problem.factor), None
        return in_original_order(error_H, problem.order)

    def losses(self, layer: Layer) -> Tensor:
        """Return (Q − W') H (Q − W')ᵀ of each row, H not damped, (N,)."""
        ridge = layer.known.ridge
        if self.loss is not None:
            damping = scaled(self._squares(layer).unsqueeze(1), ridge).squeeze(1)
            undamped_loss = self.loss - damping
            return torch.where(
                undamped_loss > _SLACK * torch.finfo(undamped_loss.dtype).eps * damping,
                undamped_loss,
                torch.zeros_like(undamped_loss),
            )
        difference = self.difference(layer)
        if self.residual is not None:
            undamped = scaled(difference, ridge)
            return torch.sub(self.residual[1], undamped, out=undamped).mul_(difference).sum(1)
        return squared_error(difference, layer.known.hessian, ridge)

    def _squares(self, layer: Layer) -> Tensor:
        """Return ‖Q − W'‖² of each row, (N,)."""
        target = layer.known.refine_target
        height = max(1, _CHUNK_ELEMENTS // target.shape[1])
        pieces = [slice(start, start + height) for start in range(0, len(target), height)]
        return torch.cat(
            [self.dequantized(layer, rows).sub_(target[rows]).square_().sum(1) for rows in pieces]
        )

    def stored(self, layer: Layer) -> QuantizedWeight:
        """Return the present codes and grids, or tables, as they are stored."""
        dtype, config = layer.config.torch_scale_dtype, layer.config
        if self.tables is None:
            scales, zeros = self.grids(layer)
        else:
            scales = zeros = self.tables.new_empty(len(self.tables), 0)
        return QuantizedWeight(
            codes=self.chosen(layer),
            scales=scales.to(dtype),
            zeros=zeros.to(torch.uint8),
            bits=config.bits,
            group_size=layer.group_size,
            symmetric=config.symmetric,
            offsets=None if self.offsets is None else self.offsets.to(dtype),
            tables=None if self.tables is None else self.tables.to(dtype),
            outliers=self.outliers,
        )
