"""Find the layers of experts, which see only the tokens that are routed to them, and group them in pools.

The layers of a pool have the same shapes and place in their experts, so an expert with few tokens can
use the statistics of the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tsq_layers.layers.expert_weights import ExpertWeights


@dataclass(frozen=True)
class Pool:
    """The place of an expert's layer among the corresponding layers of the other experts.

    Args:
        name: dotted name of these layers, with ``*`` for the number of the expert.
        family: dotted name of the module that holds all experts.
        expert: number of the expert.
        in_order: whether the family is known to call its experts in the order of their numbers.
    """

    name: str
    family: str
    expert: int
    in_order: bool


def expert_pool(name: str, modules: Mapping[str, nn.Module]) -> Pool | None:
    """Return the pool of a layer, or ``None`` if it is not a layer of an expert.

    Experts are the items of a ``ModuleList`` with "expert" in its name or in that of its class, or the
    matrices of a fused parameter of a module with such a name.

    Args:
        name: dotted name of the layer.
        modules: all modules of the model by name.

    Example:
        >>> expert = nn.ModuleDict({"up": nn.Linear(2, 2)})
        >>> model = nn.ModuleDict({"experts": nn.ModuleList([expert])})
        >>> expert_pool("experts.0.up", dict(model.named_modules()))
        Pool(name='experts.*.up', family='experts', expert=0, in_order=False)
    """
    parts = name.split(".")
    for index in range(len(parts) - 1, 0, -1):
        holder = ".".join(parts[:index])
        module = modules.get(holder)
        if not parts[index].isdecimal() or not isinstance(module, nn.ModuleList):
            continue
        # A fused parameter that was split is a list itself, so a module has one list for each weight.
        is_fused = isinstance(module, ExpertWeights)
        family = holder.rpartition(".")[0] if is_fused else holder
        names = f"{family.rpartition('.')[2]} {type(modules[family]).__name__}"
        if "expert" in names.lower():
            pattern = ".".join([*parts[:index], "*", *parts[index + 1 :]])
            return Pool(pattern, family, int(parts[index]), in_order=is_fused)
    return None
