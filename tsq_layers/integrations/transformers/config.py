"""`TsqConfig`: what ``quantization_config`` is for transformers, in ``from_pretrained`` and in ``config.json``."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from tsq_layers.config import QuantConfig
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import ConfigError
from tsq_layers.formats.tsq.outline import QUANT_METHOD, Outline

_RECIPE = "config"
_VERSION = "library_version"


@register_quantization_config(QUANT_METHOD)
class TsqConfig(QuantizationConfigMixin):
    """The way in which a model is quantised while it is loaded, or was quantised.

    Args:
        config: how it is to be quantised, or was; ``None`` if that is not known.
        outline: which layers are quantised; ``None`` for a float model.
        fields: of :class:`~tsq_layers.config.QuantConfig`, in the place of ``config``.

    Raises:
        ConfigError: ``config`` and fields of it, or a field that is not allowed.

    Example:
        >>> TsqConfig(method="rtn", bits=4, group_size=64).config.bits
        4
        >>> TsqConfig.from_dict(TsqConfig(method="rtn").to_dict()).config.method
        'rtn'
    """

    def __init__(
        self, config: QuantConfig | None = None, *, outline: Outline | None = None, **fields: Any
    ) -> None:
        if config is not None and fields:
            raise ConfigError(
                f"TsqConfig was given a config and {', '.join(fields)}: give one or the other"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a name of one's own is allowed
        self.config = config if config is not None else _from_fields(fields)
        self.outline = outline

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what ``config.json`` holds under ``quantization_config``."""
        values: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            _VERSION: library_versions()["tsq_layers"],
        }
        if self.config is not None:
            values[_RECIPE] = self.config.to_dict()
        return values if self.outline is None else values | self.outline.to_dict()

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Inverse of :meth:`to_dict`; takes fields of ``QuantConfig`` beside ``quant_method`` too.

        Raises:
            CheckpointError, ConfigError: a value that is not allowed.
        """
        values = {
            key: value
            for key, value in config_dict.items()
            if key not in ("quant_method", _VERSION)
        }
        config = cls._from_values(values)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        recipe = values.pop(_RECIPE, None)
        config = None if recipe is None else QuantConfig.from_dict(recipe)
        if "layers" in values:
            return cls(config, outline=Outline.from_dict(values))
        return cls(config, **values)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs of :meth:`to_dict`: transformers asks for ``dict(quantization_config)``."""
        yield from self.to_dict().items()


def _from_fields(fields: dict[str, Any]) -> QuantConfig | None:
    try:
        return QuantConfig(**fields) if fields else None
    except TypeError as error:
        raise ConfigError(
            f"TsqConfig: {error}; its fields are those of tsq_layers.QuantConfig"
        ) from None
