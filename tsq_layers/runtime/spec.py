"""Specify how to build an empty quantised layer, as every file with packed layers does."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, Literal, Self, get_type_hints

from tsq_layers.config.json_fields import checked_fields
from tsq_layers.errors import CheckpointError, TSQError
from tsq_layers.numerics.memory import dtype_name, dtype_of
from tsq_layers.numerics.weight import BufferSpec, WeightFormat
from tsq_layers.runtime.linear import QuantLinear

# The keys that every file has, in their order; those of later properties follow where they are used.
_REQUIRED = {
    "in_features": int,
    "out_features": int,
    "bits": int,
    "group_size": int,
    "symmetric": bool,
    "bias": bool,
    "scale_dtype": str,
    "dtype": str,
}
_KINDS = [
    ("offsets", bool, False),
    ("tables", Literal["row", "group"] | None, None),
    ("grid", str | None, None),  # of kinds that the two do not name
]


def _stored_fields() -> type:
    """The keys, types and defaults of a layer in a file, as a dataclass."""
    hints = get_type_hints(WeightFormat)
    properties = [
        (item.name, hints[item.name], item.default)
        for item in fields(WeightFormat)
        if item.name not in (*_REQUIRED, "grid")
    ]
    return make_dataclass("StoredLayer", [*_REQUIRED.items(), *_KINDS, *properties])


_STORED = _stored_fields()


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A specification of the empty :class:`~tsq_layers.runtime.linear.QuantLinear` of one layer.

    Args:
        in_features: K.
        out_features: N.
        format: of the weight.
        bias: whether there is a bias.
        dtype: of the bias and the dequantised weight, by name.

    Example:
        >>> spec = LayerSpec.of(QuantLinear(16, 8, bits=2, group_size=8))
        >>> spec.format.bits, spec.build("fc").words.device.type
        (2, 'meta')
    """

    in_features: int
    out_features: int
    format: WeightFormat
    bias: bool
    dtype: str

    @classmethod
    def of(cls, layer: QuantLinear) -> Self:
        """The specification of a layer."""
        return cls(
            in_features=layer.in_features,
            out_features=layer.out_features,
            format=layer.format,
            bias=layer.bias is not None,
            dtype=dtype_name(layer.dtype),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values. Properties that have a default are left out where they have it: older files lack them.

        Example:
            >>> spec = LayerSpec.of(QuantLinear(16, 8, bits=2, group_size=8, tables="row"))
            >>> values = spec.to_dict()
            >>> LayerSpec.from_dict(values, "fc") == spec, "tables" in values, "offsets" in values
            (True, True, False)
        """
        values = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "dtype": self.dtype,
            **self.format.to_dict(),
        }
        return {name: values[name] for name in _REQUIRED} | values

    @classmethod
    def from_dict(cls, values: object, name: str, file: str = "tsq.json") -> Self:
        """Inverse of :meth:`to_dict`.

        Args:
            values: of a layer.
            name: of the layer, for the message.
            file: where the values were read, for the message.

        Raises:
            CheckpointError: unknown, missing or ill-typed keys, or values that do not make a layer.
        """
        properties = checked_fields(_STORED, values, f"{file}: layer {name!r}")
        own = {key: properties.pop(key) for key in ("in_features", "out_features", "bias", "dtype")}
        try:
            dtype_of(own["dtype"])
            scale_dtype = dtype_of(properties.pop("scale_dtype"))
            weight_format = WeightFormat.of(**properties, scale_dtype=scale_dtype)
            weight_format.buffers(own["out_features"], own["in_features"])
        except (TSQError, TypeError) as error:
            raise _damaged(name, file, error) from error
        return cls(**own, format=weight_format)

    def buffers(self) -> Mapping[str, BufferSpec]:
        """Every stored tensor of the weight, by name; the bias is none of them."""
        return self.format.buffers(self.out_features, self.in_features)

    def build(self, name: str, file: str = "tsq.json") -> QuantLinear:
        """The layer on the meta device: shapes and dtypes, no values.

        Args:
            name: of the layer, for the message.
            file: where the specification was read, for the message.

        Raises:
            CheckpointError: the values do not make a layer.
        """
        try:
            return QuantLinear(
                self.in_features,
                self.out_features,
                self.format,
                bias=self.bias,
                device="meta",
                dtype=dtype_of(self.dtype),
            )
        except (TSQError, TypeError, RuntimeError) as error:
            raise _damaged(name, file, error) from error


def _damaged(name: str, file: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"layer {name!r} in {file}: {error}; "
        "the file is damaged or was changed by hand; save the model again"
    )
