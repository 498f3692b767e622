"""Hugging Face transformers: causal language models and tokenizers in local directories. Never goes to the network."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import CheckpointError, ConfigError, MissingExtraError
from tsq_layers.formats.tsq.headers import is_described, outlined
from tsq_layers.formats.tsq.outline import Outline
from tsq_layers.formats.tsq.writing import write

Directory = str | os.PathLike[str]

_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
DTYPES = ("float32", "float16", "bfloat16")


def load_causal_lm(directory: Directory, dtype: str = "float32") -> nn.Module:
    """A causal language model from a local directory, in evaluation mode on the CPU.

    Args:
        directory: a directory as ``save_pretrained`` writes it, or one that :func:`save_causal_lm`
            wrote: the quantised layers are then in place.
        dtype: of a float model: ``"float32"``, ``"float16"`` or ``"bfloat16"``. A quantised one has
            the dtypes that it was saved with.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: no such directory, not a transformers directory, not a causal language model.
        CheckpointError: the weights are missing, damaged, or do not belong to the configuration.

    Example:
        >>> model = load_causal_lm("SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    transformers = _transformers()
    path = _model_directory(directory)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: give one of {', '.join(map(repr, DTYPES))}")
    with quiet(transformers):
        if is_quantised(path):
            return _load_quantised(transformers, path).eval()
        return _load_float(transformers, path, getattr(torch, dtype)).eval()


def empty_causal_lm(directory: Directory, dtype: str = "float32") -> nn.Module:
    """The float model of a local directory on the meta device, in evaluation mode: shapes without values.

    Raises:
        MissingExtraError, ConfigError: as :func:`load_causal_lm`; or the directory holds a quantised model.

    Example:
        >>> model = empty_causal_lm("SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    transformers = _transformers()
    path = _model_directory(directory)
    if is_quantised(path):
        raise ConfigError(f"{path} holds a model that is quantised already: give the float model")
    with quiet(transformers):
        return _built_empty(transformers, path, dtype=getattr(torch, dtype)).eval()


def check_length(model: nn.Module, length: int, option: str) -> None:
    """Refuse sequences that are longer than the table of positions that a model has learned.

    Args:
        option: what asked for them, for the message.

    Raises:
        ConfigError: they are.
    """
    for name, module in model.named_modules():
        rows = getattr(module, "num_embeddings", None)
        if rows is not None and name.rpartition(".")[2] in _POSITION_TABLES:
            # RoBERTa counts positions from behind the index of padding.
            padding = getattr(module, "padding_idx", None)
            free_rows = rows if padding is None else rows - padding - 1
            config = getattr(model, "config", None)
            limit = min(free_rows, getattr(config, "max_position_embeddings", None) or free_rows)
            if length > limit:
                raise ConfigError(
                    f"{option} {length}: this {type(model).__name__} has learned positions for "
                    f"{limit} tokens; give at most so many"
                )


def load_tokenizer(directory: Directory) -> Any:
    """The tokenizer of a local model directory.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: no such directory, or no tokenizer in it.
    """
    transformers = _transformers()
    path = _model_directory(directory)
    if not any(
        (path / name).exists()
        for name in (
            "tokenizer_config.json",
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
        )
    ):
        raise ConfigError(
            f"{path} holds no tokenizer: save it there with tokenizer.save_pretrained({str(path)!r})"
        )
    try:
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the tokenizer in {path} cannot be loaded: {_first_line(error)}"
        ) from error


def save_causal_lm(model: nn.Module, tokenizer: Any, directory: Directory) -> None:
    """Save a quantised causal language model so that :func:`load_causal_lm` can build it again.

    Writes what ``tsq.save`` writes, and ``config.json``, ``generation_config.json`` and the files of the
    tokenizer. ``from_pretrained`` of transformers loads the directory too, once
    :mod:`tsq_layers.integrations.transformers` is imported.

    Args:
        model: a transformers model whose layers ``tsq.quantize`` replaced.
        tokenizer: its tokenizer; ``None`` writes none.
        directory: where to.
    """
    path = Path(directory)
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        raise ConfigError(
            f"{type(model).__name__} has no transformers config; save it with tsq.save"
        )
    outline = Outline.of(model)
    write(model, path, outline.placeholders)
    report = getattr(model, "tsq_report", None)
    # Not at the top: these files are read without transformers too, by the command line.
    from tsq_layers.integrations.transformers.config import TsqConfig  # noqa: PLC0415

    config.quantization_config = TsqConfig(
        None if report is None else report.config, outline=outline
    )
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)  # type: ignore[operator, union-attr]
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """No log messages of transformers inside but errors, and no progress bars unless stderr is a terminal.

    What it would report about missing weights is raised as an error here.
    """
    logging = transformers.utils.logging
    has_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if has_bar and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _load_float(transformers: ModuleType, path: Path, dtype: torch.dtype | str) -> nn.Module:
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a causal language model that transformers knows: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the model in {path} cannot be loaded: {_first_line(error)}"
        ) from error
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            first = min(map(str, info[what]))
            raise CheckpointError(
                f"the weights in {path} are not a {type(model).__name__}: {len(info[what])} "
                f"{what.replace('_', ' ')}, first {first!r}"
            )
    return model  # type: ignore[no-any-return]


def is_quantised(path: Path) -> bool:
    """Return whether a directory holds a quantised model, written by this library or by ``save_pretrained``."""
    return is_described(path) or outlined(path) is not None


def _load_quantised(transformers: ModuleType, path: Path) -> nn.Module:
    if is_described(path):
        return tsq.load(path, _built_empty(transformers, path))
    # With this import transformers knows packed layers; it needs transformers itself.
    from tsq_layers.integrations.transformers import quantizer  # noqa: F401, PLC0415

    return _load_float(transformers, path, "auto")


def _built_empty(transformers: ModuleType, path: Path, **options: Any) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a causal language model that transformers knows: {_first_line(error)}"
        ) from error


def _model_directory(directory: Directory) -> Path:
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"no directory {path}")
    if not (path / "config.json").exists():
        raise ConfigError(
            f"{path} holds no config.json: give the directory of a transformers model"
        )
    return path


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError('this needs transformers: pip install "tsq_layers[hf]"') from error
