"""Define what each format can hold of a layer, and find the nearest configuration that it can."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.errors import ExportError
from tsq_layers.numerics.memory import dtype_name
from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime.linear import QuantLinear


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The properties of a layer that a format can hold.

    Args:
        format_name: of the format.
        bits: widths of codes.
        asymmetric: whether there are zero points.
        columns: K, and every group, must be a multiple of this.
        groups: sizes that there are kernels for, beside the whole row; ``None`` for any.
        rows: N must be a multiple of this.
        ragged: a last group may be shorter than the others.
        scale_dtype: of the scales in the file; ``None`` for any.
    """

    format_name: str
    bits: tuple[int, ...]
    asymmetric: bool = True
    columns: int = 1
    groups: tuple[int, ...] | None = None
    rows: int = 1
    ragged: bool = False
    scale_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        parts = [f"{_listed(self.bits)} bits"]
        parts += [] if self.asymmetric else ["symmetric grids"]
        if self.columns > 1:
            parts.append(f"rows and groups of a multiple of {self.columns} columns")
        parts += [f"groups of {_listed(self.groups)}"] if self.groups else []
        parts += [] if self.ragged else ["groups that divide the row"]
        parts += [f"a multiple of {self.rows} rows"] if self.rows > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Property:
    """A property of a packed weight that a file of codes, scales and integer zero points does not hold.

    Args:
        is_of: whether a weight of a format has it.
        is_asked_for: whether a configuration makes layers that have it.
        refusal: what the message says of a layer, behind "has"; ``{format}`` is the format of the file.
        field: of a configuration, which asks for it.
        cure: value of the field that does not.
        held_by: names of the export formats that hold it all the same.
    """

    is_of: Callable[[WeightFormat], bool]
    is_asked_for: Callable[[QuantConfig], bool]
    refusal: str
    field: str
    cure: object
    held_by: frozenset[str] = frozenset()


_NO_GRID = "and {format} holds scales with integer zero points only: quantise it with"
_CODES_ONLY = "{format} holds only codes, scales and zero points"

PROPERTIES: tuple[Property, ...] = (
    Property(
        is_of=lambda form: form.has_offsets,
        is_asked_for=lambda config: config.has_offsets,
        refusal=f"float offsets, {_NO_GRID} zero_points='integer', or add it to skip",
        field="zero_points",
        cure="integer",
    ),
    Property(
        is_of=lambda form: form.has_tables,
        is_asked_for=lambda config: config.tables is not None,
        refusal=f"look-up tables, {_NO_GRID} a method other than 'lnq', or add it to skip",
        field="method",
        cure="two-stage",
    ),
    Property(
        is_of=lambda form: form.rotation is not None,
        is_asked_for=lambda config: config.rotation is not None,
        refusal=f"a rotation of its input: quantise with rotation=None; {_CODES_ONLY}",
        field="rotation",
        cure=None,
    ),
    Property(
        is_of=lambda form: form.outliers > 0,
        is_asked_for=lambda config: config.option("outliers", 0) > 0,
        refusal=f"a sparse part: quantise with outliers=0; {_CODES_ONLY}",
        field="outliers",
        cure=0,
    ),
    Property(
        is_of=lambda form: form.outlier_columns > 0,
        is_asked_for=lambda config: config.option("outlier_columns", 0) > 0,
        refusal=f"a sparse part: quantise with outlier_columns=0; {_CODES_ONLY}",
        field="outlier_columns",
        cure=0,
    ),
    Property(
        is_of=lambda form: form.activation_bits is not None,
        is_asked_for=lambda config: config.activation_bits is not None,
        refusal=f"8-bit inputs: quantise with activation_bits=None; {_CODES_ONLY}",
        field="activation_bits",
        cure=None,
    ),
    # A directory has no place for the norm that would fold the scales.
    Property(
        is_of=lambda form: form.channel_scaling,
        is_asked_for=lambda config: config.channel_scaling,
        refusal="column scales: fold them into the norm before it with tsq.fold_scaling, "
        f"or quantise with channel_scaling=False; {_CODES_ONLY}",
        field="channel_scaling",
        cure=False,
    ),
)
"""In the order in which they are refused."""


def check_properties(layers: Mapping[str, QuantLinear], format_name: str) -> None:
    """Refuse layers with a property that a format does not hold.

    Raises:
        ExportError: the first such layer, its property, and what to do.
    """
    family = format_name.removesuffix("-v1")  # both versions of gptq hold the same
    for name, layer in layers.items():
        for item in PROPERTIES:
            if item.is_of(layer.format) and format_name not in item.held_by:
                refusal = item.refusal.replace("{format}", family)
                raise ExportError(f"layer {name!r} has {refusal}")


