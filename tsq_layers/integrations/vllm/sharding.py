"""The share of a packed layer that one process of a tensor-parallel server runs.

A layer is cut into rows (outputs) or columns (inputs). Rows of the packed buffers are rows of the
weight. Columns are interleaved in the words (:mod:`tsq_layers.numerics.packing`), so they are unpacked, cut
and packed again: exactly, once, at loading. A cut must not part a group or a block of the rotation.

Buffers are those of :class:`~tsq_layers.runtime.storage.PackedStorage`, one at a time, by name: a
process keeps its share of each as the file is read. A layer in full precision has one, ``"weight"``.

Shapes: N rows, K columns, G groups a row.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.errors import ConfigError
from tsq_layers.numerics import packing
from tsq_layers.numerics.weight import BufferSpec
from tsq_layers.runtime.spec import LayerSpec


class Span(NamedTuple):
    """Neighbouring rows or columns."""

    start: int
    length: int


class Cut(NamedTuple):
    """The share of a layer that a process runs.

    Args:
        rows: spans of rows, one after another; ``None`` is all of them.
        columns: a span of columns; ``None`` is all of them.
        padding: rows of zeros behind the others.
    """

    rows: tuple[Span, ...] | None = None
    columns: Span | None = None
    padding: int = 0


def row_spans(
    sizes: list[int], wholes: list[int], rank: int, ranks: int
) -> tuple[Span, ...] | None:
    """The rows that process ``rank`` of ``ranks`` runs of matrices that the file holds one below the other.

    A matrix with fewer heads than there are processes is run by several of them.

    Args:
        sizes: rows that a process runs of each matrix.
        wholes: rows that the file holds of each.
        rank: number of the process.
        ranks: processes.

    Returns:
        Spans in the rows of the file; ``None`` if that is all of them.

    Example:
        >>> row_spans([4, 2], [8, 2], rank=1, ranks=2)  # two processes, one head of 2 rows for both
        (Span(start=4, length=4), Span(start=8, length=2))
    """
    if sizes == wholes:
        return None
    spans, first = [], 0
    for size, whole in zip(sizes, wholes, strict=True):
        spans.append(Span(first + rank * (whole // size) // ranks * size, size))
        first += whole
    return tuple(spans)


def share_of(name: str, spec: LayerSpec, cut: Cut) -> LayerSpec:
    """The specification of a share.

    Args:
        name: of the layer, for the message.
        spec: of the whole layer.
        cut: what of it.

    Raises:
        ConfigError: the cut parts a group or a block of the rotation, or the layer has a sparse part.

    Example:
        >>> from tsq_layers.numerics.weight import WeightFormat
        >>> weight_format = WeightFormat(bits=4, group_size=32, grid="symmetric")
        >>> spec = LayerSpec(in_features=64, out_features=8, format=weight_format, bias=False, dtype="float32")
        >>> share = share_of("down", spec, Cut(columns=Span(32, 32)))
        >>> share.in_features, share.out_features
        (32, 8)
    """
    if cut == Cut():
        return spec
    if spec.format.has_outliers:
        raise ConfigError(
            f"layer {name!r} has a sparse part, which tensor parallelism cannot split: serve it "
            "with tensor_parallel_size=1, or quantise without outliers"
        )
    rows = spec.out_features if cut.rows is None else sum(span.length for span in cut.rows)
    spec = dataclasses.replace(spec, out_features=rows + cut.padding)
    if cut.columns is None:
        return spec
    columns = cut.columns.length
    _check_columns(name, spec, cut.columns)
    form = spec.format
    if form.group_size is not None and form.group_size >= spec.in_features:
        form = dataclasses.replace(form, group_size=columns)
    return dataclasses.replace(spec, in_features=columns, format=form)


def _check_columns(name: str, spec: LayerSpec, columns: Span) -> None:
    """Cuts may be where groups and blocks of the rotation end: all start there, and all but the last end there."""
    at_end = columns.start + columns.length == spec.in_features
    for what, step in spec.format.borders(spec.in_features).items():
        if columns.start % step or (columns.length % step and not at_end):
            raise ConfigError(
                f"layer {name!r} has {what} of {step} columns, which its share of {columns.length} "
                f"of {spec.in_features} columns would part: "
                f"choose a tensor_parallel_size whose shares are multiples of {step}, or quantise "
                f"with a size that divides {columns.length}"
            )


def part(key: str, tensor: Tensor, spec: LayerSpec | None, cut: Cut) -> Tensor:
    """The share of one buffer.

    Args:
        key: its name.
        tensor: as the file holds it, of the whole layer.
        spec: of the whole layer; ``None`` of one in full precision.
        cut: what of it.

    Returns:
        The same buffer of the layer that :func:`share_of` describes, contiguous.

    Example:
        >>> weight = torch.arange(6.0).view(3, 2)
        >>> part("weight", weight, None, Cut(rows=(Span(2, 1),), padding=1))
        tensor([[4., 5.],
                [0., 0.]])
    """
    if spec is None:
        stored = BufferSpec(shape=tuple(tensor.shape), dtype=tensor.dtype, axes=("rows", "columns"))
    else:
        stored = spec.buffers()[key]
    if cut.columns is not None:
        tensor = _columns(tensor, stored, spec, cut.columns)
    if not stored.has_rows:
        return tensor.contiguous()
    if cut.rows is not None:
        tensor = torch.cat([tensor.narrow(0, *span) for span in cut.rows])
    if cut.padding:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, cut.padding))
    return tensor.contiguous()


def _columns(tensor: Tensor, stored: BufferSpec, spec: LayerSpec | None, columns: Span) -> Tensor:
    """The share of some columns, or of their groups, of a buffer."""
    total, share = tensor.shape[-1], columns
    if spec is not None:
        total = spec.in_features
    axis = "columns"
    if spec is not None and "groups" in stored.axes:
        if spec.format.has_one_group(spec.in_features):
            return tensor  # one group or table, which every share of the row has
        axis = "groups"
        total = spec.format.groups(spec.in_features)
        first = columns.start // spec.format.group_columns(spec.in_features)
        share = Span(first, spec.format.groups(columns.length))
    if axis not in stored.axes:
        return tensor
    if stored.packed is None:
        return tensor.narrow(stored.axes.index(axis), *share)
    codes = packing.unpack(tensor, stored.packed, total)
    return packing.pack(codes.narrow(1, *share), stored.packed)
