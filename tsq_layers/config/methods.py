"""Options of each method: one frozen dataclass a method, checked when it is made.

A method cannot be given an option that none of its steps reads. The steps themselves, and which of
these options each of them reads, are in :data:`tsq_layers.solver.steps.METHODS`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tsq_layers.config.checks import check_field
from tsq_layers.errors import ConfigError

Method = Literal["rtn", "gptq", "quantease", "cdquant", "lnq", "two-stage", "best"]
Auto = Literal["auto"]
Deviation = Literal["target", "refine", "none"]
DescentStart = Literal["gptq", "nearest"]
GridMetric = Literal["feedback", "blocks"]
Refine = Literal["exact", "descent", "none"]
ZeroPoints = Literal["integer", "float"]
Codebook = Literal["row", "group"]

# Why the deviation enters the target with strength 0.5: perplexity of SmolLM2-135M at 2 bits in
# groups of 64, calibrated on 32,768 tokens of State of the Union addresses up to 1999; measured on
# those from 2000 on / on a novel.
#
#                               10 of 30 layers quantised     all 30 layers
#     none                         35.4 / 53.6
#     in the target, 0.25          28.7 / 44.2                 46.4 / 101.7
#     in the target, 0.5           27.5 / 44.4                 45.4 /  94.4
#     in the target, 0.75          27.9 / 43.6                 49.8 / 134.2
#     in stage 2 only, 0.5         30.9 / 47.3
#
# (10 layers: four windows of 1,024 tokens of each text; all layers: eight windows.)


def _check(options: Any) -> None:
    """Refuse values that an option cannot have."""
    for field in dataclasses.fields(options):
        check_field(field.name, getattr(options, field.name))


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Round to the nearest code of a min-max grid. It needs no calibration and has no options."""

    method: ClassVar[Method] = "rtn"


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """GPTQ (arXiv 2210.17323) on static grids that minimise the weight error.

    Args:
        damping: λ; λ·mean(diag H) is added to the diagonal of H. It is multiplied by ten, with a
            :class:`~tsq_layers.errors.DampingWarning`, while the factorisation fails. ``"auto"``
            chooses it for each layer, on a fifth of the calibration tokens that is held out for
            that. Where no tokens can be held out (fused experts, ``convert`` without
            ``calibrate``), it is 0.01.
        act_order: process columns by descending H_jj. It costs nothing at run time, since grids
            are static.

    Raises:
        ConfigError: a value that is not allowed.
    """

    method: ClassVar[Method] = "gptq"
    damping: float | Auto = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class QuantEase:
    """Cyclic coordinate descent on the codes (QuantEase, arXiv 2309.01885).

    Args:
        damping: see :class:`GPTQ`.
        act_order: see :class:`GPTQ`; for ``descent_start="gptq"``.
        deviation: where R, the error of earlier layers, enters: ``"target"`` in every step,
            ``"refine"`` in the descent only, ``"none"``.
        deviation_strength: see :class:`TwoStage`.
        deviation_damping: see :class:`TwoStage`.
        descent_start: codes from which the descent starts: those of GPTQ, or the nearest.
        descent_sweeps: passes over the columns.
        descent_relax: leave some sweeps unrounded, as the authors do, and keep the best codes of
            each row.
        outliers: share of the weights that are stored apart, in full precision, as a sparse part.
            No sweep is then unrounded.
        outlier_columns: number of whole input columns that are stored apart instead.

    Raises:
        ConfigError: a value that is not allowed.
    """

    method: ClassVar[Method] = "quantease"
    damping: float | Auto = 0.01
    act_order: bool = True
    deviation: Deviation = "target"
    deviation_strength: float | Auto = 0.5
    deviation_damping: float | Auto = 0.01
    descent_start: DescentStart = "gptq"
    descent_sweeps: int = 5
    descent_relax: bool = False
    outliers: float = 0.0
    outlier_columns: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def has_outliers(self) -> bool:
        """Return whether some weights are stored apart, as a sparse part."""
        return self.outliers > 0 or self.outlier_columns > 0


