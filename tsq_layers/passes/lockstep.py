"""Forward passes that wait for one another at the layers of a model.

Each pass runs in a thread of its own and is suspended in the forward pre-hook of every layer that is to be seen. One
thread runs at a time. When all are suspended, the layer that comes first is visited with all the calls that wait there.

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
# A pass that has swallowed as many aborts as this is never going to end.
_MOST_ABORTS = 100

# What the calling thread runs: `current`, a (scheduler, pass) pair; absent outside of passes.
_THREAD = threading.local()


class _Abort(BaseException):
    """Ends a pass from inside its hook; not an `Exception`, so that `except Exception` in a model lets it through."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """One suspended call of a layer.

    Args:
        pass_index: which of the passes made the call.
        ordinal: 0 for this pass' first call of the layer, 1 for its second, and so on.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
    """

    pass_index: int
    ordinal: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> torch.Tensor:
        """The first tensor among the arguments, positional ones before keywords.

        Raises:
            TypeError: no argument is a tensor.
        """
        tensor = first_tensor(self.args, self.kwargs)
        if tensor is None:
            kinds = [type(value).__name__ for value in (*self.args, *self.kwargs.values())]
            raise TypeError(
                f"a call in pass {self.pass_index} has no tensor among its arguments, which are {kinds}"
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
    """Run all `passes` side by side and call `visit` at each layer with the calls that wait there.

    Each pass runs in a thread of its own, one at a time, until it calls one of `modules`. When every pass is suspended
    or has returned, `visit(name, arrivals)` is called in this thread for the layer that comes first in the order. Then
    the passes that were among the arrivals run on, in pass order. A pass sees the grad mode, inference mode, autocast
    settings, CUDA device and stream, dispatch and function modes and context variables of the caller.

    A layer that the order lacks is inserted directly behind the last layer that the pass which found it had entered.
    **Every caller of a layer is waiting when it is visited, if every pass goes forward in the order:** the visited
    layer is the first at which any pass waits, so a pass that waits elsewhere is behind it for good. Insertion keeps
    this for branches that `order` lacks: if x is always called right after a, then whoever is going to call x was
    still at a, or before it, when x was found, and goes forward from a to x. It does not hold for a layer that `order`
    lacks and that is reached in two ways (after a in one pass, after c in another): who comes from c finds x gone by.
    So give an `order` that is complete where such layers are, as among experts of which a pass calls several. A pass
    may go back in the order (a loop): it waits at the earlier layer, which is visited next, for it alone.

    When a pass or `visit` raises, or the user interrupts, the other passes are aborted: an exception that is not an
    `Exception` is raised in the hook in which they wait, and this function waits until they have ended. A pass that
    catches it and goes on is aborted again at its next layer. After a hundred times its thread is left behind,
    suspended for good, with a `RuntimeWarning`. A pass that computes is waited for until its next layer or its end; a
    second Ctrl-C gives up the waiting and leaves the threads suspended.

    Args:
        passes: the forward passes; what they return is dropped. Taken one by one: each is started, and suspended
            at its first layer, before the next one is asked for.
        modules: the layers to stop at, by name.
        visit: is given a layer's name and the waiting calls by pass index, and returns the names of layers at which no
            pass stops from now on. Once that is all of them (so at once if there are none), the passes are ended
            where they are.
        order: names of layers in the order in which a pass calls them, usually `Recording.order`.
        suspend: called in the thread of a pass, with its index, before it is suspended; what it returns is called
            there when the pass goes on (also to be aborted).

    Raises:
        ValueError: `visit` returned a name that is not in `modules`.
        TypeError: `visit` returned something else than names.
        BaseException: what a pass or `visit` raised; for a pass a note says which one and how far it came.
    """
    _Scheduler(passes, modules, visit, order, suspend).run()


def current_pass() -> int | None:
    """The index of the pass that the calling thread runs; None in a thread that runs none."""
    current = getattr(_THREAD, "current", None)
    return None if current is None else current[1].index


@dataclass(eq=False)
class _Pass:
    """One pass and its thread. It must not refer to the scheduler or to an exception for long: no cycles."""

    index: int
    call: Callable[[], object]
    stop: tuple[str, Arrival] | None = None  # where it is suspended
    last: str | None = None  # the layer that it entered last
    calls: Counter[str] = field(default_factory=Counter)
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    over: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    aborts: int = 0


class _Scheduler:
    """The state of one `run`. All of it is changed only by the one thread whose turn it is."""

    def __init__(
        self,
        passes: Iterable[Callable[[], object]],
        modules: Mapping[str, nn.Module],
        visit: Callable[[str, list[Arrival]], Iterable[str]],
        order: Sequence[str],
        suspend: Callable[[int], Callable[[], None]] | None,
    ) -> None:
        self.coming = passes
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
                due = self.new_passes()
                while not self.modules.keys() <= self.released:
                    for pass_ in due:
                        self.resume(pass_)
                    if all(pass_.stop is None for pass_ in self.passes):
                        return
                    due = self.visit_first()
            finally:
                self.close()

    def new_passes(self) -> Iterator[_Pass]:
        """Every pass, each taken when the one before it has come to its first layer."""
        for call in self.coming:
            self.passes.append(_Pass(len(self.passes), call))
            yield self.passes[-1]

    def visit_first(self) -> Iterator[_Pass]:
        """Visit the first layer at which a pass waits; returns the passes that may go on."""
        place = {name: index for index, name in enumerate(self.order)}
        stops = [pass_.stop for pass_ in self.passes if pass_.stop is not None]
        first = min((name for name, _ in stops), key=place.__getitem__)
        released = self.visit(first, [arrival for name, arrival in stops if name == first])
        del stops
        self.released |= self.checked(first, released)
        open_names = {first, *self.released}
        return iter(
            [
                pass_
                for pass_ in self.passes
                if pass_.stop is not None and pass_.stop[0] in open_names
            ]
        )

    def checked(self, name: str, released: Iterable[str]) -> set[str]:
        if isinstance(released, str) or not isinstance(released, Iterable):
            raise TypeError(
                f"visit({name!r}, ...) must return the names of the released layers, got {released!r}"
            )
        names = set(released)
        if unknown := sorted(names - self.modules.keys()):
            raise ValueError(
                f"visit({name!r}, ...) released {unknown}, which are not among the modules of this run"
            )
        return names

    def resume(self, pass_: _Pass) -> None:
        """Let a pass run to its next stop or its end, in its thread, while this one waits."""
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
        error, pass_.error = pass_.error, None
        if error is None:
            return
        place = "before the first layer" if pass_.last is None else f"after layer {pass_.last!r}"
        error.add_note(f"in pass {pass_.index}, {place}")
        try:
            raise error
        finally:
            del error  # it refers to this frame

    def body(self, pass_: _Pass) -> None:
        """What the thread of a pass runs."""
        pass_.go.acquire()
        _THREAD.current = (self, pass_)
        try:
            if not self.closing:
                with self.enter_state():
                    pass_.call()
        except _Abort:
            pass
        except BaseException as error:  # noqa: BLE001  every exception is the caller's, SystemExit too
            if not self.closing:
                pass_.error = error
        finally:
            del _THREAD.current
            pass_.over.set()
            self.turn_over.release()

    def on_call(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The pre-hook of every module."""
        scheduler, pass_ = getattr(_THREAD, "current", (None, None))
        if scheduler is not self or pass_ is None:
            return
        self.end_if_closing(pass_)
        ordinal = pass_.calls[name]
        pass_.calls[name] += 1
        if name not in self.order:
            behind = 0 if pass_.last is None else self.order.index(pass_.last) + 1
            self.order.insert(behind, name)
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
        if not self.closing:
            return
        pass_.aborts += 1
        if pass_.aborts > _MOST_ABORTS:
            pass_.over.set()
            threading.Event().wait()  # for ever: it would go on for ever anyway, and compute
        raise _Abort

    def close(self) -> None:
        """End all passes that have not ended, one after the other: first the one that an interrupt left running."""
        self.closing = True
        for pass_ in sorted(self.passes, key=lambda pass_: pass_ is not self.running):
            pass_.stop = None
            pass_.go.release()
            if pass_.thread is None:
                continue
            while not pass_.over.wait(_POLL_SECONDS):
                pass
            if pass_.aborts <= _MOST_ABORTS:
                pass_.thread.join()
        if left := [pass_.index for pass_ in self.passes if pass_.aborts > _MOST_ABORTS]:
            message = f"passes {left} catch every abort and go on; their threads are left behind, suspended"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
