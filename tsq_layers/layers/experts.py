"""Define the composite of fused experts: modules that hold many linear layers in one 3-D parameter.

Mixtures of experts of transformers 5 keep the weights of all E experts of a block in one parameter,
(E, out, in) or (E, in, out), and multiply by ``self.gate_up_proj[expert]`` or by all at once.
:func:`split_experts` replaces such a parameter by :class:`ExpertWeights`, a list of E ``nn.Linear``
layers, and leaves everything else of the module, its forward included. The products of the forward
then call the layers. Biases, which the forward adds itself, remain parameters.

A parameter is split if the source code of the forward shows that it is only multiplied by, and how:
``F.linear(x, self.weight[i])``, ``x @ self.weight[i]``, ``torch.bmm(x, self.weight)`` and the like; see
:mod:`tsq_layers.layers.source`. So no list of architectures is needed. Of transformers 5.23 these are
all experts except ``DbrxExpertGLU``, whose parameters are 2-D and cut up by another module, and
``OpenAIPrivacyFilterExperts`` in other dtypes than float32, which computes with a float32 copy of its
weights. These remain as they are, as does any module whose forward does something else with its
weights, or whose source cannot be read.

Classes with several implementations (``experts_implementation`` of transformers) run the one called
"eager", which calls only the experts that tokens are routed to.
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
    """Return a copy of a module whose 3-D weights are replaced by :class:`ExpertWeights`.

    Args:
        module: a module that ``EXPERTS`` matches, which is not modified.

    Returns:
        a module of the same class, which shares the memory of the parameters and all other attributes.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4)
        >>> split = split_experts(MixtralExperts(config))
        >>> split.gate_up_proj.shape, split.gate_up_proj.get_submodule("3")
        (torch.Size([4, 32, 8]), Linear(in_features=8, out_features=32, bias=False))
    """
    split_form = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(split_form)[name] = copy.copy(vars(module)[name])
    for name, transposed in _weights(module).items():
        weight = split_form._parameters.pop(name)
        assert weight is not None
        split_form.add_module(name, ExpertWeights(weight, transposed=transposed))
    if _has_implementations(module):
        config: Any = copy.deepcopy(module.config)
        config._experts_implementation = "eager"
        split_form.config = config
    return split_form


def _weights(module: nn.Module) -> dict[str, bool]:
    """Return the names of the 3-D parameters that are split, and True for those that are (E, in, out)."""
    stacks = {name: weight for name, weight in module._parameters.items() if _is_stack(weight)}
    forward = _eager_forward(module)
    if not stacks or forward is None or "forward" in vars(module):
        return {}
    uses = products(forward, type(module))
    weights: dict[str, bool] = {}
    for name, weight in stacks.items():
        if weight is not None and name in uses and _is_sound(uses[name], weight):
            weights[name] = next(iter(uses[name])).transposed
    return weights


def _is_stack(weight: nn.Parameter | None) -> bool:
    return type(weight) is nn.Parameter and weight.dim() == 3 and weight.dtype in _DTYPES


def _is_sound(uses: Iterable[Product], weight: nn.Parameter) -> bool:
    """Return True if all products take the weight in the same layout and in its own dtype."""
    layouts = {use.transposed for use in uses}
    needs_float32 = any(use.as_float for use in uses)
    return len(layouts) == 1 and (weight.dtype == torch.float32 or not needs_float32)


def _eager_forward(module: nn.Module) -> FunctionType | None:
    """Return the forward that runs in the split module, or ``None`` if it has no source."""
    forward: Any = type(module).forward
    if _has_implementations(module):
        forward = forward.__wrapped__
    return forward if isinstance(forward, FunctionType) else None


def _has_implementations(module: nn.Module) -> bool:
    """Return True if ``use_experts_implementation`` of transformers chooses the forward by ``config``."""
    forward = type(module).forward
    source = getattr(forward, "__globals__", {}).get("__name__", "")
    if not source.startswith("transformers.") or not hasattr(forward, "__wrapped__"):
        return False
    return {"config", "is_transposed"} <= vars(module).keys()


EXPERTS = Composite(
    name="Experts", matches=lambda module: bool(_weights(module)), split=split_experts
)
"""Modules with 3-D weights that their forward only multiplies by."""
