"""Hold what is needed while the layers that share one input are solved."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from tsq_layers.calibration.solving import TOKENS_PER_COLUMN
from tsq_layers.config.json_fields import checked_fields


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Memory while the layers that share one input are solved, in bytes, on the device of the model.

    Args:
        names: of the layers; of experts, the corresponding layers of all of them.
        rows: N, of all layers as one stack; of experts, of one of them.
        columns: K.
        tokens: that the layers will see; of experts, the one that sees fewest.
        held: what one pass holds as it waits there, the layer's input included.
        waiting: the same of all passes, as far as they are on the device.
        offloaded: as far as they are on another one.
        statistics: sums over the tokens, copies included, of these layers and of others that are not solved yet.
        solver: working memory of the solver.
        packed: packed weights of all layers so far, these included.
        observing: all that is held at most while the inputs are seen, packed weights and statistics included.
        solving: the same while the layers are solved.
        running: the same while the passes run on to the next layer.

    Example:
        >>> sizes = dict.fromkeys(("held", "waiting", "offloaded", "statistics", "solver", "packed"), 0)
        >>> stage = StagePlan(names=("fc",), rows=8, columns=16, tokens=100, observing=5, solving=9, running=7, **sizes)
        >>> stage.total, stage.few_tokens
        (9, True)
    """

    names: tuple[str, ...]
    rows: int
    columns: int
    tokens: int
    held: int
    waiting: int
    offloaded: int
    statistics: int
    solver: int
    packed: int
    observing: int
    solving: int
    running: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))

    @property
    def total(self) -> int:
        """The most that is held at any time of the stage."""
        return max(self.observing, self.solving, self.running)

    @property
    def busiest(self) -> str:
        """When that is: ``"observing"``, ``"solving"`` or ``"running"``."""
        return max(("observing", "solving", "running"), key=lambda phase: getattr(self, phase))

    @property
    def few_tokens(self) -> bool:
        """Return whether there are fewer than 16 tokens for each column."""
        return self.tokens < TOKENS_PER_COLUMN * self.columns

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as plain JSON values."""
        return {**dataclasses.asdict(self), "names": list(self.names)}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Make a stage from plain JSON values; inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: an unknown or missing key, or a value of the wrong type.
        """
        return cls(**checked_fields(cls, values, "a stage of the plan"))
