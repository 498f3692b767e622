"""What a composite is: a module with several weights, which shows itself as plain layers; and replacing modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

# The same dictionaries, not copies: whoever keeps a handle can still remove the hook.
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
    """A module that uses its weights without calling a layer for each, such as ``nn.MultiheadAttention``.

    ``prepare`` puts the split module in its place, ``unprepare`` puts the original back, and
    ``convert`` swaps the layers inside.

    Args:
        name: how reports call it.
        matches: whether a module is of this kind.
        split: module → a new module that computes the same by calling plain layers, which share the
            memory of the module's parameters. The module itself is not modified.
        always: split it even where none of its layers is to be quantised, because other modules
            would pass it by otherwise.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    split: Callable[[nn.Module], nn.Module]
    always: bool = False


def split_of(composite: Composite, module: nn.Module) -> nn.Module:
    """The split form of a module; :func:`composite_behind` tells what it is."""
    split = composite.split(module)
    take_over_mode(split, module)
    # The name alone: a copy of the model would take the functions of users along.
    vars(split)["_tsq_composite"] = composite.name
    return split


def take_over_mode(module: nn.Module, other: nn.Module) -> None:
    """Put a module and what it holds into training or evaluation mode like ``other`` and what has the same name there.

    What ``other`` has none of is in the mode of ``other`` itself.
    """
    others = dict(other.named_modules())
    for name, part in module.named_modules():
        part.training = others.get(name, other).training


def composite_behind(module: nn.Module) -> str | None:
    """The name of the composite that a module is the split form of, or ``None``."""
    return vars(module).get("_tsq_composite")


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules by identity, wherever they hang; returns the new root.

    What takes a module's place has its hooks too, those that anybody may have put there.
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
    """Let ``other`` have the hooks of ``module`` too."""
    attributes = vars(module)
    vars(other).update({name: attributes[name] for name in _HOOKS if attributes.get(name)})
