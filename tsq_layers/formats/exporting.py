"""`export`: one call for all formats."""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tsq_layers.config import QuantConfig
from tsq_layers.errors import ExportError, ExportWarning
from tsq_layers.formats.compressed_tensors import writing as compressed_tensors
from tsq_layers.formats.configurations import check_configuration
from tsq_layers.formats.contents import Contents, Layer, read
from tsq_layers.formats.directory import byte_count, new_directory, write_description, write_tensors
from tsq_layers.formats.engines import check_engine, warn_unserved
from tsq_layers.formats.floats import Stored
from tsq_layers.formats.forecast import planned_layers
from tsq_layers.formats.gguf import writing as gguf
from tsq_layers.formats.gguf.tokenizer import tokenizer_metadata
from tsq_layers.formats.gptq import writing as gptq
from tsq_layers.formats.limits import is_exact
from tsq_layers.numerics.memory import dtype_name


@dataclass(frozen=True, kw_only=True)
class Format:
    """The functions that write a format.

    Args:
        takes: whether it can hold a layer packed.
        holds: the same in words.
        check: refuses what it cannot hold, before anything is written.
        write: (contents, tokenizer, folder, bytes of a shard) writes it.
        check_model: refuses models of which it holds nothing.
        in_model_dtype: whether engines turn the scales to the dtype of the model when they load it.
    """

    takes: Callable[[Layer], bool]
    holds: str
    check: Callable[[Contents, Any], None]
    write: Callable[[Contents, Any, Path, int], None]
    check_model: Callable[[nn.Module], None] = lambda _: None
    in_model_dtype: bool = True


def export_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str,
    tokenizer: Any = None,
    engine: str | None = None,
    dequantize_others: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a quantised transformers model so that other engines load it.

    Codes and scales are packed, never rounded again.

    ======================== ================================================ =====================================
    format                   holds                                            served by
    ======================== ================================================ =====================================
    ``"gptq"``, version 2    2, 3, 4, 8 bits; one width and group size        transformers, GPTQModel
    ``"gptq-v1"``            the same with zero points of at least 1          transformers; symmetric: GPTQModel,
                                                                              vLLM (4 bits)
    ``"compressed-tensors"`` 1 to 8 bits, mixed                               transformers (asymmetric:
                                                                              ``dequantize=True``); vLLM (4 bits)
    ``"gguf"``               4, 5, 8 bits symmetric, mixed; groups of a       llama.cpp, transformers
                             multiple of 32
    ======================== ================================================ =====================================

    ``"gptq"`` and ``"compressed-tensors"`` write a directory that ``from_pretrained`` loads; ``"gguf"``
    writes ``model.gguf``, of Llama and Mistral models. The first two and ``"gptq-v1"`` need groups that
    divide the row; in gptq files K and N are multiples of 32.

    Args:
        model: a transformers model that ``tsq.quantize`` has quantised; not changed.
        directory: must not exist, or be empty. All is written beside it and renamed at the end, or
            into an empty one and
            moved up.
        format: as above.
        tokenizer: its tokenizer, whose files are written too. llama.cpp takes token numbers only without one.
        engine: ``"transformers"``, ``"gptqmodel"``, ``"vllm"`` or ``"llama.cpp"``: you are warned if it is known
            not to serve what is written.
        dequantize_others: write layers that the format cannot hold (convolutions, tables, experts, an output
            layer) as floats.
        max_shard_size: bytes of a file, as a number or as ``"5GB"``.

    Returns:
        the directory, or the file in it if the format is a single file.

    Raises:
        StateError: nothing in the model is quantised, or it has tensors without values.
        ExportError: what the format cannot hold, and the nearest that it can; or ``directory`` cannot be written.
            Nothing of the export is left behind then.

    Warns:
        ExportWarning: ``engine`` cannot serve what is written; or engines that load it in the dtype of the
            model round the scales.

    Example:
        >>> import tempfile
        >>> import tsq_layers as tsq
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
        >>> model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=32, symmetric=True, method="rtn"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in export_checkpoint(model, Path(folder, "out"), format="gptq").iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    if engine is not None:
        check_engine(engine)
    limit = byte_count(max_shard_size)
    contents = checked(
        model, format=format, tokenizer=tokenizer, dequantize_others=dequantize_others
    )
    chosen = FORMATS[format]
    if chosen.in_model_dtype:
        _warn_rounded_scales(contents)
    if engine is not None:
        warn_unserved(engine, format, contents.held)
    with new_directory(directory) as folder:
        chosen.write(contents, tokenizer, folder, limit)
    target = Path(directory)
    return target / gguf.FILE if format == "gguf" else target


