"""Define the parts of a calibration's course: passes, runs of the solver, and stages."""

from collections import Counter
from dataclasses import dataclass, field

from tsq_layers.config import QuantConfig
from tsq_layers.planning.stage_plan import StagePlan


@dataclass(frozen=True)
class Passes:
    """The passes of a calibration: their number, and the place of those that wait.

    Attributes:
        batches: that are fitted.
        paired: whether each runs on the full-precision stream too.
        held_out: further batches.
        away: the activations of passes that wait are on another device.
    """

    batches: int
    paired: bool
    held_out: int
    away: bool

    @property
    def count(self) -> int:
        """Passes in all."""
        return self.batches * (2 if self.paired else 1) + self.held_out


@dataclass(frozen=True)
class Solve:
    """One run of the solver, for layers of one stage and of one configuration."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    blocks: int
    config: QuantConfig
    shifted: bool


@dataclass(eq=False)
class StageInMaking:
    """A stage in the making; bytes are the most of all times."""

    names: list[str]
    shape: tuple[int, int]
    tokens: int = 0
    held: int = 0
    waiting: int = 0
    offloaded: int = 0
    statistics: int = 0
    solver: int = 0
    packed: int = 0
    phases: Counter[str] = field(default_factory=Counter)

    def most(self, **sizes: int) -> None:
        """Raise sizes that are larger than before."""
        for name, size in sizes.items():
            setattr(self, name, max(getattr(self, name), size))

    def phase(self, name: str, size: int) -> None:
        """All that is on the device in one phase."""
        self.phases[name] = max(self.phases[name], size)

    def frozen(self) -> StagePlan:
        """As the plan has it."""
        return StagePlan(
            names=tuple(self.names),
            rows=self.shape[0],
            columns=self.shape[1],
            tokens=self.tokens,
            held=self.held,
            waiting=self.waiting,
            offloaded=self.offloaded,
            statistics=self.statistics,
            solver=self.solver,
            packed=self.packed,
            observing=self.phases["observing"],
            solving=self.phases["solving"],
            running=self.phases["running"],
        )
