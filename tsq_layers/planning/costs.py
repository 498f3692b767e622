"""Memory and work of the solver, by formulas: it reads values, so it cannot be run on tensors that have none.

Counted from the sources of ``tsq_layers.solver``, in float32 numbers:

    w = N·K      the size of the weight         h = B·K²     of the statistics' H, and of each like it
    s = N·G      of the scales                  q = N·G²     of stage 2's Gram matrices

Shapes: N rows, K columns, B blocks of rows with a metric each, G groups a row.
"""

from tsq_layers.config import QuantConfig
from tsq_layers.numerics import grid
from tsq_layers.solver import gptq, stage1, stage2
from tsq_layers.solver.blocks import PANEL_COLUMNS

_SIZE = 4  # bytes of a number


def solver_bytes(
    shape: tuple[int, int],
    blocks: int,
    config: QuantConfig,
    *,
    shifted: bool,
    held_out: bool = False,
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
        39636173
    """
    rows, columns = shape
    groups = grid.group_count(columns, min(config.group_size or columns, columns))
    w, h, s, q = rows * columns, blocks * columns**2, rows * groups, rows * groups**2
    if not config.needs_calibration:
        return _SIZE * (2 * w + 2 * s)
    # Shifted target, damped H and its factor; scales and zeros.
    problem = shifted * w + 2 * h + 2 * s
    padded = s * min(config.group_size or columns, columns)  # short groups are filled up
    scan = min(padded, stage1.SCAN_WEIGHTS)
    part = w if blocks == 1 else min(w, max(w // blocks, gptq.CHUNK_WEIGHTS))
    share = min(1.0, gptq.BLOCK_COLUMNS / columns)  # of the columns that GPTQ works on at once
    gram = min(1.0, stage2.GRAM_WEIGHTS / w)  # of the rows whose Gram matrices are built at once
    # Integers; A; both with rows side by side.
    building = w + q + gram * (w * (1 + min(1.0, stage2.PANEL_COLUMNS / columns)) + q)
    solving = 2.1 * min(q, stage2.SYSTEM_ENTRIES)  # the systems of some rows, and their factors
    slope = w * (
        1 + _other_target(config, shifted=shifted)
    )  # (Q − W') H; and Q − W', if that is not GPTQ's
    phases = {
        "factorise": (3 if blocks == 1 else 5) * h,
        "shift": (max(2 * w + 4 * h, 6 * h) if rows > blocks * columns else 3.2 * w + 3 * h)
        * shifted,
        "grids": problem + (4.5 + 15 * s / padded) * scan,
        "losses": problem + 3.25 * w + h * held_out,
        "assign": problem + max(2 * part, w + (1.25 + 5 * share) * part + share * h),
        "refine": (problem + 2 * s + 0.25 * w + max(slope + max(2 * w, building), q + solving))
        * _refines(config),
    }
    basis_bytes = 0.0
    if config.rotation is not None or config.channel_scaling:
        basis_bytes = w + h * (
            1 + shifted + held_out
        )  # the weight and all statistics in the other basis
        choice = (3 * w + h) * config.channel_scaling
        phases = {"change": max(2 * w, 3 * h, choice)} | phases
    return round(_SIZE * (basis_bytes + max(phases.values())))


def solver_flops(
    shape: tuple[int, int], blocks: int, config: QuantConfig, *, shifted: bool
) -> float:
    """Floating-point operations of the solver's matrix products and factorisations.

    Example:
        >>> solver_flops((576, 1536), 1, QuantConfig(method="rtn"), shifted=False)
        0.0
    """
    if not config.needs_calibration:
        return 0.0
    rows, columns = shape
    half = 1 + min(1.0, PANEL_COLUMNS / columns)  # of a product with H, of which half is looked at
    # Losses of the nearest codes and of none; the errors carried; W R.
    products = 2 * half + 1 + 2 * shifted
    if _other_target(config, shifted=shifted):  # than GPTQ's, which knows its own loss
        products += 2 if _refines(config) else half
    elif _refines(config):
        products += half  # the slope, by the factor
    products += _refines(config)  # the Gram matrices
    solves = 2 * min(rows, blocks * columns) * shifted
    return float(rows * columns**2 * products + columns**2 * solves + blocks * columns**3 / 3)


def _refines(config: QuantConfig) -> bool:
    return bool(config.option("refine", "none") != "none")


def _other_target(config: QuantConfig, *, shifted: bool) -> bool:
    """Return whether losses are measured against another target than that of the codes."""
    return shifted and bool(config.option("deviation") == "refine")
