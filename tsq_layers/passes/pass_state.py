"""Define :class:`PassState`, which gives each of several simultaneous forward passes its own state of the model.

Beside its local variables, a pass may change

* attributes of modules: ``self.skip = x`` for a later layer, caches, features that a head collects;
* the random state of torch and of Python;
* settings of torch that a ``with`` block changes, such as attention kernels and the default dtype.

Each pass has its own state of these. Anything else that a pass changes, for example a dictionary
that a hook fills, is shared by all passes.
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
# Attributes of a module that are never saved or restored. Attributes that hold hooks are not either.
_STRUCTURE = frozenset(
    ("_parameters", "_modules", "_non_persistent_buffers_set", "forward", "training")
)
_MISSING = object()  # the value of an attribute that a module does not have

# Pairs of functions that get and set one setting of torch.
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
    """The state at one time, in the order of the attributes, containers and tensors of a :class:`PassState`.

    Args:
        attributes: values of the attributes.
        contents: copies of the containers.
        values: copies of the tensors.
        settings: values of ``_SETTINGS``.
    """

    attributes: list[Any] = field(default_factory=list)
    contents: list[Any] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    settings: list[Any] = field(default_factory=list)


class _Before:
    """The attributes of a module before the first pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = _contents(module)
        self._names = _child_names(module)
        self._versions: list[tuple[Tensor, int]] = []
        for value in (*module._buffers.values(), *self.attributes.values()):
            if isinstance(value, Tensor) and not value.is_inference():
                self._versions.append((value, value._version))

    def changed_tensors(self) -> list[Tensor]:
        """Return the buffers and tensor attributes that were changed in place since."""
        return [tensor for tensor, version in self._versions if tensor._version != version]

    @property
    def was_built(self) -> bool:
        """True if the module has other parameters or children now, as lazy modules do."""
        return self._names != _child_names(self.module)


