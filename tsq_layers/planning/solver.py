"""Memory and work of the solver, by formulas: it reads values, so it cannot be run on tensors that have none.

Counted from the sources of ``tsq_layers.solver``, in float32 numbers:

    w = N·K      the size of the weight         h = B·K²     of the statistics' H, and of each like it
    s = N·G      of the scales                  q = N·G²     of stage 2's Gram matrices

Shapes: N rows, K columns, B blocks of rows with a metric each, G groups a row.
"""

from tsq_layers import grid
from tsq_layers.config import QuantConfig

_SIZE = 4  # bytes of a number
_SCAN = 2**20  # weights that stage 1 looks at together
_TOGETHER = 2**24  # weights that GPTQ works on together, where there are blocks


def solver_bytes(
    shape: tuple[int, int], blocks: int, config: QuantConfig, *, shifted: bool, held_out: bool = False
) -> int:
    """The most bytes that the solver holds beside the weight (float32) and the statistics that it is given.

    Args:
        shape: (N, K), of all layers that are solved as one stack.
        blocks: B.
        config: of the layers.
        shifted: R is used: targets are other matrices than the weight.
        held_out: losses on other statistics are asked for.

    Example:
        >>> solver_bytes((576, 1536), 1, QuantConfig(), shifted=True)
        66465792
    """
    rows, columns = shape
    groups = grid.group_count(columns, min(config.group_size or columns, columns))
    w, h, s, q = rows * columns, blocks * columns**2, rows * groups, rows * groups**2
    if not config.needs_calibration:
        return _SIZE * (2 * w + 2 * s)
    problem = (
        shifted * w + 2 * h + 4 * s
    )  # the shifted target, damped H and its factor; scales, zeros, and those before
    part = w if blocks == 1 else min(w, max(w // blocks, _TOGETHER))
    phases = {
        "checks": 1.75 * max(w, h),
        "factorise": 6 * h,
        "shift": (4 * h + 4 * w) * shifted,
        "grids": problem + 5.75 * min(w, _SCAN),
        "losses": problem + 4.25 * w + h * held_out,
        "assign": problem + 2 * w + h + 7.75 * part,
        "refine": (problem + 3.25 * w + max(2.25 * w, 3.1 * q)) * _refines(config),
    }
    changed = 0.0
    if config.rotation is not None or config.channel_scaling:
        changed = w + h * (1 + shifted + held_out)  # the weight and all statistics in the other basis
        choice = (3 * w + h) * config.channel_scaling
        phases = {"change": max(2 * w, 3 * h, choice)} | phases
    return round(_SIZE * (changed + max(phases.values())))


def solver_flops(shape: tuple[int, int], blocks: int, config: QuantConfig, *, shifted: bool) -> float:
    """Floating-point operations of the solver's matrix products and factorisations.

    Example:
        >>> solver_flops((576, 1536), 1, QuantConfig(method="rtn"), shifted=False)
        0.0
    """
    if not config.needs_calibration:
        return 0.0
    rows, columns = shape
    refines = _refines(config)
    products = 2 * (2 + refines + 1) + 6 * shifted + 1 + refines  # losses and signal; the shift; carrying errors; Gram
    return float(rows * columns**2 * products) + 3.5 * blocks * columns**3


def _refines(config: QuantConfig) -> bool:
    return config.method == "two-stage" and config.refine != "none"
