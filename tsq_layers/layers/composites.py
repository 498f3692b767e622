"""Define :class:`Composite`, a module with several weights that is split into plain layers, and replace modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

# Attributes of a module that hold its hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True, kw_only=True)
class Composite:
    """A kind of module that uses several weights without calling a layer for each, such as ``nn.MultiheadAttention``.

    Give it to :func:`register`. ``prepare`` replaces the module by its split form, ``unprepare``
    restores it, and ``convert`` replaces the layers inside of the split form.

    Args:
        name: name in reports and checkpoints.
        matches: module → True if it is of this kind.
        split: module → a new module that computes the same by calling plain layers, which share the
            memory of the module's parameters. It must not modify the module.
        always: split it also if none of its layers is to be quantised, because other modules would
            read its parameters otherwise instead of calling it.

    Example:
        >>> class Pair(nn.Module):
        ...     def __init__(self, first, second):
        ...         super().__init__()
        ...         self.first, self.second = first, second
        ...     def forward(self, x):
        ...         return x @ self.first.T @ self.second.T
        >>> def split(module):
        ...     layers = []
        ...     for weight in (module.first, module.second):
        ...         layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        ...         layer.weight = weight
        ...         layers.append(layer)
        ...     return nn.Sequential(*layers)
        >>> pair = Composite(name="Pair", matches=lambda module: type(module) is Pair, split=split)
    """

    name: str
    matches: Callable[[nn.Module], bool]
    split: Callable[[nn.Module], nn.Module]
    always: bool = False


def split_of(composite: Composite, module: nn.Module) -> nn.Module:
    """Return the split form of a module, in the same mode; :func:`composite_behind` returns its name.

    Args:
        composite: the composite that ``module`` is.
        module: not modified.
    """
    split_form = composite.split(module)
    take_over_mode(split_form, module)
    # Only the name: a composite holds functions of the user, which need not be copyable.
    vars(split_form)["_tsq_composite"] = composite.name
    return split_form


def take_over_mode(module: nn.Module, other: nn.Module) -> None:
    """Set each module inside of ``module`` to the training or evaluation mode of the one of the same name in ``other``.

    A module whose name ``other`` does not have gets the mode of ``other`` itself.
    """
    counterparts = dict(other.named_modules())
    for name, child in module.named_modules():
        child.training = counterparts.get(name, other).training


def composite_behind(module: nn.Module) -> str | None:
    """Return the name of the composite that a module is the split form of, or ``None``."""
    return vars(module).get("_tsq_composite")


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules of a model, under every name that they have.

    Replacements also get the hooks of the modules that they replace.

    Args:
        model: changed in place.
        replacements: module → what replaces it; modules are compared by identity.

    Returns:
        the model, or its replacement.
    """
    for module, other in replacements.items():
        share_hooks(module, other)
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return model


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give ``other`` the hooks of ``module``.

    Both share the dictionaries of hooks, so a handle that a user holds still removes its hook.
    """
    for name in _HOOKS:
        hooks = vars(module).get(name)
        if hooks:
            vars(other)[name] = hooks
