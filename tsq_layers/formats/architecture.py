"""The float model that a checkpoint is of, without weights: built by transformers from its ``config.json``."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import CheckpointError, MissingExtraError


def empty_model(directory: Path) -> nn.Module:
    """Build the model of a directory on the meta device, in evaluation mode.

    Its ``config`` has no ``quantization_config``.

    Buffers that are not saved (those of rotary embeddings) have their values, on the CPU.

    Args:
        directory: with a ``config.json`` of transformers.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: an architecture that transformers does not know, or buffers that it cannot make.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            'this needs transformers: pip install "tsq_layers[hf]", or give a model'
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"config.json in {directory} is not one that transformers knows: {error}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = getattr(config, "architectures", None) or ()
    kind = next(
        (found for name in names if (found := getattr(transformers, name, None)) is not None), None
    )
    if kind is None:
        raise CheckpointError(
            f"transformers knows no architecture {', '.join(names) or 'of this config.json'}: "
            "build the model and give it as the second argument"
        )
    with torch.device("meta"):
        model: Any = kind(config)
    _make_buffers(model, directory)
    return model.eval()  # type: ignore[no-any-return]


def _make_buffers(model: Any, directory: Path) -> None:
    """Give buffers that are not saved the values that transformers starts them with."""
    for name, module in model.named_modules():
        local = {
            key: buffer
            for key, buffer in module.named_buffers(recurse=False)
            if _is_derived(module, key, buffer)
        }
        if not local:
            continue
        for key, buffer in local.items():
            empty = torch.empty_like(buffer, device="cpu")
            setattr(module, key, empty.fill_(torch.nan) if buffer.is_floating_point() else empty)
            for attribute, value in list(
                vars(module).items()
            ):  # some keep the first value beside the buffer
                if value is buffer:
                    setattr(module, attribute, getattr(module, key))
        with torch.no_grad():
            model._init_weights(module)
        for key in local:
            made = getattr(module, key)
            if not made.is_floating_point() or bool(torch.isnan(made).any()):
                raise CheckpointError(
                    f"buffer {key!r} of {name!r} is not in {directory} and transformers makes it in a way of its own: "
                    "build the model on the CPU and give it as the second argument"
                )


def _is_derived(module: nn.Module, key: str, buffer: Tensor) -> bool:
    return buffer.is_meta and key in module._non_persistent_buffers_set
