"""torchao: the layers of this library by ``torchao.quantization.quantize_``, beside its own configurations.

Importing this module registers :class:`PrepareTSQConfig` and :class:`ConvertTSQConfig`, which quantise
in two steps with data between them, and :class:`TSQConfig`, which quantises in one without data.

torchao hands over one layer at a time. So every layer is prepared by itself and sees the
full-precision model: the one-pass form, in which ``deviation`` has nothing to correct. For paired
passes call ``tsq.quantize`` on the whole model, and ``quantize_`` before or after it for the layers
that it skips. torchao replaces a module that hangs in several places in the first one only;
``tsq.quantize`` in all.
"""

import warnings
from dataclasses import dataclass

from torch import nn

import tsq_layers as tsq
from tsq_layers.calibration import preparation
from tsq_layers.errors import ConfigError, MissingExtraError, TSQDeprecationWarning

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import register_quantize_module_handler
except ImportError as error:
    raise MissingExtraError('this needs torchao: pip install "tsq_layers[torchao]"') from error


@dataclass
class PrepareTSQConfig(AOBaseConfig):  # type: ignore[misc]  # torchao is not annotated
    """Attach an observer to each layer; the first of two steps.

    Run the model on data then, and call ``quantize_`` with :class:`ConvertTSQConfig`.

    Args:
        config: as for ``tsq.prepare``; patterns in it match no names, the filters of ``quantize_`` do.

    Raises:
        ConfigError: fields that need the whole model, or names in it.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> quantize_(model, PrepareTSQConfig(tsq.QuantConfig(bits=4, group_size=32)))
        >>> _ = model(torch.randn(1024, 64))
        >>> quantize_(model, ConvertTSQConfig())
        >>> type(model[2]).__name__, model[2].bits
        ('QuantLinear', 4)
    """

    config: tsq.QuantConfig

    def __post_init__(self) -> None:
        _check_fields(self.config)


@dataclass
class ConvertTSQConfig(AOBaseConfig):  # type: ignore[misc]
    """Replace the layers that :class:`PrepareTSQConfig` prepared; others stay as they are."""


@dataclass
class TSQConfig(AOBaseConfig):  # type: ignore[misc]
    """Quantise each layer at once, by a method that needs no data.

    Args:
        config: as for :class:`PrepareTSQConfig`.
        step: deprecated: ``"prepare"`` is :class:`PrepareTSQConfig`, ``"convert"`` is
            :class:`ConvertTSQConfig`.

    Raises:
        ConfigError: no configuration, a method that needs data, fields that need the whole model,
            or names in it.

    Warns:
        TSQDeprecationWarning: a step is given.
    """

    config: tsq.QuantConfig | None = None
    step: str | None = None

    def __post_init__(self) -> None:
        if self.step not in (None, "prepare", "convert"):
            raise ConfigError(
                f"step={self.step!r}: leave it out, or give PrepareTSQConfig or ConvertTSQConfig "
                "in the place of TSQConfig"
            )
        if self.config is None and self.step != "convert":
            raise ConfigError("TSQConfig needs a QuantConfig")
        if self.config is not None:
            _check_fields(self.config)
        if self.step is not None:
            name = f"{self.step.capitalize()}TSQConfig"
            warnings.warn(
                f"TSQConfig(step={self.step!r}) is {name} now, and goes with version 0.3",
                TSQDeprecationWarning,
                stacklevel=3,
            )
        elif self.config is not None and self.config.needs_calibration:
            raise ConfigError(
                f"method {self.config.method!r} needs data: quantize_ with PrepareTSQConfig, run the "
                "model on batches, and quantize_ with ConvertTSQConfig; or give method='rtn', which "
                "needs none"
            )


def _check_fields(config: tsq.QuantConfig) -> None:
    """Refuse what needs the whole model, or names in it."""
    for field in ("guidance", "distill_epochs"):
        if getattr(config, field):
            raise ConfigError(
                f"{field}={getattr(config, field)}: quantize_ hands over one layer at a time, and "
                "this needs the whole model: "
                f"set it to 0, or call tsq.quantize(model, config, batches)"
            )
    if config.overrides or config.skip not in ((), tsq.QuantConfig().skip):
        raise ConfigError(
            f"skip={config.skip!r}, overrides={dict(config.overrides)!r}: quantize_ hands over "
            "layers without their names; choose layers by its "
            "filter_fn, or configurations by FqnToConfig"
        )


@register_quantize_module_handler(PrepareTSQConfig)  # type: ignore[untyped-decorator]
def _prepare(module: nn.Module, config: PrepareTSQConfig) -> nn.Module:
    return tsq.prepare(module, config.config)


@register_quantize_module_handler(ConvertTSQConfig)  # type: ignore[untyped-decorator]
def _convert(module: nn.Module, config: ConvertTSQConfig) -> nn.Module:  # noqa: ARG001
    # A layer that was not prepared stays, so that the filter of the first step need not be repeated.
    converted: nn.Module = tsq.convert(module) if preparation.is_prepared(module) else module
    return converted


@register_quantize_module_handler(TSQConfig)  # type: ignore[untyped-decorator]
def _quantize(module: nn.Module, config: TSQConfig) -> nn.Module:
    if config.step == "convert":
        converted: nn.Module = _convert(module, ConvertTSQConfig())
        return converted
    assert config.config is not None
    tsq.prepare(module, config.config)
    return module if config.step == "prepare" else tsq.convert(module)
