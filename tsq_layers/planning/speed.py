"""Measure the speed of this machine, once in a process: matrix products, everything else, the solver."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.sync import clock
from tsq_layers.planning.costs import solver_flops
from tsq_layers.planning.ledger import Work
from tsq_layers.planning.parts import Solve
from tsq_layers.solver import TwoStageGroupQuantizer

_LEAST_SECONDS = 0.05  # of a measurement that is repeated until then
_COLUMNS, _FEW_ROWS, _MANY_ROWS = (
    256,
    16,
    768,
)  # of the layers that are solved to see how fast that goes


@dataclass(frozen=True)
class Speed:
    """Of a device.

    Attributes:
        flops: a second, of matrix products.
        traffic: bytes a second, of elementwise operations.
    """

    flops: float
    traffic: float

    def seconds(self, work: Work) -> float:
        """For some work, done one operation after the other."""
        return work.flops / self.flops + work.traffic / self.traffic


@functools.cache
def speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measured with products and elementwise operations of the sizes of a small layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator).to(device, dtype)
    weight = torch.randn(1024, 1024, generator=generator).to(device, dtype)
    elementwise = 2 * x.numel() * x.element_size()
    return Speed(
        flops=2 * x.numel() * weight.shape[1] / _seconds(lambda: x @ weight, x),
        traffic=elementwise / _seconds(lambda: x * x, x),
    )


def solver_seconds(solve: Solve, device: torch.device) -> float:
    """Time of one run of the solver: a part for each column, one for each weight, and its matrix products."""
    column, weight = _solver_speed(_plain(solve.config), device)
    rows, columns = solve.shape
    flops = solver_flops(solve.shape, solve.blocks, solve.config, shifted=solve.shifted)
    return columns * column + rows * columns * weight + flops / speed(device, torch.float32).flops


@functools.cache
def _solver_speed(config: str, device: torch.device) -> tuple[float, float]:
    """Seconds for each column and for each weight, its matrix products aside."""
    plain = QuantConfig.from_json(config)
    products = speed(device, torch.float32).flops
    few, many = (
        _solved(plain, rows, device)
        - solver_flops((rows, _COLUMNS), 1, plain, shifted=False) / products
        for rows in (_FEW_ROWS, _MANY_ROWS)
    )
    weight = max(0.0, many - few) / ((_MANY_ROWS - _FEW_ROWS) * _COLUMNS)
    return max(0.0, few / _COLUMNS - _FEW_ROWS * weight), weight


def _plain(config: QuantConfig) -> str:
    """Return what decides the solver's speed, as text: a configuration has no hash."""
    names = ("method", "group_size", "grid_metric", "refine", "refine_sweeps")
    values = config.values()
    return QuantConfig(**{name: values[name] for name in names if name in values}).to_json()


def _solved(config: QuantConfig, rows: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * _COLUMNS, _COLUMNS, generator=generator).to(device)
    weight = torch.randn(rows, _COLUMNS, generator=generator).to(device)
    statistics = LayerStatistics(x.T @ x, torch.tensor(len(x), device=device))
    return _seconds(lambda: TwoStageGroupQuantizer(weight, statistics, config).run(), weight)


def _seconds(action: Callable[[], object], tensor: Tensor) -> float:
    """The least time of some runs, the first one aside."""
    with torch.inference_mode(False), torch.no_grad():
        action()
        times: list[float] = []
        while sum(times) < _LEAST_SECONDS:
            start = clock(tensor)
            action()
            times.append(clock(tensor) - start)
    return min(times)
