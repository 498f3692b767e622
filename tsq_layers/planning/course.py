"""The course of a calibration: when which layers are solved, and what is held meanwhile.

Goes through the calls of one pass as ``Calibration`` does through those of all: a layer is visited
when every pass waits there; its stage, the layers with the same input, is solved at its last call;
then the passes run on, one by one, to the next layer that is not solved.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from tsq_layers.calibration.experts import pool_of
from tsq_layers.calibration.schedule import Schedule, holds_tokens_out
from tsq_layers.calibration.solving import stacks
from tsq_layers.calibration.targets import Target
from tsq_layers.planning.costs import solver_bytes
from tsq_layers.planning.ledger import Work
from tsq_layers.planning.needs import Needs, packed_bytes
from tsq_layers.planning.parts import Passes, Solve, StageInMaking
from tsq_layers.planning.trace import Call, Trace


class Course:
    """The stages of a calibration, and its work.

    Args:
        targets: all layers that are to be quantised, by name.
        callers: name of every layer that calls go through → its target.
        passes: that run.
        needs: of the layers.

    Attributes:
        stages: in the order in which they are reached, by their first layer (or their experts' pool).
        tokens: name of a target → tokens that it sees.
        solved: names of the targets that are quantised.
        solves: runs of the solver.
        forward: work of all passes.
        observing: work of the statistics.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        callers: Mapping[str, Target],
        passes: Passes,
        needs: Needs,
    ) -> None:
        self.targets, self.callers, self.passes, self._needs = targets, callers, passes, needs
        self.stages: dict[str, StageInMaking] = {}
        self.tokens: Counter[str] = Counter()
        self.solved: set[str] = set()
        self.solves: list[Solve] = []
        self.forward = self.observing = Work()
        self._released: set[str] = set()
        self._calls: Counter[str] = Counter()
        self._sums: dict[str, int] = {}  # of observers and pools
        self._held_out_sums: dict[str, int] = {}
        self._dense: dict[str, int] = {}
        self._packed = 0
        self._held = 0  # by a pass that waits
        self._schedule = Schedule(targets, callers)

    def run(self, trace: Trace | None) -> None:
        """Go through the calls of a pass; ``None`` if there are no passes."""
        if trace is not None:
            self._schedule = Schedule(self.targets, self.callers, trace.recording)
            self._go_through(trace)
            self._held = 0  # all passes have ended
            self._dense.clear()
            for pool in self._schedule.experts.open():
                self._solve_pool(pool)
        for group in self._schedule.remaining(
            self.solved, lambda name: trace is None or bool(self.tokens[name])
        ):
            self._solve(group, 0)

    def _go_through(self, trace: Trace) -> None:
        every = self.callers.keys()
        here: StageInMaking | None = None
        for call in trace.calls:
            self.forward += call.work * self.passes.count
            stops = call.name not in self._released
            self._run_on(
                here or self._entry(self._schedule.input_group(call.name, self.solved)),
                call.peak,
                call.held if stops else self._held,
            )
            if stops:
                here = self._visit(call) or here
            if every <= self._released:
                return  # the passes are ended where they wait
            self._enter(call, here)
        if here is not None:
            self.forward += trace.work * self.passes.count
            self._run_on(here, trace.peak, 0)

    # --- what is held ---------------------------------------------------------------------------

    def _standing(self) -> int:
        """Statistics and packed layers."""
        return self._packed + sum(self._sums.values()) + sum(self._held_out_sums.values())

    def _waiting(self, held: int, others: int = 0) -> int:
        """Activations on the device of all passes but ``others``, when each holds so much."""
        return 0 if self.passes.away else held * (self.passes.count - others)

    def _run_on(self, stage: StageInMaking, peak: int, held_next: int) -> None:
        """One pass after the other runs on: some wait here still, and some at the next layer."""
        waiting = self._waiting(max(self._held, held_next), others=1)
        stage.phase("running", self._standing() + sum(self._dense.values()) + waiting + peak)

    def _enter(self, call: Call, stage: StageInMaking | None) -> None:
        """A layer runs: if it is solved, its dense weight is made and stays until the next visit."""
        target = self.callers[call.name]
        if stage is None or target.name not in self.solved:
            return
        if target.name not in self._dense:
            need = self._needs.dense(target)
            self._dense[target.name] = need.kept
            self.forward += need.work
            self._run_on(stage, call.held + need.extra, self._held)

    # --- visits ---------------------------------------------------------------------------------

    def _visit(self, call: Call) -> StageInMaking | None:
        self._dense.clear()
        self._held = call.held
        target = self.callers[call.name]
        if target.name in self.solved:
            self._released.add(call.name)
            return None
        for pool in self._schedule.experts.passed(call.name):
            self._solve_pool(pool)
        stage = self._schedule.input_group(call.name, self.solved)
        entry = self._entry(stage)
        entry.most(held=call.held, waiting=self._waiting(call.held))
        entry.most(offloaded=call.held * self.passes.count if self.passes.away else 0)
        if stage[0].observed:
            self._observe(stage, entry, call)
        self._calls[call.name] += 1
        if self._schedule.is_last_call(stage[0], self._calls[call.name]):
            self._solve(stage, self._waiting(call.held))
            self._released |= {follower.name for follower in stage}
        return entry

    def _observe(self, stage: Sequence[Target], entry: StageInMaking, call: Call) -> None:
        first, passes = stage[0], self.passes
        paired = passes.paired and any(target.uses_deviation for target in stage)
        need = self._needs.observing(first, call.input, paired=paired)
        tokens = (need.tokens - call.padding) * passes.batches
        for target in stage:
            self.tokens[target.name] += tokens
        entry.tokens = min(self.tokens[name] for name in entry.names)
        self.observing += need.work * passes.batches
        if not tokens:
            return
        # Tokens on which options are chosen have sums of their own.
        self._sums[first.name] = need.kept * (1 + holds_tokens_out(stage))
        if passes.held_out:
            alone = self._needs.observing(first, call.input, paired=False)
            self._held_out_sums[first.name] = alone.kept
            self.observing += alone.work * passes.held_out
        input_bytes = call.held * (1 + paired) if passes.away else self._waiting(call.held)
        entry.phase("observing", self._standing() + input_bytes + need.extra)

    def _entry(self, stage: Sequence[Target]) -> StageInMaking:
        key = stage[0].name if stage[0].pool is None else pool_of(stage[0]).name
        rows = sum(target.shape[0] for target in stage)
        entry = self.stages.setdefault(key, StageInMaking([], (rows, stage[0].shape[1])))
        entry.names += [target.name for target in stage if target.name not in entry.names]
        return entry

    # --- the solver -----------------------------------------------------------------------------

    def _solve(self, stage: Sequence[Target], waiting: int) -> None:
        """Solve a stage from its statistics; those of an expert stay with its pool."""
        first = stage[0]
        sums = self._sums.pop(first.name, 0) + self._held_out_sums.pop(first.name, 0)
        if first.pool is not None and sums:
            self._sums.setdefault(pool_of(first).name, sums)
        entry = self._entry(stage)
        entry.most(statistics=self._standing() - self._packed + sums)
        for stack in stacks(stage):
            solver = self._solve_stack(stack)
            entry.most(solver=solver)
            entry.phase("solving", waiting + self._standing() + sums + solver)
        self._packed += sum(packed_bytes(target) for target in stage)
        entry.most(packed=self._packed)
        self.solved |= {target.name for target in stage}

    def _solve_stack(self, targets: Sequence[Target]) -> int:
        """Return the bytes for solving layers of equal configuration as one stack."""
        first = targets[0]
        shape = sum(target.shape[0] for target in targets), first.shape[1]
        has_deviation = self.passes.paired and first.uses_deviation
        held_out = bool(self.passes.held_out) and first.observed
        names = tuple(target.name for target in targets)
        blocks = first.guidance or first.blocks
        self.solves.append(Solve(names, shape, blocks, first.config, has_deviation))
        has_copy = len(targets) > 1 or first.weight.element_size() != 4
        identity = (
            4 * shape[1] ** 2 * (first.config.needs_calibration and first.kind.inputs is None)
        )
        weight = 4 * shape[0] * shape[1] * has_copy + identity
        return weight + solver_bytes(
            shape, blocks, first.config, shifted=has_deviation, held_out=held_out
        )

    def _solve_pool(self, name: str) -> None:
        """The experts that no token of the example reached; the statistics of their fellows serve."""
        has_sums = name in self._sums
        for target, *_ in self._schedule.experts.close(name):
            if target.name not in self.solved and has_sums:
                self._solve([target], self._waiting(self._held))
        self._sums.pop(name, None)
