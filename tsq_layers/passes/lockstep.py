"""Run several forward passes of a model in lockstep: they wait for one another at its layers.

Each pass runs in a thread of its own and is suspended in the forward pre-hook of every watched layer.
One thread runs at a time. When all passes are suspended, a function is called for the first of these
layers, with all the calls that wait there.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> layers = dict(model.named_children())
    >>> batches = [torch.ones(2, 4), torch.zeros(3, 4)]
    >>> rows = {}
    >>> def visit(name, arrivals):
    ...     rows[name] = [len(arrival.input) for arrival in arrivals]
    ...     return [name]
    >>> run([lambda batch=batch: model(batch) for batch in batches], layers, visit)
    >>> rows
    {'0': [2, 3], '1': [2, 3]}
"""

import contextvars
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tsq_layers.passes.modes import thread_state
from tsq_layers.passes.recording import first_tensor, hooked

# A wait is cut into pieces, because on some platforms Ctrl-C is not seen inside a wait.
_POLL_SECONDS = 0.5
# A pass that has caught as many aborts as this, and went on, is given up.
_MOST_ABORTS = 100

# The attribute `current` is the (scheduler, pass) pair that the calling thread runs. It is absent in
# threads that run no pass.
_THREAD = threading.local()


class _Abort(BaseException):
    """End a pass from inside of its hook.

    It is not an ``Exception``, so ``except Exception`` in a model does not catch it.
    """


@dataclass(frozen=True, eq=False)
class Arrival:
    """One suspended call of a layer.

    Args:
        pass_index: number of the pass that made the call, from 0.
        ordinal: number of the pass' calls of the layer before this one; 0 for the first.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
    """

    pass_index: int
    ordinal: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> torch.Tensor:
        """The first tensor among the arguments, positional ones before keyword arguments.

        Raises:
            TypeError: no argument is a tensor.
        """
        tensor = first_tensor(self.args, self.kwargs)
        if tensor is None:
            types = [type(value).__name__ for value in (*self.args, *self.kwargs.values())]
            raise TypeError(
                f"a call in pass {self.pass_index} has no tensor among its arguments, "
                f"which are {types}"
            )
        return tensor


def run(
    passes: Iterable[Callable[[], object]],
    modules: Mapping[str, nn.Module],
    visit: Callable[[str, list[Arrival]], Iterable[str]],
    *,
    order: Sequence[str] = (),
    suspend: Callable[[int], Callable[[], None]] | None = None,
) -> None:
    """Run all ``passes`` in lockstep, and call ``visit`` at each layer with the calls that wait there.

    Each pass runs in a thread of its own, one thread at a time, until it calls one of ``modules``. When
    every pass is suspended or has returned, ``visit(name, arrivals)`` is called in the calling thread
    for the layer that comes first in the order. Then the passes among the arrivals go on, in the order
    of their numbers. A pass has the caller's grad mode, inference mode, autocast settings, CUDA device
    and stream, dispatch and function modes, and context variables.

    **The order.** A layer that ``order`` lacks is inserted when a pass first calls it, directly behind
    the layer that this pass called before. If every pass calls layers in the order only, then every
    pass that calls a layer at all is waiting there when the layer is visited: no pass waits at an
    earlier layer, and a pass that waits at a later one does not come back. Insertion keeps this property
    for a layer x that is always called directly after the same layer a. When x is found, a pass that
    will call x is still at a or before it, so it comes to x.

    Insertion does not keep it for a layer x that is called after a in one pass, and after c in another.
    x is then inserted behind a, and visited while the other pass still waits at or before c; that pass
    calls x later, and x is visited again, for that pass alone. So ``order`` must be complete where a
    model has such layers, for example experts of which each pass calls some.

    A pass may also go back in the order (a loop). It then waits at the earlier layer, which is visited
    next, for this pass alone.

    **Errors.** When a pass or ``visit`` raises, or the user interrupts, the other passes are aborted: an
    exception that is not an ``Exception`` is raised in the hook in which they wait, and this function
    waits until they have ended. A pass that catches it and goes on is aborted again at its next layer;
    after a hundred times its thread is abandoned, suspended for ever, with a ``RuntimeWarning``. A pass
    that is computing is waited for until its next layer or its end. A second Ctrl-C ends the waiting
    and abandons all threads.

    Args:
        passes: functions that each run one forward pass; their results are dropped. They are taken one
            by one: the next is asked for when the one before is suspended at its first layer.
        modules: the layers to stop at, by name.
        visit: called with the name of a layer and the calls that wait there, in the order of their pass
            indices. It returns the names of the layers at which no pass stops from now on. When these are
            all of ``modules`` (at once, if ``modules`` is empty), the passes are ended where they are.
        order: names of layers in the order in which a pass calls them, usually ``Recording.order``.
        suspend: called in the thread of a pass with its index, before the pass is suspended. It returns
            a function that is called in the same thread when the pass goes on or is aborted.

    Raises:
        ValueError: ``visit`` returned a name that is not in ``modules``.
        TypeError: ``visit`` returned something that is not an iterable of names.
        BaseException: raised by a pass or by ``visit``. A note on an exception of a pass names the pass
            and the last layer that it called.
    """
    _Scheduler(passes, modules, visit, order, suspend).run()