def checked(
    model: nn.Module,
    *,
    format: str,
    tokenizer: Any = None,
    dequantize_others: bool = False,
    config: QuantConfig | None = None,
) -> Contents:
    """Return what :func:`export_checkpoint` would write, or refuse it.

    Args:
        model: a quantised model; a float one, if ``config`` says how it is to be quantised: what depends on the
            values of codes and grids is not looked at then.
        format, tokenizer, dequantize_others: as there.
        config: of the calibration that is yet to come.

    Raises:
        StateError, ExportError: as there.
        ConfigError, LayerError: as ``prepare`` says.
    """
    if format not in FORMATS:
        raise ExportError(f"format={format!r}: give one of {', '.join(map(repr, FORMATS))}")
    chosen, planned = FORMATS[format], None
    chosen.check_model(model)
    if config is not None:
        check_configuration(config, format)
        planned = planned_layers(model, config)
    contents = read(
        model,
        chosen.takes,
        format_name=format,
        holds=chosen.holds,
        dequantize_others=dequantize_others,
        planned=planned,
    )
    chosen.check(contents, tokenizer)
    return contents


def _warn_rounded_scales(contents: Contents) -> None:
    inexact = [
        name for name, layer in contents.held.items() if not is_exact(layer.scales, layer.dtype)
    ]
    if inexact:
        layer = contents.held[inexact[0]]
        warnings.warn(
            f"the file holds the {dtype_name(layer.scale_dtype)} scales of {len(inexact)} layers "
            "exactly, but the model is "
            f"{dtype_name(layer.dtype)}, and engines that load it in that dtype round them: load it with "
            f"dtype={dtype_name(layer.scale_dtype)!r}, or quantise with scale_dtype={dtype_name(layer.dtype)!r}",
            ExportWarning,
            stacklevel=3,
        )


def _write_checkpoint(
    tensors: Callable[[Contents], list[Stored]],
    description: Callable[[Contents], Mapping[str, Any]],
    contents: Contents,
    tokenizer: Any,
    folder: Path,
    limit: int,
) -> None:
    """A directory that ``from_pretrained`` loads."""
    write_tensors(folder, [*contents.floats, *tensors(contents)], limit)
    write_description(folder, contents.model, description(contents), contents.dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _gptq(version: int) -> Format:
    tensors = functools.partial(gptq.tensors, version=version)
    description = functools.partial(gptq.description, version=version)
    return Format(
        takes=gptq.takes,
        holds="linear layers in the blocks of a model",
        check=lambda contents, _: gptq.check_contents(contents, version),
        write=functools.partial(_write_checkpoint, tensors, description),
    )


def _check_gguf(contents: Contents, tokenizer: Any) -> None:
    gguf.check_contents(contents)
    tokenizer_metadata(tokenizer, contents.config.vocab_size)


FORMATS: dict[str, Format] = {
    "gptq": _gptq(version=2),
    "gptq-v1": _gptq(version=1),
    "compressed-tensors": Format(
        takes=compressed_tensors.takes,
        holds="linear layers",
        check=lambda contents, _: compressed_tensors.check_contents(contents),
        write=functools.partial(
            _write_checkpoint, compressed_tensors.tensors, compressed_tensors.description
        ),
    ),
    "gguf": Format(
        takes=gguf.takes,
        holds="linear layers and the embedding",
        check=_check_gguf,
        write=lambda contents, tokenizer, folder, _: gguf.write(contents, tokenizer, folder),
        check_model=gguf.check_model,
        in_model_dtype=False,
    ),
}
