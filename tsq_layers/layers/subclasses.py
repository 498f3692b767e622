"""Subclasses of torch's convolutions that do something around ``super().forward``, such as causal ones.

:func:`split_subclass` puts a plain convolution inside of such a layer: ``super().forward(x)`` in its own forward then
calls that. So it is the plain one that is observed and quantised, with the inputs that really reach it, and whatever
the subclass does before and after is done by its own code.

It is known from the source that nothing but ``super().forward`` uses the weight. A subclass for which that cannot be
told stays as it is, and is named.
"""

import functools
import types
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from tsq_layers.layers.composites import Composite, shallow_copy
from tsq_layers.layers.uses import goes_on_to_base

_INSIDE = "convolution"


class _Opened(nn.Module):
    """Comes after a subclass and before torch's class, in the order of resolution."""

    convolution: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``super().forward`` is."""
        return self.convolution(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """Of the convolution inside; dequantised, if that is packed."""
        weight: Tensor = self.convolution.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the convolution inside."""
        bias: nn.Parameter | None = self.convolution.bias  # type: ignore[assignment]
        return bias


def split_subclass(module: nn.Module) -> nn.Module:
    """The same layer with a plain convolution inside, which holds its weight and bias.

    Args:
        module: one that ``SUBCLASS`` matches; not modified.

    Returns:
        a copy. It shares the parameters, and everything else, with ``module``.

    Example:
        >>> class Causal(nn.Conv1d):
        ...     def forward(self, x):
        ...         return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))
        >>> split_subclass(Causal(4, 8, 3)).convolution
        Conv1d(4, 8, kernel_size=(3,), stride=(1,))
    """
    layer: Any = module
    split: Any = shallow_copy(module)
    split.__class__ = _class_around(type(module))  # type: ignore[arg-type]  # types are hashable
    weight, bias = split._parameters.pop("weight"), split._parameters.pop("bias")
    plain = _base(type(module))(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",  # made without memory
    )
    plain.weight, plain.bias = weight, bias
    split.add_module(_INSIDE, plain.train(module.training))
    return split  # type: ignore[no-any-return]


def _base(kind: type[nn.Module]) -> Any:
    """The class of torch that a layer's class derives from, ``None`` if it is no convolution."""
    return next((base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if issubclass(kind, base)), None)


@functools.cache
def _class_around(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with a convolution inside, for which ``super().forward`` is :meth:`_Opened.forward`."""
    opened = types.new_class("Opened", (_Opened, _base(kind)))

    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = kind.__module__
        namespace["__doc__"] = kind.__doc__
        # The class is in no module, where copies would look for it.
        namespace["__reduce_ex__"] = lambda self, protocol: (_empty, (kind,), vars(self))  # noqa: ARG005

    return types.new_class(kind.__name__, (kind, opened), {}, fill)


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = _class_around(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def _matches(module: nn.Module) -> bool:
    kind: Any = type(module)
    base, own = _base(kind), module._parameters
    if base is None or isinstance(module, (LazyModuleMixin, _Opened)) or "forward" in vars(module):
        return False  # a forward of this one module would go on to the module, not to its copy
    plain = kind._conv_forward is base._conv_forward and "_conv_forward" not in vars(module)
    alone = own.keys() == {"weight", "bias"} and own["weight"] is not None and not hasattr(module, _INSIDE)
    return plain and alone and kind.forward is not base.forward and _goes_on(kind)


@functools.cache
def _goes_on(kind: type[nn.Module]) -> bool:
    return goes_on_to_base(kind, _base(kind), ("weight", "bias"))


SUBCLASS = Composite(name="Subclass", matches=_matches, split=split_subclass)
"""Subclasses of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` that do something around ``super().forward``."""
