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
_BLOCK = 128  # columns of which GPTQ holds grids and steps
_PANEL = 256  # columns of H that a loss looks at together
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
        40163328
    """
    rows, columns = shape
    groups = grid.group_count(columns, min(config.group_size or columns, columns))
    w, h, s, q = rows * columns, blocks * columns**2, rows * groups, rows * groups**2
    if not config.needs_calibration:
        return _SIZE * (2 * w + 2 * s)
    problem = shifted * w + 2 * h + 2 * s  # shifted target, damped H and its factor; scales and zeros
    padded = s * min(config.group_size or columns, columns)  # short groups are filled up
    scan = min(padded, _SCAN)
    part = w if blocks == 1 else min(w, max(w // blocks, _TOGETHER))
    share = min(1.0, _BLOCK / columns)  # of the columns that GPTQ works on at once
    phases = {
        "checks": 1.75 * max(w, h),
        "factorise": (3 if blocks == 1 else 5) * h,
        "shift": (max(2 * w + 4 * h, 6 * h) if rows > blocks * columns else 3.2 * w + 3 * h) * shifted,
        "grids": problem + (4.5 + 15 * s / padded) * scan,
        "losses": problem + 3.25 * w + h * held_out,
        "assign": problem + max(2 * part, (1.25 + 6 * share) * part + share * h),
        "refine": (problem + 2 * s + 2.25 * w + max(2.5 * (w + q), w + 3.1 * q)) * _refines(config),
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
    half = 1 + min(1.0, _PANEL / columns)  # of a product with H, of which half is looked at
    losses = 3 * half if not _refines(config) else 2 * half + 2  # nearest codes, GPTQ, signal; stage 2 needs all of one
    products = losses + 1 + _refines(config) + 2 * shifted  # and the errors carried; Gram; W R
    solves = 2 * min(rows, blocks * columns) * shifted
    return float(rows * columns**2 * products + columns**2 * solves + blocks * columns**3 / 3)


def _refines(config: QuantConfig) -> bool:
    return config.method == "two-stage" and config.refine != "none"
