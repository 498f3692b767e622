"""What a forward pass may change beside its own variables, so that of several passes at once each has it for itself.

* attributes of modules: ``self.skip = x`` for a later layer, caches, features that wait for a head;
* the random numbers of torch and of Python;
* settings of torch that a ``with`` block changes: kernels of attention, the default dtype, and so on.

What else a pass changes, a dictionary that a hook fills for example, all passes share.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_CONTAINERS = (dict, list, set)
# What a pass leaves alone; what hooks are registered is left alone too.
_STRUCTURE = frozenset(
    ("_parameters", "_modules", "_non_persistent_buffers_set", "forward", "training")
)
_MISSING = object()

_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


@dataclass(eq=False)
class _State:
    """All of it at one time: of the attributes, containers and tensors that passes change, in their order."""

    attributes: list[Any] = field(default_factory=list)
    contents: list[Any] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    settings: list[Any] = field(default_factory=list)


class _Before:
    """A module before the first pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = _contents(module)
        self._parts = _parts(module)
        held = [
            value
            for value in (*module._buffers.values(), *self.attributes.values())
            if isinstance(value, Tensor)
        ]
        self._versions = [(tensor, tensor._version) for tensor in held if not tensor.is_inference()]

    def changed(self) -> list[Tensor]:
        """The tensors beside parameters that have been changed in place since."""
        return [tensor for tensor, version in self._versions if tensor._version != version]

    @property
    def was_built(self) -> bool:
        """Whether it has other parameters or children now."""
        return self._parts != _parts(self.module)


class PassState:
    """What the passes of a model change, as a first pass shows; each of them begins with it as it was before that one.

    Tensors that a pass changes in place, such as buffers, are the exception: passes begin with what the first one left.
    So are the attributes of a module that made its parameters in that pass.

    Example:
        >>> class Skip(nn.Linear):
        ...     def forward(self, x):
        ...         self.x = x
        ...         return super().forward(x)
        >>> model = Skip(2, 2)
        >>> state = PassState(model)
        >>> with state.first():
        ...     _ = model(torch.zeros(1, 2))
        >>> with state.own(0):
        ...     _ = model(torch.ones(1, 2))
        ...     go_on = state.leave()
        ...     hasattr(model, "x")
        ...     go_on()
        ...     model.x
        False
        tensor([[1., 1.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes: list[tuple[nn.Module, str]] = []
        self._containers: list[Any] = []
        self._tensors: list[Tensor] = []
        self._random = False
        self._outside: list[Any] = []  # random numbers of whoever asks for the passes
        self._start = _State(settings=_settings())
        self._before: dict[str, _Before] = {}
        self._known: set[tuple[int, str, bool]] = set()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the pass that shows what passes change."""
        self._before = {name: _Before(module) for name, module in self._model.named_modules()}
        self._outside = random_state()
        try:
            yield
        finally:
            for before in self._before.values():
                self._find(before)
            built = {before.module for before in self._before.values() if before.was_built}
            for place, (module, name) in enumerate(self._attributes):
                if module in built:
                    self._start.attributes[place] = vars(module).get(name, _MISSING)
            self._tensors = [
                tensor for before in self._before.values() for tensor in before.changed()
            ]
            self._start.values = [tensor.clone() for tensor in self._tensors]
            self._random = not _equal(self._outside, random_state())
            self._before.clear()
            self._go_out()

    def look(self, name: str) -> None:
        """Within the first pass, before a call of a layer, note what the modules that it is in have changed so far: at the end of the pass that may be as before."""
        parts = name.split(".")
        for end in range(len(parts)):
            before = self._before.get(".".join(parts[:end]))
            if before is not None:
                self._find(before)

    @contextmanager
    def own(self, seed: int) -> Iterator[None]:
        """Around another pass, which begins as the first one did; its random numbers are those of the seed."""
        self._come_in()
        if self._random:
            random.seed(seed)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            self._go_out()

    def leave(self) -> Callable[[], None]:
        """Take the state of the pass that is suspended; the result puts it back when the pass goes on."""
        taken = _State(
            attributes=[vars(module).get(name, _MISSING) for module, name in self._attributes],
            contents=[copy.copy(container) for container in self._containers],
            values=[tensor.clone() for tensor in self._tensors],
            settings=_settings(),
        )
        numbers = random_state() if self._random else []
        self._go_out()

        def go_on() -> None:
            self._come_in()
            self._put(taken)
            if numbers:
                put_random_state(numbers)

        return go_on

    def _come_in(self) -> None:
        if self._random:
            self._outside = random_state()

    def _go_out(self) -> None:
        self._put(self._start)
        if self._random:
            put_random_state(self._outside)

    def _find(self, before: "_Before") -> None:
        attributes = vars(before.module)
        for name in (*before.attributes, *(attributes.keys() - before.attributes.keys())):
            if name in _STRUCTURE or "hook" in name:
                continue
            old, new = before.attributes.get(name, _MISSING), attributes.get(name, _MISSING)
            if old is not new and self._is_news(before.module, name, whole=True):
                self._attributes.append((before.module, name))
                self._start.attributes.append(old)
            content = before.contents.get(name)
            if (
                content is not None
                and not _same(content, old)
                and self._is_news(before.module, name, whole=False)
            ):
                self._containers.append(old)
                self._start.contents.append(content)

    def _is_news(self, module: nn.Module, name: str, *, whole: bool) -> bool:
        key = (id(module), name, whole)
        if key in self._known:
            return False
        self._known.add(key)
        return True

    def _put(self, state: _State) -> None:
        for (module, name), value in zip(self._attributes, state.attributes, strict=True):
            if value is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value
        for container, content in zip(self._containers, state.contents, strict=True):
            refill(container, content)
        for tensor, value in zip(self._tensors, state.values, strict=True):
            with torch.no_grad():
                tensor.copy_(value)
        for (get, put), value in zip(_SETTINGS, state.settings, strict=True):
            if get() != value:
                put(value)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the modules have the same attributes afterwards, parameters, buffers and children included.

    The contents of dictionaries, lists and sets among the attributes are restored too, but not what
    lies deeper.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            for name, content in contents.items():
                refill(attributes[name], content)
            refill(vars(module), attributes)


def refill(container: Any, content: Any) -> None:
    """Give a dictionary, list or set the content of another."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if isinstance(value, _CONTAINERS)
    }


def _parts(module: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the parameters and children that are there."""
    return tuple(
        [name for name, part in parts.items() if part is not None]
        for parts in (module._parameters, module._modules)
    )  # type: ignore[return-value]


def _same(content: Any, container: Any) -> bool:
    """Whether a container holds the very same things as before."""
    if len(content) != len(container):
        return False
    if isinstance(content, set):
        return bool(content == container)
    if isinstance(content, dict):
        return all(key in container and container[key] is value for key, value in content.items())
    return all(old is new for old, new in zip(content, container, strict=True))


def _settings() -> list[Any]:
    return [get() for get, _ in _SETTINGS]


def random_state() -> list[Any]:
    """The state of the random numbers of Python and of torch, on every device that is in use."""
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), torch.get_rng_state(), *on_devices]


def put_random_state(state: list[Any]) -> None:
    """Go back to a state of :func:`random_state`."""
    of_python, on_cpu, *on_devices = state
    random.setstate(of_python)
    torch.set_rng_state(on_cpu)
    if on_devices:
        torch.cuda.set_rng_state_all(on_devices)


def _equal(one: list[Any], other: list[Any]) -> bool:
    with _disable_current_modes():  # one that has tensors without values would refuse these
        return one[0] == other[0] and all(map(torch.equal, one[1:], other[1:]))
