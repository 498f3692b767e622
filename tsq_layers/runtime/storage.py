"""The tensors that a packed layer stores: buffers of integers, and views of them as what they mean.

Shapes: N out_features, K in_features, G groups a row, W words a row, T tables a row.
"""

import dataclasses
from typing import Any, Literal, Self, Unpack, cast

import torch
from torch import Tensor, nn

from tsq_layers.errors import LayerError
from tsq_layers.numerics import packing
from tsq_layers.numerics.basis import Basis
from tsq_layers.numerics.weight import Outliers, QuantizedWeight
from tsq_layers.numerics.weight_format import (
    BUFFER_NAMES,
    GRIDS,
    BufferSpec,
    FormatKeywords,
    WeightFormat,
    bits_dtype,
)
from tsq_layers.runtime import kernels
from tsq_layers.runtime.parts import Parts


class PackedStorage(nn.Module):
    """The buffers of a :class:`~tsq_layers.runtime.linear.QuantLinear`, which describes the arguments.

    It computes nothing.

    Raises:
        LayerError: an argument that is not allowed.

    Example:
        >>> storage = PackedStorage(64, 8, bits=4, group_size=32)
        >>> storage.words.shape, storage.scales.shape, storage.bits_per_weight
        (torch.Size([8, 8]), torch.Size([8, 2]), 5.0)
    """

    format: WeightFormat
    words: Tensor
    scale_bits: Tensor | None
    zero_words: Tensor | None
    offset_bits: Tensor | None
    table_bits: Tensor | None
    bias: nn.Parameter | None
    dtype_marker: Tensor
    rotation_signs: Tensor | None
    column_scale_bits: Tensor | None
    outlier_bits: Tensor | None
    outlier_places: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: WeightFormat | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Unpack[FormatKeywords],
    ) -> None:
        super().__init__()
        if format is None:
            format = WeightFormat.of(**cast("Any", keywords))
        elif keywords:
            raise LayerError(
                f"{', '.join(keywords)} beside a format: give a WeightFormat, or its properties as keywords"
            )
        specs = format.buffers(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.format = format.for_columns(in_features)
        for name in dict.fromkeys((*BUFFER_NAMES, *specs)):
            spec = specs.get(name)
            self.register_buffer(name, None if spec is None else empty_buffer(spec, device))
        # Empty, and not saved: it only follows .to(dtype), as a weight would.
        self.register_buffer(
            "dtype_marker", torch.empty(0, dtype=dtype, device=device), persistent=False
        )
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))
        self._put_absent_buffers_last()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; layers of version 0.1 had their properties one by one in the place of a format."""
        if "format" not in state:
            state = _state_with_format(state)
        super().__setstate__(state)

    def drop_scaling(self) -> None:
        """Forget the column scales, once whatever gives the layer its input applies them; changes :attr:`weight`."""
        self.column_scale_bits = None
        self.format = dataclasses.replace(self.format, channel_scaling=False)
        self._put_absent_buffers_last()

    def _put_absent_buffers_last(self) -> None:
        """Put buffers that are ``None`` behind the others: torch.export numbers them as if they were there."""
        absent = [name for name, buffer in self._buffers.items() if buffer is None]
        for name in absent:
            self._buffers[name] = self._buffers.pop(name)

    # --- properties of the format ----------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.format.bits

    @property
    def group_size(self) -> int:
        """Columns that share a scale; K if the whole row does."""
        return self.format.group_size or self.in_features

    @property
    def symmetric(self) -> bool:
        """Return whether the zero points are the constant 2^(bits−1)."""
        return self.format.symmetric

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales, offsets, tables and the sparse part."""
        return self.format.scale_dtype

    @property
    def codebook(self) -> Literal["row", "group"] | None:
        """The part of the weight that has a look-up table of its own."""
        return self.format.tables

    @property
    def rotation(self) -> int | None:
        """Largest block of input columns that is rotated."""
        return self.format.rotation

    @property
    def activation_bits(self) -> int | None:
        """8 if inputs are rounded, which can be switched on and off; ``None`` if they are not."""
        return self.format.activation_bits

    @activation_bits.setter
    def activation_bits(self, bits: int | None) -> None:
        self.format = dataclasses.replace(self.format, activation_bits=bits)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of :attr:`weight`; it follows ``.to(dtype)``."""
        return self.dtype_marker.dtype

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of the weight (words, scales or tables, zero words, …) for each of its N·K entries."""
        return self.format.bits_per_weight(self.out_features, self.in_features)

    # --- views of the buffers --------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """The tensors, as they are run: views of the buffers."""
        # Not by attribute: that takes a microsecond each, and this is asked for at each call.
        buffers = self._buffers
        form = self.format
        grid = GRIDS[form.grid]
        words, grids = buffers["words"], buffers[grid.grids]
        assert words is not None
        assert grids is not None
        shifts = None if grid.shifts is None else buffers[grid.shifts]
        if grid.float_shifts and shifts is not None:
            shifts = shifts.view(form.scale_dtype)
        codes = Parts(words, grids.view(form.scale_dtype), shifts)
        if not (form.has_basis or form.has_outliers):
            return codes
        scaling, values = buffers["column_scale_bits"], buffers["outlier_bits"]
        return codes._replace(
            signs=buffers["rotation_signs"],
            scaling=None if scaling is None else scaling.view(torch.float32),
            values=None if values is None else values.view(form.scale_dtype),
            places=buffers["outlier_places"],
        )

    @property
    def grids(self) -> Tensor:
        """Tables, or else scales."""
        return self.parts.grids

    @property
    def shifts(self) -> Tensor | None:
        """Packed zero points, or offsets."""
        return self.parts.shifts

    @property
    def scales(self) -> Tensor:
        """Scales (N, G) in ``scale_dtype``: a view of ``scale_bits``. Beside tables there are none: (N, 0)."""
        if self.scale_bits is None:
            device = self.words.device
            return torch.empty(self.out_features, 0, dtype=self.scale_dtype, device=device)
        return self.scale_bits.view(self.scale_dtype)

    @property
    def offsets(self) -> Tensor | None:
        """Offsets (N, G) in ``scale_dtype``: a view of ``offset_bits``."""
        return None if self.offset_bits is None else self.offset_bits.view(self.scale_dtype)

    @property
    def tables(self) -> Tensor | None:
        """Levels (N, T, 2^bits) in ``scale_dtype``, T = 1 or G: a view of ``table_bits``."""
        return None if self.table_bits is None else self.table_bits.view(self.scale_dtype)

    @property
    def basis(self) -> Basis | None:
        """The basis of the input that the codes are in; ``None`` is the layer's own."""
        parts = self.parts
        if parts.signs is None and parts.scaling is None:
            return None
        return Basis(self.rotation, parts.signs, parts.scaling)

    @property
    def outliers(self) -> Outliers | None:
        """The sparse part, in the basis of the codes; ``None`` if there is none."""
        values, places = self.parts.values, self.outlier_places
        if values is None:
            return None
        return Outliers(values, places) if values.dim() == 1 else Outliers(values, columns=places)

    # --- to and from a quantised weight ----------------------------------------------------------

    def take(self, weight: QuantizedWeight) -> Self:
        """Store copies of a weight of the layer's format, in the place of all buffers."""
        for name, tensor in stored_tensors(weight).items():
            setattr(self, name, tensor)
        self._put_absent_buffers_last()
        return self

    def quantized_weight(self) -> QuantizedWeight:
        """Codes and grids, sparse part and basis; exact inverse of ``QuantLinear.from_quantized``."""
        scales = self.scales
        if self.format.has_zero_points:
            zeros = kernels.zero_points(scales, self.zero_words, self.bits)
        else:
            zeros = torch.zeros_like(scales, dtype=torch.uint8)
        return QuantizedWeight(
            packing.unpack(self.words, self.bits, self.in_features),
            scales.clone(),
            zeros,
            self.bits,
            self.group_size,
            self.symmetric,
            None if self.offsets is None else self.offsets.clone(),
            None if self.tables is None else self.tables.clone(),
            self.outliers,
            self.basis,
        )


