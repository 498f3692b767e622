"""Refuse configurations that a format cannot hold, before hours of calibration."""

from tsq_layers.config import QuantConfig
from tsq_layers.errors import ExportError
from tsq_layers.formats.compressed_tensors import writing as compressed_tensors
from tsq_layers.formats.gguf import writing as gguf
from tsq_layers.formats.gptq import writing as gptq
from tsq_layers.formats.limits import Limits, check_asked_for
from tsq_layers.numerics.memory import dtype_name

LIMITS: dict[str, Limits] = {
    "gptq": gptq.LIMITS,
    "gptq-v1": gptq.LIMITS,
    "compressed-tensors": compressed_tensors.LIMITS,
    "gguf": gguf.LIMITS,
}


def check_configuration(config: QuantConfig, format_name: str) -> None:
    """Refuse a configuration whose layers a format cannot hold, whatever their shapes.

    Shapes are looked at by :func:`.exporting.checked`.

    Raises:
        ExportError: the field, what the format holds, and what to change.

    Example:
        >>> check_configuration(QuantConfig(bits=4, group_size=64, symmetric=True), "gguf")
        >>> check_configuration(QuantConfig.best(), "gptq")  # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
        ...
        tsq_layers.errors.ExportError: zero_points='float', rotation=64: gptq files hold plain codes
        and scales; give zero_points='integer', rotation=None
    """
    layers = [
        config,
        *(config.changed(overrides={}, **changes) for changes in config.overrides.values()),
    ]
    for layer in layers:
        check_asked_for(layer, format_name)
        _check_grids(layer, LIMITS[format_name])


def _check_grids(config: QuantConfig, limits: Limits) -> None:
    group = config.group_size
    sizes = limits.groups is None or group is None or group in limits.groups
    fits = {
        "bits": config.bits in limits.bits,
        "symmetric": limits.asymmetric or config.symmetric,
        "group_size": sizes and (group is None or group % limits.columns == 0),
    }
    for field, holds in fits.items():
        if not holds:
            raise ExportError(
                f"{field}={getattr(config, field)!r}: {limits.format_name} holds {limits}; change it"
            )
    wanted = limits.scale_dtype
    if wanted is not None and config.torch_scale_dtype.itemsize > wanted.itemsize:
        raise ExportError(
            f"scale_dtype={config.scale_dtype!r}: {limits.format_name} holds {dtype_name(wanted)} "
            f"scales; set it to {dtype_name(wanted)!r}"
        )
