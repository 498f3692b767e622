"""Define a packed weight: the frozen value of its format, and the tensors that hold it.

A weight of N rows and K columns is codes, grids that give the codes their values, and additions: another
basis of the input, a sparse part, rounded inputs. :class:`WeightFormat` names all of it once. It also says
how the weight is stored: nobody else computes a number of words, groups or bytes.

``GRIDS`` holds what differs between the kinds of grids. A new kind is an entry there, a function for its
values in :data:`tsq_layers.runtime.kernels.MATRICES`, and a writer in :mod:`tsq_layers.runtime.storage`; a
kernel of its own is one more entry, where it is worth one. An entry gives *all* of its stored tensors, so
that a kind need not have groups, nor words of whole codes. Codes of a trellis, for example, are a stream of
exactly k bits a weight whose states overlap, with one scale a row: such an entry answers a buffer of N·K·k/32
words and one of N scales, says ``groups=False``, and is spelled ``{"grid": "trellis"}`` in files. Scales may
have either sign; no kind assumes that they are positive.

Shapes: N rows, K columns, G groups a row, W words a row, T tables a row, E entries and C columns of the sparse part.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypedDict

import torch

from tsq_layers.errors import LayerError
from tsq_layers.numerics import packing
from tsq_layers.numerics.grid import group_count
from tsq_layers.numerics.memory import dtype_name

GridKind = Literal["symmetric", "zero_points", "offsets", "row_tables", "group_tables"]
"""Kinds of grids, which give codes their values; the keys of ``GRIDS``."""

Axis = Literal["rows", "columns", "groups", "levels", "entries", "outlier_columns"]
"""What an axis of a stored tensor counts."""

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLE_BITS = 4
"""The widest codes of a look-up table: its 16 levels stay in registers."""

BUFFER_NAMES = (
    "words",
    "scale_bits",
    "zero_words",
    "offset_bits",
    "table_bits",
    "rotation_signs",
    "column_scale_bits",
    "outlier_bits",
    "outlier_places",
)
"""Names of all tensors that a packed weight can have, in the order in which they are stored."""

_FLOAT32_ONE = 0x3F800000  # the bits of 1.0


@dataclass(frozen=True, kw_only=True)
class BufferSpec:
    """The shape and dtype of one stored tensor.

    Args:
        shape: of the tensor.
        dtype: of the tensor. Floating-point values are stored as integers of the same bits, so that no change of
            dtype of a module touches them.
        axes: what each axis counts.
        packed: width of the codes that are packed along the last axis, which then counts words; ``None`` if each
            entry is a value.
        fill: value of each entry before the tensor is loaded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[Axis, ...]
    packed: int | None = None
    fill: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_rows(self) -> bool:
        """Return whether the rows of the tensor are rows of the weight."""
        return self.axes[0] == "rows"


