"""torchao: the layers of this library by ``torchao.quantization.quantize_``, beside its own configurations.

Importing this module registers :class:`TSQConfig`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

import tsq_layers as tsq
from tsq_layers.calibration import preparation
from tsq_layers.errors import ConfigError, MissingExtraError

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import register_quantize_module_handler
except ImportError as error:
    raise MissingExtraError('this needs torchao: pip install "tsq_layers[torchao]"') from error

Step = Literal["prepare", "convert"]


@dataclass
class TSQConfig(AOBaseConfig):  # type: ignore[misc]  # torchao is not annotated
    """What ``quantize_`` does to a layer, in two steps with data between them, or in one without data.

    torchao hands over one layer at a time. So every layer is prepared by itself and sees the full-precision model: the
    one-pass form, in which ``deviation`` has nothing to correct. For paired passes call ``tsq.quantize`` on the whole
    model, and ``quantize_`` before or after it for the layers that it skips. torchao replaces a module that hangs in several
    places in the first one only; ``tsq.quantize`` in all.

    Args:
        config: as for ``tsq.prepare``; patterns in it match no names, those of ``quantize_`` do. Only the first of two steps
            needs it.
        step: ``"prepare"`` attaches an observer; run the model on data then; ``"convert"`` replaces the layers that
            were prepared. ``None`` is both at once, for methods that need no data.

    Raises:
        ConfigError: no such step, a step without the configuration that it needs, one that needs data without steps, or
            fields that need the whole model or names in it.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> quantize_(model, TSQConfig(tsq.QuantConfig(bits=4, group_size=32), step="prepare"))
        >>> _ = model(torch.randn(1024, 64))
        >>> quantize_(model, TSQConfig(step="convert"))
        >>> type(model[2]).__name__, model[2].bits
        ('QuantLinear', 4)
    """

    config: tsq.QuantConfig | None = None
    step: Step | None = None

    def __post_init__(self) -> None:
        if self.step is not None and self.step not in get_args(Step):
            raise ConfigError(
                f"step={self.step!r}: give 'prepare', 'convert', or None for both at once"
            )
        if self.config is None and self.step != "convert":
            raise ConfigError("TSQConfig needs a QuantConfig, but for step='convert'")
        if self.config is not None:
            _check_fields(self.config)
        if self.step is None and self.config is not None and self.config.needs_calibration:
            raise ConfigError(
                f"method {self.config.method!r} needs data: quantize_ with step='prepare', run the model on batches, and "
                "quantize_ with step='convert'; or give method='rtn', which needs none"
            )


def _check_fields(config: tsq.QuantConfig) -> None:
    """Refuse what needs the whole model, or names in it."""
    for field in ("guidance", "distill_epochs"):
        if getattr(config, field):
            raise ConfigError(
                f"{field}={getattr(config, field)}: quantize_ hands over one layer at a time, and this needs the whole model: "
                f"set it to 0, or call tsq.quantize(model, config, batches)"
            )
    if config.overrides or config.skip not in ((), tsq.QuantConfig().skip):
        raise ConfigError(
            f"skip={config.skip!r}, overrides={dict(config.overrides)!r}: quantize_ hands over layers without their names; choose layers by its "
            "filter_fn, or configurations by FqnToConfig"
        )


@register_quantize_module_handler(TSQConfig)  # type: ignore[untyped-decorator]
def _transform(module: nn.Module, config: TSQConfig) -> nn.Module:
    if config.step == "convert":
        return _converted(module)
    assert config.config is not None
    tsq.prepare(module, config.config)
    return module if config.step == "prepare" else tsq.convert(module)


def _converted(module: nn.Module) -> nn.Module:
    """The quantised layer; one that was not prepared stays, so that the filter of the first step need not be repeated."""
    if not preparation.is_prepared(module):
        return module
    return tsq.convert(module)
