"""A layer that is to be quantised, before it is solved and after."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsq_layers.calibration.guidance import groups_of
from tsq_layers.config import QuantConfig
from tsq_layers.layers import LayerKind, rows_of
from tsq_layers.layers.pools import Pool
from tsq_layers.numerics.weight import QuantizedWeight, WeightFormat
from tsq_layers.observer import HessianObserver
from tsq_layers.reports import LayerReport
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.solver.basis_change import round_rotated


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that is to be quantised.

    Attributes:
        name: dotted name in the model, composites split.
        module: the layer.
        kind: how it shows itself.
        config: what to do with it, overrides applied.
        shape: (N, K) of its matrix.
        tied: names of other layers whose weight is the very same parameter.
        pool: its place among its fellow experts; ``None`` for other layers.
        given: codes and grids to start from, in the place of new ones.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    config: QuantConfig
    shape: tuple[int, int]
    tied: tuple[str, ...] = ()
    pool: Pool | None = None
    given: QuantizedWeight | None = None

    @property
    def weight(self) -> Tensor:
        """The full-precision weight matrix (N, K); on the meta device if it is offloaded."""
        return self.kind.weight(self.module)

    @property
    def blocks(self) -> int:
        """Blocks of rows that have inputs of their own."""
        return self.kind.blocks(self.module)

    @property
    def observed(self) -> bool:
        """Return whether statistics of the layer's inputs are needed."""
        return self.config.needs_calibration and self.kind.inputs is not None

    @property
    def uses_deviation(self) -> bool:
        """Return whether R is used. Not for experts: the two streams route tokens differently."""
        return self.observed and self.config.uses_deviation and self.pool is None

    def rows(self, x: Tensor) -> Tensor:
        """The inputs of a call as rows (…, K), or (T, B, K)."""
        assert self.kind.inputs is not None
        return self.kind.inputs(self.module, x)

    @property
    def guidance(self) -> int:
        """Groups of output channels with Hessians of their own; 0 without guidance.

        Only layers that are called once for each token, with an output (…, N), are guided.
        """
        plain = (
            self.observed and self.kind.inputs is rows_of and self.pool is None and not self.tied
        )
        return (
            groups_of(self.shape[0], self.config.guidance) if plain and self.config.guidance else 0
        )

    @property
    def format(self) -> WeightFormat:
        """The format of its packed matrix."""
        config, (rows, columns) = self.config, self.shape
        codes = WeightFormat.of(
            bits=config.bits,
            group_size=min(config.group_size or columns, columns),
            symmetric=config.symmetric,
            scale_dtype=config.torch_scale_dtype,
            offsets=config.has_offsets,
            tables=config.tables,
        )
        if config.option("outlier_columns"):
            count = min(config.option("outlier_columns"), columns)
            codes = dataclasses.replace(codes, outlier_columns=count)
        elif config.option("outliers"):
            count = max(1, round(config.option("outliers") * rows * columns))
            codes = dataclasses.replace(codes, outliers=count)
        if self.kind.inputs is None:
            return codes
        return dataclasses.replace(
            codes,
            rotation=config.rotation,
            channel_scaling=config.channel_scaling,
            activation_bits=config.activation_bits,
        )

    def empty_matrix(self, device: torch.device | str | None = None) -> QuantLinear:
        """Its packed matrix before it is solved, without bias; on the device of its weight unless another is given."""
        rows, columns = self.shape
        return QuantLinear(
            columns,
            rows,
            self.format,
            bias=False,
            device=device or self.weight.device,
            dtype=self.weight.dtype,
        )

    def rounded(self, rows: Tensor) -> Tensor:
        """Rows of inputs as the layer will see them: what 8 bits leave of them, if ``activation_bits`` says so.

        They are rounded in the rotated basis, where the quantised layer will round them, in at least float32.
        Column scales are chosen only when the layer is solved. Until then they are taken to be 1: the error that
        the statistics contain is that of inputs which are rotated but not scaled, usually the larger one.
        """
        if self.config.activation_bits is None or self.kind.inputs is None:
            return rows
        return round_rotated(rows, self.config.rotation)

    def observer(self, *, guided: bool = False) -> HessianObserver:
        """An empty observer of the layer's inputs."""
        return HessianObserver(
            self.shape[1], blocks=self.guidance or self.blocks if guided else self.blocks
        )


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer that was quantised, not yet swapped in: its packed matrix, without bias."""

    matrix: QuantLinear
    report: LayerReport
