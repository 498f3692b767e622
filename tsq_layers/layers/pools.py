"""Experts: layers of which each sees only the tokens that are routed to it, and that can lend one another statistics."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tsq_layers.layers.expert_weights import ExpertWeights


@dataclass(frozen=True)
class Pool:
    """The place of an expert's layer among its fellows.

    Attributes:
        name: what the corresponding layers of all experts have in common, with ``*`` for the expert.
        family: the module that holds all experts.
        expert: number of the expert.
        in_order: whether the family is known to go through its experts by number.
    """

    name: str
    family: str
    expert: int
    in_order: bool


def expert_pool(name: str, modules: Mapping[str, nn.Module]) -> Pool | None:
    """The pool of the layer called ``name``, or ``None`` if it is not an expert's.

    Experts are the items of a ``ModuleList``, or the parts of a fused parameter, of which the holder has
    "expert" in its name or in that of its class.

    Args:
        name: dotted name of the layer.
        modules: all modules of the model by name.

    Example:
        >>> model = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 2)})])})
        >>> expert_pool("experts.0.up", dict(model.named_modules()))
        Pool(name='experts.*.up', family='experts', expert=0, in_order=False)
    """
    parts = name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        holder = ".".join(parts[:place])
        module = modules.get(holder)
        if not parts[place].isdecimal() or not isinstance(module, nn.ModuleList):
            continue
        of_one_weight = isinstance(
            module, ExpertWeights
        )  # a fused parameter, split: one such list for each weight
        family = holder.rpartition(".")[0] if of_one_weight else holder
        if "expert" in f"{family.rpartition('.')[2]} {type(modules[family]).__name__}".lower():
            pattern = ".".join([*parts[:place], "*", *parts[place + 1 :]])
            return Pool(pattern, family, int(parts[place]), in_order=of_one_weight)
    return None
