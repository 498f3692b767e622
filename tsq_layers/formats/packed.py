"""A layer that a foreign checkpoint holds packed, and what the readers of all formats share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from tsq_layers.errors import CheckpointError
from tsq_layers.numerics.grid import group_count
from tsq_layers.numerics.weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A layer that a checkpoint holds packed.

    Args:
        name: dotted name.
        keys: all tensors of it, but a bias.
        read: its weight. All that a file may get wrong is checked there.
    """

    name: str
    keys: frozenset[str]
    read: Callable[[], QuantizedWeight]


def refuse(name: str, what: str) -> NoReturn:
    """Raise :class:`~tsq_layers.errors.CheckpointError` about a layer."""
    raise CheckpointError(f"layer {name!r} of the checkpoint: {what}")


def group_size_of(name: str, columns: int, groups: int, given: int | None) -> int:
    """Columns of a group: as given, if the number of scales agrees; a single group is the whole row.

    Raises:
        CheckpointError: the number of groups belongs to another size.

    Example:
        >>> group_size_of("up", 96, 3, 32), group_size_of("up", 96, 1, None), group_size_of("up", 100, 4, 32)
        (32, 96, 32)
    """
    if groups == 1 and (given is None or given <= 0 or given >= columns):
        return columns
    if given is None or given <= 0 or group_count(columns, given) != groups:
        refuse(
            name,
            f"{groups} groups of {columns} columns do not fit the group size {given} of its configuration",
        )
    return given


def check_order(name: str, groups_K: Tensor | None, group_size: int, cure: str) -> None:
    """Refuse columns that are in groups by another rule than their order.

    Args:
        groups_K: the group of each column, an integer (K,); ``None``, or all −1, where that is the order.

    Raises:
        CheckpointError: a column in another group.
    """
    if groups_K is None or bool((groups_K == -1).all()):
        return
    expected = torch.arange(groups_K.numel(), device=groups_K.device) // group_size
    if not torch.equal(groups_K.to(torch.int64), expected):
        refuse(
            name,
            f"its columns are in groups by activation order, and groups here are neighbouring columns: {cure}",
        )


def weight_of(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
) -> QuantizedWeight:
    """Codes and grids, symmetric if all zero points are 2^(b−1)."""
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    return QuantizedWeight(
        codes, scales.contiguous(), zeros.contiguous(), bits, group_size, symmetric
    )