class PassState:
    """The state that forward passes of a model change, so that each pass starts from the same one.

    A first pass shows which attributes, containers and tensors change. Every other pass starts with
    their values before that first pass, with two exceptions, which start with the values after it:
    tensors that are changed in place, such as buffers, and the attributes of a module that created its
    parameters in the first pass.

    Args:
        model: the model that the passes run.

    Example:
        >>> class Skip(nn.Linear):
        ...     def forward(self, x):
        ...         self.x = x
        ...         return super().forward(x)
        >>> model = Skip(2, 2)
        >>> state = PassState(model)
        >>> with state.first():
        ...     _ = model(torch.zeros(1, 2))
        >>> with state.separate(seed=0):
        ...     _ = model(torch.ones(1, 2))
        ...     resume = state.suspend()
        ...     hasattr(model, "x")
        ...     resume()
        ...     model.x
        False
        tensor([[1., 1.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes: list[tuple[nn.Module, str]] = []
        self._containers: list[Any] = []
        self._tensors: list[Tensor] = []
        self._uses_random = False
        self._outer_random_state: list[Any] = []  # the random state outside of the passes
        self._start = _State(settings=_settings())
        self._before: dict[str, _Before] = {}
        self._noted: set[tuple[int, str, str]] = set()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Record what changes in the ``with`` block, which runs the first pass, and restore the state after it."""
        self._before = {name: _Before(module) for name, module in self._model.named_modules()}
        self._outer_random_state = random_state()
        try:
            yield
        finally:
            for before in self._before.values():
                self._note(before)
            built = {before.module for before in self._before.values() if before.was_built}
            for index, (module, name) in enumerate(self._attributes):
                if module in built:
                    self._start.attributes[index] = vars(module).get(name, _MISSING)
            self._tensors = []
            for before in self._before.values():
                self._tensors.extend(before.changed_tensors())
            self._start.values = [tensor.clone() for tensor in self._tensors]
            self._uses_random = not _equal(self._outer_random_state, random_state())
            self._before.clear()
            self._leave()

    def note_changes(self, name: str) -> None:
        """Record what the modules around a layer have changed so far; within the first pass, before a call of it.

        A module may change an attribute and set it back before the pass ends. Another pass must find
        it changed if it is suspended in between.

        Args:
            name: dotted name of the layer.
        """
        parts = name.split(".")
        for end in range(len(parts)):
            before = self._before.get(".".join(parts[:end]))
            if before is not None:
                self._note(before)

    @contextmanager
    def separate(self, seed: int) -> Iterator[None]:
        """Set the start state for the ``with`` block, which runs one pass, and restore it after.

        Args:
            seed: of the random state, if the first pass changed that.
        """
        self._enter()
        if self._uses_random:
            random.seed(seed)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            self._leave()

    def suspend(self) -> Callable[[], None]:
        """Save the state of the pass that is running, and set the start state for others.

        Returns:
            a function that restores the state of the pass, to be called before the pass goes on.
        """
        state = _State(
            attributes=[vars(module).get(name, _MISSING) for module, name in self._attributes],
            contents=[copy.copy(container) for container in self._containers],
            values=[tensor.clone() for tensor in self._tensors],
            settings=_settings(),
        )
        numbers = random_state() if self._uses_random else []
        self._leave()

        def resume() -> None:
            self._enter()
            self._restore(state)
            if numbers:
                put_random_state(numbers)

        return resume

    def _enter(self) -> None:
        """Save the random state of the caller of a pass."""
        if self._uses_random:
            self._outer_random_state = random_state()

    def _leave(self) -> None:
        """Restore the start state, and the random state of the caller of the pass."""
        self._restore(self._start)
        if self._uses_random:
            put_random_state(self._outer_random_state)

    def _note(self, before: _Before) -> None:
        """Add the attributes and containers of a module that differ from those before the first pass."""
        module = before.module
        attributes = vars(module)
        new_names = attributes.keys() - before.attributes.keys()
        for name in (*before.attributes, *new_names):
            if name in _STRUCTURE or "hook" in name:
                continue
            start_value = before.attributes.get(name, _MISSING)
            is_assigned = attributes.get(name, _MISSING) is not start_value
            if is_assigned and self._is_new(module, name, "attribute"):
                self._attributes.append((module, name))
                self._start.attributes.append(start_value)
            content = before.contents.get(name)
            is_changed = content is not None and not _same(content, start_value)
            if is_changed and self._is_new(module, name, "content"):
                self._containers.append(start_value)
                self._start.contents.append(content)

    def _is_new(self, module: nn.Module, name: str, what: str) -> bool:
        """Return True at the first call with these arguments."""
        key = (id(module), name, what)
        if key in self._noted:
            return False
        self._noted.add(key)
        return True

    def _restore(self, state: _State) -> None:
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
    """Restore all attributes of a model's modules after the ``with`` block, also if it raises.

    Parameters, buffers and children are among them. The contents of dictionaries, lists and sets are
    restored too, but not those of containers within these.
    """
    states = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in states:
            for name, content in contents.items():
                refill(attributes[name], content)
            refill(vars(module), attributes)


def refill(container: Any, content: Any) -> None:
    """Replace the content of a dictionary, list or set by that of another."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return copies of the dictionaries, lists and sets among the attributes of a module."""
    contents = {}
    for name, value in vars(module).items():
        if isinstance(value, _CONTAINERS):
            contents[name] = copy.copy(value)
    return contents


def _child_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters and of the children that are not ``None``."""
    parameters = [name for name, value in module._parameters.items() if value is not None]
    children = [name for name, value in module._modules.items() if value is not None]
    return parameters, children


def _same(content: Any, container: Any) -> bool:
    """Return True if a container holds the same objects as the copy ``content`` of it."""
    if len(content) != len(container):
        return False
    if isinstance(content, set):
        return bool(content == container)
    if isinstance(content, dict):
        return all(key in container and container[key] is value for key, value in content.items())
    return all(one is other for one, other in zip(content, container, strict=True))


def _settings() -> list[Any]:
    return [get() for get, _ in _SETTINGS]


def random_state() -> list[Any]:
    """Return the random states of Python and of torch, of the CPU and, if CUDA is in use, of every CUDA device."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), torch.get_rng_state(), *cuda_states]


def put_random_state(state: list[Any]) -> None:
    """Set the random states that :func:`random_state` returned."""
    python_state, cpu_state, *cuda_states = state
    random.setstate(python_state)
    torch.set_rng_state(cpu_state)
    if cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)


def _equal(one: list[Any], other: list[Any]) -> bool:
    # Under FakeTensorMode, torch.equal would refuse the tensors of random states.
    with _disable_current_modes():
        return one[0] == other[0] and all(map(torch.equal, one[1:], other[1:]))
