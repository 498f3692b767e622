"""Share statistics among experts: those that saw too few tokens take those of all experts."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tsq_layers.calibration.solving import Shortfall
from tsq_layers.calibration.targets import Target
from tsq_layers.layers.pools import Pool
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.sync import to_host


class Experts:
    """The experts' layers that need statistics, and what is known of them as a calibration goes on.

    Args:
        targets: all layers of the run, by name.
        recorded: names of the layers that the recording pass called, in order.

    Attributes:
        order: ``recorded`` with the experts that the recording pass did not call where they belong:
            models go through the experts of a module by number, and through the layers of each alike.
    """

    def __init__(self, targets: Mapping[str, Target], recorded: Sequence[str]) -> None:
        self._targets = {
            name: target for name, target in targets.items() if target.pool and target.observed
        }
        self._members: dict[str, list[str]] = defaultdict(list)  # pool → layers
        self._families: dict[str, list[str]] = defaultdict(list)  # family → layers
        self._waiting: dict[str, dict[str, int]] = defaultdict(
            dict
        )  # pool → layer → tokens of its own
        self._sums: dict[str, LayerStatistics] = {}  # pool → statistics of all its layers so far
        for name, target in self._targets.items():
            pool = pool_of(target)
            self._members[pool.name].append(name)
            self._families[pool.family].append(name)
            self._waiting[pool.name][name] = 0
        self.order = self._completed(recorded)
        self._place = {name: index for index, name in enumerate(self.order)}
        self._last = {
            family: max(self._place.get(name, -1) for name in names)
            for family, names in self._families.items()
        }

    def calls(self, target: Target, recorded: Mapping[str, int]) -> int | None:
        """Return how often a pass calls a layer; ``None`` if the recorded pass does not tell.

        An expert that it did not call is taken to be called as often as its fellows, if these are
        called by number.
        """
        if target.pool is None or target.name in recorded or not target.pool.in_order:
            return recorded.get(target.name)
        return max(
            (recorded[name] for name in self._members[target.pool.name] if name in recorded),
            default=None,
        )

    def lend(self, target: Target, statistics: LayerStatistics) -> bool:
        """Add an expert's statistics to its pool.

        Returns:
            whether it saw so few tokens that it must wait for the statistics of the pool.
        """
        pool, tokens = pool_of(target).name, int(to_host(statistics.count)[0])
        previous = self._sums.get(pool)
        self._sums[pool] = statistics if previous is None else previous + statistics
        minimum = target.config.min_expert_tokens
        if tokens >= (target.shape[1] if minimum is None else minimum):
            del self._waiting[pool][target.name]
            return False
        self._waiting[pool][target.name] = tokens
        return True

    def fellows(self, target: Target) -> list[str]:
        """All layers of an expert's family; none for another layer."""
        return [] if target.pool is None else self._families[target.pool.family]

    def passed(self, name: str) -> list[str]:
        """Pools whose whole family comes before the layer called ``name``: their experts are not called again."""
        place = self._place.get(name, -1)
        return [pool for pool in self._waiting if -1 < self._last[self._family(pool)] < place]

    def open(self) -> list[str]:
        """Pools that were not closed."""
        return list(self._waiting)

    def waiting(self, pool: str) -> list[str]:
        """The layers of a pool that are not solved."""
        return list(self._waiting[pool])

    def close(self, pool: str) -> Iterator[tuple[Target, LayerStatistics | None, Shortfall]]:
        """The experts of a pool that still wait, with the statistics of all, and why. The pool is forgotten.

        There are no statistics if none of them was ever called.
        """
        statistics, waiting = self._sums.pop(pool, None), self._waiting.pop(pool)
        total = 0 if statistics is None else int(to_host(statistics.count)[0])
        for name, tokens in waiting.items():
            target = self._targets[name]
            reason = f"{tokens} tokens of its own for {target.shape[1]} columns: solved with the {total} of all experts"
            yield target, statistics, Shortfall(tokens, reason)

    def _completed(self, recorded: Sequence[str]) -> list[str]:
        roles: dict[str, int] = {}  # pool → which of the layers of an expert comes first
        for name in (*recorded, *self._targets):
            if name in self._targets:
                roles.setdefault(pool_of(self._targets[name]).name, len(roles))
        completed: dict[str, None] = {}
        for name in recorded:
            members = (
                self._families[pool_of(self._targets[name]).family]
                if name in self._targets
                else [name]
            )
            completed.update(
                dict.fromkeys(sorted(members, key=lambda member: self._turn(member, roles)))
            )
        return list(completed)

    def _family(self, pool: str) -> str:
        return pool_of(self._targets[self._members[pool][0]]).family

    def _turn(self, name: str, roles: Mapping[str, int]) -> tuple[int, int]:
        if name not in self._targets:
            return 0, 0
        pool = pool_of(self._targets[name])
        return pool.expert, roles[pool.name]


def pool_of(target: Target) -> Pool:
    """The pool of an expert's layer; experts of other widths have statistics of other shapes, and another pool."""
    assert target.pool is not None
    return dataclasses.replace(
        target.pool, name=f"{target.pool.name}, {target.blocks}×{target.shape[1]}"
    )
