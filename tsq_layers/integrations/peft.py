"""PEFT: LoRA adapters on packed layers. The packed weights stay as they are; only the adapters are trained."""

import copy
import os
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from tsq_layers.errors import ConfigError, StateError
from tsq_layers.layers.embedding import QuantEmbedding
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.storage import PackedStorage

_INITIALISERS = (True, False, "gaussian", "orthogonal", "eva")
_ALL = "all-linear"
# What PEFT adds to modules_to_save, in PeftModelForSequenceClassification and its relatives.
_SAVED_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def add_lora(model: nn.Module, config: LoraConfig, **options: Any) -> PeftModel:
    """A model with adapters, also on its packed layers; ``save_pretrained`` of it writes only the adapters.

    Args:
        model: with packed layers; they are wrapped in place, as PEFT does it.
        config: not changed. ``target_modules="all-linear"`` means the packed layers too.
        options: of ``peft.get_peft_model``.

    Raises:
        ConfigError: a way to initialise adapters that changes the weights below them; packed layers that would be
            trained themselves (``modules_to_save``), or that PEFT cannot reach. The model is as it was.

    Example:
        >>> model = nn.Sequential(QuantLinear(64, 32, bits=2, group_size=32), nn.ReLU())
        >>> adapted = add_lora(model, LoraConfig(r=4, target_modules=["0"]))
        >>> [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    """
    config = knowing_packed_layers(config)
    if config.target_modules == _ALL:
        config.target_modules = _linear_layers(model)
    _check_targets(model, config)
    adapted: PeftModel = get_peft_model(model, config, **options)
    return _unmergeable(adapted)


def load_lora(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> PeftModel:
    """A model with the adapters that :func:`add_lora` made and ``save_pretrained`` wrote.

    Args:
        model: the quantised model that they were trained on.
        directory: of the adapters.
        options: of ``PeftModel.from_pretrained``; ``is_trainable=True`` goes on training.
    """
    config = PeftConfig.from_pretrained(os.fspath(directory))
    config.inference_mode = not options.get("is_trainable", False)
    config = knowing_packed_layers(config)
    _check_targets(model, config)
    return _unmergeable(PeftModel.from_pretrained(model, directory, config=config, **options))


def knowing_packed_layers(config: PeftConfig) -> LoraConfig:
    """A copy of a configuration with which PEFT wraps packed layers too.

    Raises:
        ConfigError: not a ``LoraConfig``, or one that initialises adapters by changing the weights below them.

    Example:
        >>> config = knowing_packed_layers(LoraConfig(init_lora_weights="pissa"))
        Traceback (most recent call last):
        tsq_layers.errors.ConfigError: init_lora_weights='pissa' changes the weights below an adapter, ...
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"{type(config).__name__}: packed layers take LoRA adapters, give a LoraConfig"
        )
    if config.init_lora_weights not in _INITIALISERS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights below an adapter, "
            "which are packed: give True or 'gaussian'"
        )
    config = copy.deepcopy(config)
    config._register_custom_module(
        {QuantLinear: LoraQuantLinear, QuantEmbedding: LoraQuantEmbedding}
    )
    return config


def _check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse what PEFT would silently not train.

    Raises:
        ConfigError: a packed layer among the ``modules_to_save``, those that PEFT adds by the task
            included; a packed output
            layer that is one module with the table of the inputs, of which PEFT sees only the latter.
    """
    saved_names = {*(config.modules_to_save or ()), *_SAVED_BY_TASK.get(config.task_type or "", ())}
    names_by_id = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(isinstance(part, PackedStorage) for part in module.modules()):
            continue
        if name.rpartition(".")[2] in saved_names or name in saved_names:
            raise ConfigError(
                f"{name!r} is packed, and would be trained as one of the modules to save of "
                f"task_type={config.task_type!r}, modules_to_save="
                f"{config.modules_to_save!r}: quantise the model with it in skip"
            )
        first = names_by_id[id(module)]
        if first != name and (
            config.trainable_token_indices or check_target_module_exists(config, name)
        ):
            raise ConfigError(
                f"{name!r} is the very packed matrix of {first.removesuffix('.matrix')!r}, and "
                "PEFT would adapt only one of them: leave it "
                "out of target_modules (and trainable_token_indices), or quantise the model with both in skip"
            )


def _unmergeable(adapted: PeftModel) -> PeftModel:
    """Let merging be refused before any layer is merged: afterwards the float ones would have lost their adapters."""
    if any(isinstance(module, _Unmergeable) for module in adapted.modules()):
        vars(adapted.base_model).update(
            merge_adapter=_refuse_merging, merge_and_unload=_refuse_merging
        )
    return adapted


def _refuse_merging(*_: Any, **__: Any) -> None:
    """Raise: packed weights have few values to a group, and a sum with an adapter is not among them.

    Raises:
        StateError: always.
    """
    raise StateError(
        "adapters cannot be merged into packed weights: keep them beside (save_pretrained writes them), "
        "or merge them into the float model and quantise that"
    )


class _Unmergeable:
    """Refuses what would write into a packed weight."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Raise, as :func:`_refuse_merging`."""
        _refuse_merging()


class LoraQuantLinear(_Unmergeable, Linear):
    """An adapter on a :class:`~tsq_layers.runtime.linear.QuantLinear`; gradients go to the adapter and to the input."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        self.fan_in_fan_out = False  # also where it took the place of a Conv1D

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Of the packed layer; PEFT would ask this of layers that it knows."""
        assert isinstance(module, QuantLinear)
        return module.in_features, module.out_features


class LoraQuantEmbedding(_Unmergeable, Embedding):
    """An adapter on a :class:`~tsq_layers.layers.embedding.QuantEmbedding`."""


def _linear_layers(model: nn.Module) -> list[str]:
    """Linear layers, packed or not, but for the one that gives the output of a language model."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    kinds = (nn.Linear, QuantLinear)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and not name.endswith(".matrix")
    ]