def stored_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The buffers that hold a weight, by name; copies on its device, as ``weight.format.buffers`` describes them."""
    tensors = {
        "words": packing.pack(weight.codes, weight.bits),
        "scale_bits": raw_bits(weight.scales),
        "zero_words": packing.pack(weight.zeros, weight.bits),
    }
    if weight.offsets is not None:
        tensors["offset_bits"] = raw_bits(weight.offsets)
    if weight.tables is not None:
        tensors["table_bits"] = raw_bits(weight.tables)
    if weight.basis is not None and weight.basis.signs is not None:
        tensors["rotation_signs"] = weight.basis.signs.detach().clone()
    if weight.basis is not None and weight.basis.scaling is not None:
        tensors["column_scale_bits"] = weight.basis.scaling.detach().clone().view(torch.int32)
    if weight.outliers is not None:
        tensors["outlier_bits"] = raw_bits(weight.outliers.values)
        tensors["outlier_places"] = weight.outliers.places.detach().clone()
    specs = weight.format.buffers(*weight.codes.shape)
    return {name: tensors[name] for name in specs}


def empty_buffer(spec: BufferSpec, device: torch.device | str | int | None = None) -> Tensor:
    """A stored tensor before it is loaded."""
    return torch.full(spec.shape, spec.fill, dtype=spec.dtype, device=device)


def raw_bits(values: Tensor) -> Tensor:
    """A copy of the raw bits of scales, offsets or tables."""
    copy = values.detach().clone(memory_format=torch.contiguous_format)
    return copy.view(bits_dtype(values.dtype))


def _state_with_format(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a layer that version 0.1 pickled, with its properties as a format."""
    buffers = state["_buffers"]
    names = ("bits", "group_size", "symmetric", "scale_dtype", "rotation", "activation_bits")
    properties = {name: state[name] for name in names}
    outliers = buffers.get("outlier_bits")
    if outliers is not None:
        key = "outliers" if outliers.dim() == 1 else "outlier_columns"
        properties[key] = outliers.shape[-1]
    weight_format = WeightFormat.of(
        **properties,
        offsets=buffers.get("offset_bits") is not None,
        tables=state["codebook"],
        channel_scaling=buffers.get("column_scale_bits") is not None,
    )
    replaced = {*names, "codebook", "_is_plain"}
    rest = {name: value for name, value in state.items() if name not in replaced}
    return {**rest, "format": weight_format}
