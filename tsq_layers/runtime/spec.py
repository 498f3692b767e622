"""How to build an empty quantised layer: what every file that holds packed layers says of each."""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from tsq_layers.errors import CheckpointError, TSQError
from tsq_layers.numerics.memory import dtype_name, dtype_of
from tsq_layers.runtime.linear import QuantLinear


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How to build the empty :class:`~tsq_layers.runtime.linear.QuantLinear` of one layer.

    Example:
        >>> spec = LayerSpec.of(QuantLinear(16, 8, bits=2, group_size=8))
        >>> spec.scale_dtype, spec.build("fc").words.device.type
        ('float16', 'meta')
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    symmetric: bool
    bias: bool
    scale_dtype: str
    dtype: str
    offsets: bool = False
    tables: Literal["row", "group"] | None = None
    rotation: int | None = None
    channel_scaling: bool = False
    outliers: int = 0
    outlier_columns: int = 0
    activation_bits: int | None = None

    @classmethod
    def of(cls, layer: QuantLinear) -> Self:
        """The specification of a layer."""
        plain = {
            name: getattr(layer, name)
            for name in ("in_features", "out_features", "bits", "group_size", "symmetric")
        }
        return cls(
            **plain,
            bias=layer.bias is not None,
            scale_dtype=dtype_name(layer.scale_dtype),
            dtype=dtype_name(layer.dtype),
            **layer.additions(),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values. Fields that have a default are left out where they have it: older files lack them.

        Example:
            >>> spec = LayerSpec.of(QuantLinear(16, 8, bits=2, group_size=8, tables="row"))
            >>> LayerSpec(**spec.to_dict()) == spec, "tables" in spec.to_dict(), "offsets" in spec.to_dict()
            (True, True, False)
        """
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }

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
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                bias=self.bias,
                scale_dtype=dtype_of(self.scale_dtype),
                offsets=self.offsets,
                tables=self.tables,
                rotation=self.rotation,
                channel_scaling=self.channel_scaling,
                outliers=self.outliers,
                outlier_columns=self.outlier_columns,
                activation_bits=self.activation_bits,
                device="meta",
                dtype=dtype_of(self.dtype),
            )
        except (TSQError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"layer {name!r} in {file}: {error}; the file is damaged or was changed by hand; save the model again"
            ) from error