class FormatKeywords(TypedDict, total=False):
    """The properties of a packed weight as keywords of :class:`~tsq_layers.QuantLinear`.

    ``bits`` and ``group_size`` are required. ``symmetric``, ``offsets`` and ``tables`` together, or ``grid``, say
    which kind of grid it is; the others are fields of :class:`WeightFormat`.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype
    offsets: bool
    tables: Literal["row", "group"] | None
    grid: GridKind | None
    rotation: int | None
    channel_scaling: bool
    outliers: int
    outlier_columns: int
    activation_bits: int | None


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The format of a packed weight: widths, grids and additions of an (N, K) matrix, but not its shape.

    Args:
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, an offset or a table; ``None`` for the whole row.
        grid: kind of the grid. ``"symmetric"``: scales · (codes − 2^(bits−1)). ``"zero_points"``:
            scales · (codes − zeros), integers. ``"offsets"``: scales · codes + offsets. ``"row_tables"`` and
            ``"group_tables"``: table[code], a table for each row or each group.
        scale_dtype: float16, bfloat16 or float32; of scales, offsets, tables and the sparse part.
        rotation: largest block of input columns that is rotated, a power of two; ``None`` is no rotation.
        channel_scaling: input columns are scaled.
        outliers: E, entries of the sparse part.
        outlier_columns: C, whole columns of the sparse part; at most one of the two is not 0.
        activation_bits: 8 rounds inputs too; ``None`` does not.

    Raises:
        LayerError: a value that is not allowed, or two that exclude each other.

    Example:
        >>> weight_format = WeightFormat(bits=3, group_size=32, grid="offsets")
        >>> for name, spec in weight_format.buffers(8, 64).items():
        ...     print(name, spec.shape, spec.dtype)
        words (8, 6) torch.int32
        scale_bits (8, 2) torch.int16
        offset_bits (8, 2) torch.int16
        >>> weight_format.bits_per_weight(8, 64)
        4.0
    """

    bits: int
    group_size: int | None = None
    grid: GridKind = "zero_points"
    scale_dtype: torch.dtype = torch.float16
    rotation: int | None = None
    channel_scaling: bool = False
    outliers: int = 0
    outlier_columns: int = 0
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise LayerError(f"group_size={self.group_size}: give a positive integer")
        if not 1 <= self.bits <= 8:
            raise LayerError(f"bits={self.bits}: give 1 to 8")
        if self.scale_dtype not in SCALE_DTYPES:
            raise LayerError(f"scale_dtype={self.scale_dtype}: give float16, bfloat16 or float32")
        if self.grid not in GRIDS:
            raise LayerError(f"grid={self.grid!r}: give one of {', '.join(map(repr, GRIDS))}")
        if self.has_tables and self.bits > TABLE_BITS:
            raise LayerError(
                f"bits={self.bits}: look-up tables are of codes of 1 to {TABLE_BITS} bits; "
                "give one of these, or scales"
            )
        self._check_additions()

    def _check_additions(self) -> None:
        rotation = self.rotation
        if rotation is not None and (rotation < 1 or rotation & (rotation - 1)):
            raise LayerError(f"rotation={rotation}: give a power of two, or None")
        counts = (self.outliers, self.outlier_columns)
        if min(counts) < 0 or all(counts):
            raise LayerError(
                f"outliers={self.outliers}, outlier_columns={self.outlier_columns}: "
                "give one of them, the other 0"
            )
        if self.activation_bits not in (None, 8):
            raise LayerError(f"activation_bits={self.activation_bits}: give 8, or None")

    @classmethod
    def of(
        cls,
        *,
        bits: int,
        group_size: int | None,
        symmetric: bool = False,
        offsets: bool = False,
        tables: Literal["row", "group"] | None = None,
        grid: GridKind | None = None,
        **others: Any,
    ) -> Self:
        """Make a format from the keywords of :class:`FormatKeywords`.

        Raises:
            LayerError: as for the class.

        Example:
            >>> WeightFormat.of(bits=2, group_size=64, tables="row").grid
            'row_tables'
        """
        kind = grid or kind_of_grid(symmetric=symmetric, offsets=offsets, tables=tables)
        return cls(bits=bits, group_size=group_size, grid=kind, **others)

    def to_dict(self) -> dict[str, Any]:
        """The keywords of :meth:`of` as plain JSON values. Those that have a default are left out where they have it.

        Example:
            >>> WeightFormat(bits=2, group_size=64, grid="row_tables", rotation=16).to_dict()
            {'bits': 2, 'group_size': 64, 'symmetric': False, 'scale_dtype': 'float16', 'tables': 'row', 'rotation': 16}
        """
        keywords = dict(GRIDS[self.grid].keywords)
        values = {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": keywords.pop("symmetric", False),
            "scale_dtype": dtype_name(self.scale_dtype),
            **keywords,
        }
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in (*values, "grid") and value != item.default:
                values[item.name] = value
        return values

    def for_columns(self, columns: int) -> Self:
        """The same format with the size of a group as a number: K where it was ``None``."""
        if self.group_size is not None or not GRIDS[self.grid].groups:
            return self
        return replace(self, group_size=columns)

    # --- properties of the grid ------------------------------------------------------------------

    @property
    def symmetric(self) -> bool:
        """Return whether the zero points are the constant 2^(bits−1) and not stored."""
        return self.grid == "symmetric"

    @property
    def has_zero_points(self) -> bool:
        """Return whether grids are scales with integer zero points, stored or constant."""
        return GRIDS[self.grid].zero_points

    @property
    def has_offsets(self) -> bool:
        """Return whether there are float offsets in the place of zero points."""
        return self.grid == "offsets"

    @property
    def tables(self) -> Literal["row", "group"] | None:
        """The part of a weight that has a look-up table of its own."""
        return GRIDS[self.grid].tables

    @property
    def has_tables(self) -> bool:
        """Return whether there are look-up tables in the place of scales."""
        return GRIDS[self.grid].tables is not None

    @property
    def has_outliers(self) -> bool:
        """Return whether there is a sparse part."""
        return self.outliers > 0 or self.outlier_columns > 0

    @property
    def has_basis(self) -> bool:
        """Return whether codes and sparse part are for the input in another basis."""
        return self.rotation is not None or self.channel_scaling

    @property
    def is_plain(self) -> bool:
        """Return whether the weight is codes and grids, and nothing else."""
        return not (self.has_basis or self.has_outliers or self.activation_bits is not None)

    @property
    def plain(self) -> Self:
        """The same codes and grids without a basis, a sparse part or rounded inputs."""
        if self.is_plain:
            return self
        return type(self)(
            bits=self.bits, group_size=self.group_size, grid=self.grid, scale_dtype=self.scale_dtype
        )

    # --- what is stored --------------------------------------------------------------------------

    def group_columns(self, columns: int) -> int:
        """Columns that share a scale or a table, at least K where the whole row does."""
        if self.group_size is None or self.grid == "row_tables":
            return columns
        return self.group_size

    def groups(self, columns: int) -> int:
        """G, the groups of a row of K columns."""
        return group_count(columns, self.group_columns(columns))

    def has_one_group(self, columns: int) -> bool:
        """Return whether a row of K columns has one scale or one table."""
        return self.group_columns(columns) >= columns

    def borders(self, columns: int) -> dict[str, int]:
        """Return units of neighbouring columns that must not be parted: name → number of columns.

        Example:
            >>> WeightFormat(bits=4, group_size=32, rotation=64).borders(128)
            {'groups': 32, 'blocks of the rotation': 64}
        """
        sizes = {}
        if not self.has_one_group(columns):
            sizes["groups"] = self.group_columns(columns)
        if self.rotation is not None:
            sizes["blocks of the rotation"] = self.rotation
        return sizes

    def buffers(self, rows: int, columns: int) -> dict[str, BufferSpec]:
        """Every stored tensor of an (N, K) weight, by its name.

        Args:
            rows: N.
            columns: K.

        Raises:
            LayerError: N or K is not positive.
        """
        for name, count in (("in_features", columns), ("out_features", rows)):
            if count < 1:
                raise LayerError(f"{name}={count}: give a positive integer")
        specs = GRIDS[self.grid].buffers(self, rows, columns)
        for addition in _ADDITIONS:
            specs |= addition(self, rows, columns)
        return specs

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of all stored tensors of an (N, K) weight."""
        return sum(spec.nbytes for spec in self.buffers(rows, columns).values())

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits for each of the N·K entries of a weight."""
        return self.nbytes(rows, columns) * 8 / (rows * columns)