@dataclass(frozen=True, kw_only=True)
class CDQuant:
    """Greedy coordinate descent on the codes (CDQuant, arXiv 2406.17542).

    Args:
        damping: see :class:`GPTQ`.
        act_order: see :class:`GPTQ`; for ``descent_start="gptq"``.
        deviation: see :class:`QuantEase`.
        deviation_strength: see :class:`TwoStage`.
        deviation_damping: see :class:`TwoStage`.
        descent_start: codes from which the descent starts: those of GPTQ, or the nearest.
        greedy_steps: moves that a row may make at most, as a multiple of its columns.
        greedy_pairs: continue with moves of pairs of codes.

    Raises:
        ConfigError: a value that is not allowed.
    """

    method: ClassVar[Method] = "cdquant"
    damping: float | Auto = 0.01
    act_order: bool = True
    deviation: Deviation = "target"
    deviation_strength: float | Auto = 0.5
    deviation_damping: float | Auto = 0.01
    descent_start: DescentStart = "gptq"
    greedy_steps: float = 1.0
    greedy_pairs: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class LNQ:
    """Look-up tables and codes in turn (LNQ, in GuidedQuant, arXiv 2505.07004).

    Args:
        damping: see :class:`GPTQ`.
        deviation: see :class:`QuantEase`.
        deviation_strength: see :class:`TwoStage`.
        deviation_damping: see :class:`TwoStage`.
        codebook: one table for each ``"row"``, or for each ``"group"`` of each row.
        codebook_rounds: how often tables are fitted and codes improved in turn.
        codebook_sweeps: passes over the columns in each of these rounds.

    Raises:
        ConfigError: a value that is not allowed.
    """

    method: ClassVar[Method] = "lnq"
    damping: float | Auto = 0.01
    deviation: Deviation = "target"
    deviation_strength: float | Auto = 0.5
    deviation_damping: float | Auto = 0.01
    codebook: Codebook = "row"
    codebook_rounds: int = 3
    codebook_sweeps: int = 4

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class TwoStage:
    """Two-stage grid optimisation (arXiv 2602.02126).

    Args:
        damping: see :class:`GPTQ`.
        act_order: see :class:`GPTQ`.
        grid_metric: loss that stage 1 minimises: ``"feedback"`` is the rounding error that GPTQ's
            error feedback will leave, ``"blocks"`` the paper's group-wise reconstruction loss with
            the diagonal blocks of H.
        deviation: where R = E[(x − x̃)xᵀ], the error of earlier layers, enters: ``"target"`` in
            every step, ``"refine"`` in stage 2 only (the paper), ``"none"``.
        deviation_strength: share of R that is used, 0 to 1, or ``"auto"`` as for ``damping``
            (0.5 where no tokens can be held out).
        deviation_damping: as ``damping``, where R is brought into the target. That is the ridge of
            a regression of the full-precision outputs on the inputs. It needs more damping than
            GPTQ, and how much differs between layers: ``"auto"`` chooses (0.1 where no tokens can
            be held out).
        refine: stage 2: ``"exact"`` solves for all scales of a row at once, ``"descent"`` is the
            paper's coordinate descent over groups, ``"none"`` stops after GPTQ.
        refine_ridge: weight, relative to the curvature of each scale, of a pull of stage 2 towards
            the scales of stage 1. It regularises scales that the calibration data hardly determine.
        refine_sweeps: sweeps of ``refine="descent"``.
        joint_rounds: how often, after stage 2, codes are improved by coordinate descent and scales
            refined again.
        joint_sweeps: passes over the columns in each of these rounds.
        zero_points: ``"integer"`` zero points are codes, as most file formats store them;
            ``"float"`` ones are any number in ``scale_dtype``: ``weight = scale · code + offset``.

    Raises:
        ConfigError: a value that is not allowed.
    """

    method: ClassVar[Method] = "two-stage"
    damping: float | Auto = 0.01
    act_order: bool = True
    grid_metric: GridMetric = "feedback"
    deviation: Deviation = "target"
    deviation_strength: float | Auto = 0.5
    deviation_damping: float | Auto = 0.01
    refine: Refine = "exact"
    refine_ridge: float = 0.01
    refine_sweeps: int = 4
    joint_rounds: int = 0
    joint_sweeps: int = 1
    zero_points: ZeroPoints = "integer"

    def __post_init__(self) -> None:
        _check(self)


Options = RTN | GPTQ | QuantEase | CDQuant | LNQ | TwoStage

OPTIONS: dict[str, type[Options]] = {
    kind.method: kind for kind in (RTN, GPTQ, QuantEase, CDQuant, LNQ, TwoStage)
}
"""Method → the class of its options."""


def option_names(method: str) -> tuple[str, ...]:
    """Return the names of the options that a method has.

    Example:
        >>> option_names("gptq")
        ('damping', 'act_order')
    """
    return tuple(field.name for field in dataclasses.fields(OPTIONS[method]))


def readers(option: str) -> tuple[str, ...]:
    """Return the methods that read an option; none if there is no such option.

    Example:
        >>> readers("joint_rounds"), readers("wbits")
        (('two-stage',), ())
    """
    return tuple(method for method in OPTIONS if option in option_names(method))


def check_readers(method: str, names: list[str]) -> None:
    """Refuse options that no step of a method reads.

    Raises:
        ConfigError: the option, and the methods that read it.
    """
    for name in names:
        others = readers(name)
        if method not in others:
            raise ConfigError(
                f"{name}: no step of method {method!r} reads it; leave it out, or give "
                f"method={' or '.join(map(repr, others))}"
            )
