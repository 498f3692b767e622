"""`TsqHfQuantizer`: what transformers calls while it loads or saves a quantised model."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from tsq_layers.errors import ConfigError
from tsq_layers.formats.tsq.description import DESCRIPTION_FILE, NON_PERSISTENT, Description
from tsq_layers.formats.tsq.headers import REPORT, is_described, read_headers
from tsq_layers.formats.tsq.layout import is_under
from tsq_layers.formats.tsq.outline import QUANT_METHOD, Outline
from tsq_layers.formats.tsq.writing import shared_once
from tsq_layers.integrations.transformers.config import TsqConfig
from tsq_layers.integrations.transformers.skeleton import Skeleton, skeleton
from tsq_layers.reports import Report
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.workflow.hosts import register_host
from tsq_layers.workflow.pipeline import quantize


@register_quantizer(QUANT_METHOD)
class TsqHfQuantizer(HfQuantizer):
    """Packed layers in the place of float ones before a checkpoint is read, and an outline of them in what is saved.

    A float checkpoint is loaded as it is and quantised then, if that needs no calibration.

    Raises:
        ConfigError: a float checkpoint, and a configuration that needs calibration.
        CheckpointError: while loading: the files do not fit the outline, or the outline does not fit the model.
    """

    requires_calibration = False
    quantization_config: TsqConfig

    def __init__(self, quantization_config: TsqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._skeleton: Skeleton | None = None
        self._report: Report | None = None

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Check that the configuration can be used for what is loaded, before the model is built."""
        recipe = self.quantization_config.config
        if self.pre_quantized:
            if self.quantization_config.outline is None:
                raise ConfigError(
                    "quantization_config in config.json names no layers: save the model again with "
                    "save_pretrained or save_causal_lm"
                )
        elif recipe is None:
            raise ConfigError(
                "TsqConfig says nothing of how to quantise: give it a QuantConfig(method='rtn', …)"
            )
        elif recipe.needs_calibration:
            raise ConfigError(
                f"method={recipe.method!r}, channel_scaling={recipe.channel_scaling} needs "
                "calibration batches, which from_pretrained does not have: "
                "load the float model and call tsq_layers.quantize(model, config, batches), or give method='rtn'"
            )

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: nn.Module
    ) -> list[Any]:
        """Return no conversions for a quantised checkpoint: its names are those of the modules."""
        if self.pre_quantized:
            return []
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return conversions

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        if not self.pre_quantized:
            return
        outline = self.quantization_config.outline
        assert outline is not None
        files = [Path(file) for file in checkpoint_files or ()]
        headers, metadata = read_headers(files)
        self._skeleton = skeleton(
            model, outline, headers if files else None, model._get_dtype_plan(dtype)
        )
        self._report = _report(metadata, files)
        # transformers takes regular expressions here, not names.
        patterns = set(model._keys_to_ignore_on_load_unexpected or ())
        patterns.add(rf"^{NON_PERSISTENT}")
        for key in outline.placeholders:
            escaped_key = key.replace(".", r"\.")
            patterns.add(rf"(^|\.){escaped_key}$")
        model._keys_to_ignore_on_load_unexpected = patterns
        layers = self._skeleton.layers
        tied_keys = {}
        for key, other in model.all_tied_weights_keys.items():
            if not is_under(key, layers) and not is_under(other, layers):
                tied_keys[key] = other
        model.all_tied_weights_keys = tied_keys

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if not self.pre_quantized:
            recipe = self.quantization_config.config
            assert recipe is not None  # validate_environment
            quantize(model, recipe)
            self.quantization_config.outline = Outline.of(model)
        elif self._skeleton is not None:
            self._skeleton.complete(model)
            self._skeleton = None
            if self._report is not None:
                model.tsq_report = self._report
        attach(model)

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return what ``save_pretrained`` writes; ``model.config`` gets the outline of the model as it is now.

        Tensors that packed layers share among themselves are written once. Of a model with adapters
        only these are saved.

        Raises:
            ConfigError: no parameter of the model is a float.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        if not any(parameter.is_floating_point() for parameter in model.parameters()):
            raise ConfigError(
                f"every parameter of {type(model).__name__} is quantised, and transformers asks "
                "one for the dtype of the model: "
                "leave the embeddings or the head in floats (embeddings, skip), or write it with tsq.save"
            )
        outline = Outline.of(model)
        report = getattr(model, "tsq_report", None)
        recipe = self.quantization_config.config if report is None else report.config
        _forget_outlines(model)
        model.config.quantization_config = TsqConfig(recipe, outline=outline)
        model._weight_conversions = []  # the names that are saved are those of the modules
        state = _state_to_save(model, outline)
        metadata = {}
        if report is not None:
            metadata[REPORT] = json.dumps(report.to_dict(), allow_nan=False)
        return state, metadata

    def is_serializable(self) -> bool:
        """Return whether ``save_pretrained`` can write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return whether adapters on packed layers can be trained; the packed weights themselves stay as they are."""
        return True


def attach(model: nn.Module) -> None:
    """Let ``save_pretrained`` of the transformers models in ``model`` know that their layers are quantised.

    An entry point of the group ``tsq_layers.hosts``, see :mod:`tsq_layers.workflow.hosts`.

    Example:
        >>> attach(nn.Linear(2, 2))  # nothing of transformers in it: nothing is done
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or isinstance(
            getattr(module, "hf_quantizer", None), TsqHfQuantizer
        ):
            continue
        if any(isinstance(inner, QuantLinear) for inner in module.modules()):
            module.hf_quantizer = TsqHfQuantizer(TsqConfig())  # type: ignore[assignment]


def _state_to_save(model: nn.Module, outline: Outline) -> dict[str, Tensor]:
    """Return the tensors of a model, those that packed layers share once, and its placeholders."""
    # Keys whose tensor a packed layer shares with float ones; they are written as copies.
    _, all_aliases = shared_once(model)
    copied_keys = all_aliases.keys() - outline.aliases.keys()
    state = {}
    for key, tensor in model.state_dict().items():
        if key in outline.aliases and is_under(key, outline.layers):
            continue
        first_key = outline.aliases.get(key, key)
        state[key] = tensor.clone() if first_key in copied_keys else tensor
    placeholders = dict.fromkeys(outline.placeholders, torch.empty(0))
    return state | placeholders


def _forget_outlines(model: nn.Module) -> None:
    """Configurations of models inside a model say nothing of quantisation: names in them would be other ones."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "quantization_config"):
            del module.config.quantization_config


def _report(metadata: Mapping[str, str], files: list[Path]) -> Report | None:
    """Return the report of a model, from the files' metadata or from ``tsq.json`` beside them."""
    if REPORT in metadata:
        return Report.from_dict(json.loads(metadata[REPORT]))
    if not files or not is_described(files[0].parent):
        return None
    beside = files[0].parent / DESCRIPTION_FILE
    return Description.from_json(beside.read_text(encoding="utf-8")).report


register_host("transformers", attach)