def kind_of_grid(*, symmetric: bool, offsets: bool, tables: str | None) -> GridKind:
    """The kind of grid that three keywords name.

    Raises:
        LayerError: they exclude one another, or ``tables`` is unknown.

    Example:
        >>> kind_of_grid(symmetric=True, offsets=False, tables=None)
        'symmetric'
    """
    if tables not in (None, "row", "group"):
        raise LayerError(f"tables={tables!r}: give 'row', 'group' or None")
    if offsets and tables:
        raise LayerError("a weight has float offsets or look-up tables, not both; give one of them")
    if symmetric and (offsets or tables):
        name = "float offsets" if offsets else "look-up tables"
        raise LayerError(
            f"a weight with {name} has no zero points that could be symmetric; give symmetric=False"
        )
    if tables:
        return "row_tables" if tables == "row" else "group_tables"
    if offsets:
        return "offsets"
    return "symmetric" if symmetric else "zero_points"


def bits_dtype(scale_dtype: torch.dtype) -> torch.dtype:
    """The integer dtype that holds the bits of scales."""
    return torch.int32 if scale_dtype.itemsize == 4 else torch.int16


# --- kinds of grids ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The properties of a kind of grid.

    Args:
        keywords: of :class:`FormatKeywords` that name the kind; files hold them too.
        buffers: (format, N, K) → the stored tensors of codes and grids.
        grids: name of the tensor with the scales or tables.
        shifts: name of the tensor with what else there is for each group or row; ``None`` if there is none.
        float_shifts: whether those are the bits of numbers in the dtype of the scales.
        zero_points: whether values are scales · (codes − integers).
        tables: what has a look-up table of its own.
        groups: whether columns are in groups.
    """

    keywords: Mapping[str, Any]
    buffers: Callable[[WeightFormat, int, int], dict[str, BufferSpec]]
    grids: str = "scale_bits"
    shifts: str | None = None
    float_shifts: bool = False
    zero_points: bool = False
    tables: Literal["row", "group"] | None = None
    groups: bool = True


def _words(form: WeightFormat, rows: int, count: int, axis: Axis) -> BufferSpec:
    """Codes of ``form.bits`` bits, ``count`` a row, packed."""
    shape = (rows, packing.word_count(count, form.bits))
    return BufferSpec(shape=shape, dtype=torch.int32, axes=("rows", axis), packed=form.bits)


def _floats(form: WeightFormat, rows: int, columns: int) -> BufferSpec:
    """The bits of a value for each group."""
    dtype = bits_dtype(form.scale_dtype)
    return BufferSpec(shape=(rows, form.groups(columns)), dtype=dtype, axes=("rows", "groups"))


def _symmetric(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:
    words = _words(form, rows, columns, "columns")
    return {"words": words, "scale_bits": _floats(form, rows, columns)}


def _zero_points(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:
    zero_words = _words(form, rows, form.groups(columns), "groups")
    return _symmetric(form, rows, columns) | {"zero_words": zero_words}


def _offsets(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:
    return _symmetric(form, rows, columns) | {"offset_bits": _floats(form, rows, columns)}


def _tables(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:
    table_bits = BufferSpec(
        shape=(rows, form.groups(columns), 1 << form.bits),
        dtype=bits_dtype(form.scale_dtype),
        axes=("rows", "groups", "levels"),
    )
    return {"words": _words(form, rows, columns, "columns"), "table_bits": table_bits}


GRIDS: dict[str, Grid] = {
    "symmetric": Grid(keywords={"symmetric": True}, buffers=_symmetric, zero_points=True),
    "zero_points": Grid(keywords={}, buffers=_zero_points, shifts="zero_words", zero_points=True),
    "offsets": Grid(
        keywords={"offsets": True}, buffers=_offsets, shifts="offset_bits", float_shifts=True
    ),
    "row_tables": Grid(
        keywords={"tables": "row"}, buffers=_tables, grids="table_bits", tables="row"
    ),
    "group_tables": Grid(
        keywords={"tables": "group"}, buffers=_tables, grids="table_bits", tables="group"
    ),
}
"""Kind → what is particular to it."""


# --- additions -----------------------------------------------------------------------------------


def _basis(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:  # noqa: ARG001  (as in GRIDS)
    """Signs of a rotation, and scales of the input columns: 1 before they are loaded."""
    specs = {}
    if form.rotation is not None:
        specs["rotation_signs"] = BufferSpec(
            shape=(columns,), dtype=torch.int8, axes=("columns",), fill=1
        )
    if form.channel_scaling:
        specs["column_scale_bits"] = BufferSpec(
            shape=(columns,), dtype=torch.int32, axes=("columns",), fill=_FLOAT32_ONE
        )
    return specs


def _sparse(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:  # noqa: ARG001  (as in GRIDS)
    """Values of a sparse part, and the places of its entries or columns."""
    if not form.has_outliers:
        return {}
    dtype = bits_dtype(form.scale_dtype)
    values = BufferSpec(shape=(form.outliers,), dtype=dtype, axes=("entries",))
    places = BufferSpec(shape=(form.outliers,), dtype=torch.int32, axes=("entries",))
    if form.outlier_columns:
        count = form.outlier_columns
        values = BufferSpec(shape=(rows, count), dtype=dtype, axes=("rows", "outlier_columns"))
        places = BufferSpec(shape=(count,), dtype=torch.int32, axes=("outlier_columns",))
    return {"outlier_bits": values, "outlier_places": places}


_ADDITIONS = (_basis, _sparse)
