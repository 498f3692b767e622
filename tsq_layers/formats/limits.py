"""What a format can hold of a layer, and the nearest configuration that it can."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.errors import ExportError
from tsq_layers.numerics.memory import dtype_name
from tsq_layers.runtime.linear import QuantLinear


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a format can hold of a layer.

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


def check(layers: Mapping[str, QuantLinear], limits: Limits) -> None:
    """Refuse layers that a format cannot hold.

    Raises:
        ExportError: the first such layer, what the format holds, and the nearest configuration that it can hold.
    """
    for name, layer in layers.items():
        _check_kind(name, layer, limits.format_name)
        if _fits(layer, limits):
            if limits.scale_dtype is not None and not is_exact(layer.scales, limits.scale_dtype):
                raise ExportError(
                    f"layer {name!r} has {dtype_name(layer.scale_dtype)} scales that {dtype_name(limits.scale_dtype)}, in which "
                    f"{limits.format_name} holds them, would round: quantise with scale_dtype={dtype_name(limits.scale_dtype)!r}"
                )
            continue
        has = f"layer {name!r} ({layer.out_features}×{layer.in_features}) has {described(layer)}"
        cure = "no configuration changes its shape, so add it to skip"
        if layer.in_features % limits.columns == 0 and layer.out_features % limits.rows == 0:
            changes = ", ".join(f"{key}={value!r}" for key, value in nearest(layer, limits).items())
            cure = f"the nearest that it holds is QuantConfig({changes})"
        raise ExportError(f"{has}, and {limits.format_name} holds {limits}: {cure}")


def _check_kind(name: str, layer: QuantLinear, format_name: str) -> None:
    if layer.codebook is not None:
        has, cure = "look-up tables", "a method other than 'lnq'"
    elif layer.offset_bits is not None:
        has, cure = "float offsets", "zero_points='integer'"
    else:
        return
    raise ExportError(
        f"layer {name!r} has {has}, and {format_name} holds scales with integer zero points only: quantise it with {cure}, "
        "or add it to skip"
    )


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
    """The group that a layer has, or else a smaller power of two (kernels have no others), or the least, or the whole row."""
    powers = [1 << exponent for exponent in range(group.bit_length() - 1, 0, -1)]
    for candidate in (group, *powers, limits.columns):
        if 1 < candidate < columns and _group_fits(candidate, columns, limits):
            return candidate
    return None


def is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a change of dtype changes none of the values.

    Example:
        >>> is_exact(torch.tensor([0.1], dtype=torch.bfloat16), torch.float16), is_exact(torch.tensor([0.1]), torch.float16)
        (True, False)
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