def check_asked_for(config: QuantConfig, format_name: str) -> None:
    """Refuse a configuration that asks for properties that a format does not hold.

    Raises:
        ExportError: the fields, and their values that the format holds.
    """
    refused = [
        item for item in PROPERTIES if item.is_asked_for(config) and format_name not in item.held_by
    ]
    if refused:
        values = config.values()
        present = ", ".join(f"{item.field}={values[item.field]!r}" for item in refused)
        cures = ", ".join(f"{item.field}={item.cure!r}" for item in refused)
        raise ExportError(
            f"{present}: {format_name} files hold plain codes and scales; give {cures}"
        )


def check(layers: Mapping[str, QuantLinear], limits: Limits) -> None:
    """Refuse layers that a format cannot hold.

    Raises:
        ExportError: the first such layer, what the format holds, and the nearest configuration that it can hold.
    """
    for name, layer in layers.items():
        if _fits(layer, limits):
            if limits.scale_dtype is not None and not is_exact(layer.scales, limits.scale_dtype):
                raise ExportError(
                    f"layer {name!r} has {dtype_name(layer.scale_dtype)} scales that "
                    f"{dtype_name(limits.scale_dtype)}, in which "
                    f"{limits.format_name} holds them, would round: quantise with "
                    f"scale_dtype={dtype_name(limits.scale_dtype)!r}"
                )
            continue
        has = f"layer {name!r} ({layer.out_features}×{layer.in_features}) has {described(layer)}"
        cure = "no configuration changes its shape, so add it to skip"
        if layer.in_features % limits.columns == 0 and layer.out_features % limits.rows == 0:
            changes = ", ".join(f"{key}={value!r}" for key, value in nearest(layer, limits).items())
            cure = f"the nearest that it holds is QuantConfig({changes})"
        raise ExportError(f"{has}, and {limits.format_name} holds {limits}: {cure}")


def _fits(layer: QuantLinear, limits: Limits) -> bool:
    return (
        layer.bits in limits.bits
        and (limits.asymmetric or layer.symmetric)
        and layer.in_features % limits.columns == 0
        and layer.out_features % limits.rows == 0
        and (
            layer.group_size >= layer.in_features
            or _group_fits(layer.group_size, layer.in_features, limits)
        )
    )


def _group_fits(group: int, columns: int, limits: Limits) -> bool:
    known = limits.groups is None or group in limits.groups
    return known and group % limits.columns == 0 and (limits.ragged or columns % group == 0)


def nearest(layer: QuantLinear, limits: Limits) -> dict[str, int | bool | None]:
    """The nearest ``bits``, ``group_size`` and ``symmetric`` that a format holds of a layer of this shape.

    Example:
        >>> limits = Limits(format_name="a format", bits=(4, 8), asymmetric=False, columns=32)
        >>> nearest(QuantLinear(576, 64, bits=3, group_size=128), limits)
        {'bits': 4, 'group_size': 64, 'symmetric': True}
    """
    bits = next((bits for bits in sorted(limits.bits) if bits >= layer.bits), max(limits.bits))
    return {
        "bits": bits,
        "group_size": _nearest_group(layer.group_size, layer.in_features, limits),
        "symmetric": layer.symmetric or not limits.asymmetric,
    }


def _nearest_group(group: int, columns: int, limits: Limits) -> int | None:
    """Return the group of a layer, or a smaller power of two, or the least, or the whole row.

    Kernels take powers of two only.
    """
    powers = [1 << exponent for exponent in range(group.bit_length() - 1, 0, -1)]
    for candidate in (group, *powers, limits.columns):
        if 1 < candidate < columns and _group_fits(candidate, columns, limits):
            return candidate
    return None


def is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a change of dtype changes none of the values.

    Example:
        >>> is_exact(torch.tensor([0.1], dtype=torch.bfloat16), torch.float16)
        True
        >>> is_exact(torch.tensor([0.1]), torch.float16)
        False
    """
    if values.dtype == dtype or values.is_meta:  # without values nobody can tell yet
        return True
    return bool(torch.equal(values.to(dtype).to(torch.float64), values.to(torch.float64)))


def described(layer: QuantLinear) -> str:
    """Bits, groups and symmetry of a layer in words.

    Example:
        >>> described(QuantLinear(64, 8, bits=3, group_size=None, symmetric=True))
        '3 bits, symmetric, one group a row'
    """
    symmetry = "symmetric" if layer.symmetric else "asymmetric"
    groups = (
        "one group a row"
        if layer.group_size >= layer.in_features
        else f"groups of {layer.group_size}"
    )
    return f"{layer.bits} bits, {symmetry}, {groups}"


def _listed(numbers: tuple[int, ...]) -> str:
    first, last = numbers[:-1], numbers[-1]
    return f"{', '.join(map(str, first))} or {last}" if first else str(last)