def current_pass() -> int | None:
    """Return the index of the pass that the calling thread runs, or ``None`` if it runs none."""
    current = getattr(_THREAD, "current", None)
    return None if current is None else current[1].index


@dataclass(eq=False)
class _Pass:
    """One pass and its thread.

    A pass does not refer to the scheduler, and to an exception only until it is raised. Otherwise the
    activations in the frames would be in reference cycles, and stay until the garbage collector runs.
    """

    index: int
    call: Callable[[], object]
    stop: tuple[str, Arrival] | None = None  # the layer at which it is suspended, and the call
    last: str | None = None  # the layer that it called last
    calls: Counter[str] = field(default_factory=Counter)
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    over: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    aborts: int = 0

    def waits_at(self, names: set[str]) -> bool:
        """Return True if the pass is suspended at one of the layers."""
        return self.stop is not None and self.stop[0] in names


class _Scheduler:
    """The state of one call of :func:`run`. Only the thread whose turn it is changes it."""

    def __init__(
        self,
        passes: Iterable[Callable[[], object]],
        modules: Mapping[str, nn.Module],
        visit: Callable[[str, list[Arrival]], Iterable[str]],
        order: Sequence[str],
        suspend: Callable[[int], Callable[[], None]] | None,
    ) -> None:
        self.calls = passes  # those that are not started yet, if it is an iterator
        self.passes: list[_Pass] = []
        self.suspend = suspend
        self.modules = modules
        self.visit = visit
        self.order = list(dict.fromkeys(order))
        self.released: set[str] = set()
        self.enter_state = thread_state()
        self.turn_over = threading.Semaphore(0)
        self.running: _Pass | None = None
        self.closing = False

    def run(self) -> None:
        with hooked(self.modules, self.on_call):
            try:
                ready = self.new_passes()
                while not self.modules.keys() <= self.released:
                    for pass_ in ready:
                        self.resume(pass_)
                    if all(pass_.stop is None for pass_ in self.passes):
                        return
                    ready = self.visit_first()
            finally:
                self.close()

    def new_passes(self) -> Iterator[_Pass]:
        """Yield every pass. The caller runs one to its first layer before it asks for the next."""
        for call in self.calls:
            self.passes.append(_Pass(len(self.passes), call))
            yield self.passes[-1]

    def visit_first(self) -> Iterator[_Pass]:
        """Visit the first layer at which a pass waits, and return the passes that may go on."""
        position = {name: index for index, name in enumerate(self.order)}
        stops = [pass_.stop for pass_ in self.passes if pass_.stop is not None]
        first = min((name for name, _ in stops), key=position.__getitem__)
        arrivals = [arrival for name, arrival in stops if name == first]
        names = self.visit(first, arrivals)
        # If checked raises, its traceback keeps this frame, and with it the arguments of the calls.
        del stops, arrivals
        self.released |= self.checked(first, names)
        open_names = {first, *self.released}
        return iter([pass_ for pass_ in self.passes if pass_.waits_at(open_names)])

    def checked(self, name: str, result: Iterable[str]) -> set[str]:
        """Return the names that ``visit`` returned for the layer called ``name``."""
        if isinstance(result, str) or not isinstance(result, Iterable):
            raise TypeError(
                f"visit({name!r}, ...) must return the names of the released layers, got {result!r}"
            )
        names = set(result)
        foreign_names = sorted(names - self.modules.keys())
        if foreign_names:
            raise ValueError(
                f"visit({name!r}, ...) released {foreign_names}, "
                "which are not among the modules of this run"
            )
        return names

    def resume(self, pass_: _Pass) -> None:
        """Let a pass run to its next stop or its end, in its thread, while the calling thread waits."""
        pass_.stop = None
        self.running = pass_
        if pass_.thread is None:
            body = functools.partial(contextvars.copy_context().run, self.body, pass_)
            thread = threading.Thread(target=body, name=f"lockstep-{pass_.index}", daemon=True)
            thread.start()
            pass_.thread = thread
        pass_.go.release()
        while not self.turn_over.acquire(timeout=_POLL_SECONDS):
            pass
        self.running = None
        error = pass_.error
        pass_.error = None
        if error is None:
            return
        place = "before the first layer" if pass_.last is None else f"after layer {pass_.last!r}"
        error.add_note(f"in pass {pass_.index}, {place}")
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame, which would be a cycle

    def body(self, pass_: _Pass) -> None:
        """Run a pass; the target of its thread."""
        pass_.go.acquire()
        _THREAD.current = (self, pass_)
        try:
            if not self.closing:
                with self.enter_state():
                    pass_.call()
        except _Abort:
            pass
        except BaseException as error:  # noqa: BLE001  resume raises it in the calling thread, SystemExit too
            if not self.closing:
                pass_.error = error
        finally:
            del _THREAD.current
            pass_.over.set()
            self.turn_over.release()

    def on_call(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Suspend the calling pass; the forward pre-hook of every module."""
        scheduler, pass_ = getattr(_THREAD, "current", (None, None))
        if scheduler is not self or pass_ is None:
            return
        self.end_if_closing(pass_)
        ordinal = pass_.calls[name]
        pass_.calls[name] += 1
        if name not in self.order:
            position = 0 if pass_.last is None else self.order.index(pass_.last) + 1
            self.order.insert(position, name)
        if name not in self.released:
            pass_.stop = (name, Arrival(pass_.index, ordinal, args, kwargs))
            go_on = None if self.suspend is None else self.suspend(pass_.index)
            self.turn_over.release()
            pass_.go.acquire()
            if go_on is not None:
                go_on()
            self.end_if_closing(pass_)
        pass_.last = name

    def end_if_closing(self, pass_: _Pass) -> None:
        """Raise in the thread of a pass if all passes are to end."""
        if not self.closing:
            return
        pass_.aborts += 1
        if pass_.aborts > _MOST_ABORTS:
            pass_.over.set()
            # For ever: the pass has caught every abort, and would go on computing.
            threading.Event().wait()
        raise _Abort

    def close(self) -> None:
        """End all passes that have not ended, one after the other."""
        self.closing = True
        # An interrupt may have come while a pass was running. That one is ended first, so that no two
        # threads run at a time.
        for pass_ in sorted(self.passes, key=lambda pass_: pass_ is not self.running):
            pass_.stop = None
            pass_.go.release()
            if pass_.thread is None:
                continue
            while not pass_.over.wait(_POLL_SECONDS):
                pass
            if pass_.aborts <= _MOST_ABORTS:
                pass_.thread.join()
        abandoned = [pass_.index for pass_ in self.passes if pass_.aborts > _MOST_ABORTS]
        if abandoned:
            message = (
                f"passes {abandoned} catch every abort and go on; "
                "their threads are left behind, suspended"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=4)
