"""Fused experts: modules that hold many linear layers in one 3-D parameter, shown as linear layers.

Mixtures of experts of transformers 5 keep the weights of all E experts of a block in one parameter
(E, out, in) or (E, in, out), and multiply by ``self.gate_up_proj[expert]`` or by all at once.
:func:`split_experts` puts a :class:`ExpertWeights` of E ``nn.Linear`` layers in the place of such a
parameter and leaves everything else of the module as it is, its forward included: what the forward
multiplies by calls the layers. Biases, which it adds itself, stay parameters.

A parameter is split if the source of the forward says that it is only multiplied by, and how:
``F.linear(x, self.weight[i])``, ``x @ self.weight[i]``, ``torch.bmm(x, self.weight)`` and their
likes; see :mod:`tsq_layers.layers.source`. So no list of architectures is needed. Of transformers 5.23
these are all experts but those listed here: ``DbrxExpertGLU`` (its parameters are 2-D and cut up by
another module) and ``OpenAIPrivacyFilterExperts`` in other dtypes than float32 (it computes in
float32 with a copy of its weights). They stay as they are, like any module whose forward does
something else with its weights or has no source that could be read.

The classes that transformers runs in one of several ways (``experts_implementation``) run in the one
called "eager": only the experts that tokens are routed to are called.
"""

import copy
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from tsq_layers.layers.composites import Composite
from tsq_layers.layers.expert_weights import ExpertWeights
from tsq_layers.layers.source import Product, products

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def split_experts(module: nn.Module) -> nn.Module:
    """The same module with :class:`ExpertWeights` in the place of its 3-D weights.

    Args:
        module: one that ``EXPERTS`` matches; not modified.

    Returns:
        a copy of the same class. It shares the memory of the parameters, and everything else with ``module``.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4)
        >>> split = split_experts(MixtralExperts(config))
        >>> split.gate_up_proj.shape, split.gate_up_proj.get_submodule("3")
        (torch.Size([4, 32, 8]), Linear(in_features=8, out_features=32, bias=False))
    """
    split = copy.copy(module)
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(split).update({name: copy.copy(vars(module)[name]) for name in own})
    for name, transposed in _weights(module).items():
        weight = split._parameters.pop(name)
        assert weight is not None
        split.add_module(name, ExpertWeights(weight, transposed=transposed))
    if _has_implementations(module):
        config: Any = copy.deepcopy(module.config)
        config._experts_implementation = "eager"
        split.config = config
    return split


def _weights(module: nn.Module) -> dict[str, bool]:
    """The 3-D parameters that the forward only multiplies by → whether they are (E, in, out)."""
    own = {
        name: weight
        for name, weight in module._parameters.items()
        if weight is not None and _is_stack(weight)
    }
    forward = _eager_forward(module)
    if not own or forward is None or "forward" in vars(module):
        return {}
    uses = products(forward, type(module))
    return {
        name: next(iter(uses[name])).transposed
        for name, weight in own.items()
        if name in uses and _is_sound(uses[name], weight)
    }


def _is_stack(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and weight.dim() == 3 and weight.dtype in _DTYPES


def _is_sound(uses: Iterable[Product], weight: nn.Parameter) -> bool:
    """One way round, and no other dtype than its own."""
    turns, floats = {use.transposed for use in uses}, any(use.as_float for use in uses)
    return len(turns) == 1 and (weight.dtype == torch.float32 or not floats)


def _eager_forward(module: nn.Module) -> FunctionType | None:
    """The forward that runs in the split module."""
    forward: Any = type(module).forward
    if _has_implementations(module):
        forward = forward.__wrapped__
    return forward if isinstance(forward, FunctionType) else None


def _has_implementations(module: nn.Module) -> bool:
    """Whether ``use_experts_implementation`` of transformers chooses its forward, by ``config``."""
    forward = type(module).forward
    known = getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers.")
    return (
        known
        and hasattr(forward, "__wrapped__")
        and {"config", "is_transposed"} <= vars(module).keys()
    )


EXPERTS = Composite(
    name="Experts", matches=lambda module: bool(_weights(module)), split=split_experts
)
