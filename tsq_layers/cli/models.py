"""Models in directories of every kind: float ones, this library's own, and those of other tools."""

import argparse
import json
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.cli.options import OWN_FORMAT
from tsq_layers.cli.output import summary, write, write_json, write_summary
from tsq_layers.config import QuantConfig
from tsq_layers.errors import CheckpointError, ConfigError, ExportError
from tsq_layers.formats.exporting import checked
from tsq_layers.formats.tsq.headers import is_described
from tsq_layers.formats.tsq.outline import QUANT_METHOD
from tsq_layers.integrations import causal_lm as bridge


def is_foreign(directory: str | Path) -> bool:
    """Return whether a directory holds a checkpoint that another tool has quantised."""
    path = Path(directory)
    if is_described(path):
        return False
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # The function that reads the model afterwards says what is the matter with the file.
        return False
    if not isinstance(config, dict):
        return False
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        return quantization.get("quant_method") != QUANT_METHOD
    return quantization is not None


def load(directory: str | Path, dtype: str | None = None) -> nn.Module:
    """Load the model of a directory of any kind; without ``dtype`` a quantised one has that of its files."""
    if is_foreign(directory):
        torch_dtype = None if dtype is None else getattr(torch, dtype)
        with bridge.quiet(bridge._transformers()):
            return tsq.import_checkpoint(directory, dtype=torch_dtype)
    return bridge.load_causal_lm(directory, dtype or "float32")


def load_quantised(directory: str | Path) -> nn.Module:
    """Load the quantised model of a directory, in the dtypes of its files.

    Raises:
        ConfigError: it is a float model.
    """
    path = Path(directory)
    # A directory without a configuration is refused by the loader, with a better message.
    has_config = (path / "config.json").exists()
    if has_config and not bridge.is_quantised(path) and not is_foreign(path):
        raise ConfigError(
            f"{path} holds a float model: quantise it first, with tsq quantize {path} --out …"
        )
    return load(directory)


def tokenizer_of(directory: str | Path) -> Any:
    """Load the tokenizer of a directory, or ``None`` if there is none."""
    try:
        return bridge.load_tokenizer(directory)
    except ConfigError:
        return None


def check_out(arguments: argparse.Namespace, sources: Mapping[str, str]) -> None:
    """Refuse an ``--out`` that would be refused only after hours of work.

    Args:
        sources: what is read → its directory.

    Raises:
        ConfigError: it is the directory of a source; it cannot be written; or it holds something already (or will,
            as ``--checkpoint-dir``), and no format replaces it.
    """
    out = Path(arguments.out).absolute()
    for description, source in sources.items():
        if out.resolve() == Path(source).resolve():
            raise ConfigError(
                f"--out {arguments.out} is the directory of {description}: give another one"
            )
    if arguments.format != OWN_FORMAT:
        _check_empty(out, arguments)
    # A temporary directory shows whether files can be made, which permission bits do not on every system.
    existing = next(path for path in (out, *out.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".tsq-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {arguments.out} cannot be written ({existing}: {error.strerror}): give another one"
        ) from error


def _check_empty(out: Path, arguments: argparse.Namespace) -> None:
    """Refuse a directory that holds something, or will; formats of other libraries replace none."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"--out {arguments.out} exists and is no empty directory: give another one, or remove it"
        )
    journal = getattr(arguments, "checkpoint_dir", None)
    if journal is not None and Path(journal).resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--checkpoint-dir {journal} is in --out {arguments.out}, which must be empty: give another one"
        )


def check_format(
    model: nn.Module,
    tokenizer: Any,
    arguments: argparse.Namespace,
    config: QuantConfig | None = None,
) -> None:
    """Refuse what ``--format`` cannot hold of a model before it is calibrated with ``config``, or refined."""
    if arguments.format != OWN_FORMAT:
        others = arguments.dequantize_others
        checked(
            model,
            format=arguments.format,
            tokenizer=tokenizer,
            dequantize_others=others,
            config=config,
        )


def save(
    model: nn.Module, tokenizer: Any, arguments: argparse.Namespace, *, fresh: bool = False
) -> None:
    """Write a model in ``--format`` to ``--out``, and what it is to stdout.

    Args:
        fresh: it is nowhere else: if the format turns out not to hold it, it is saved as this library does.

    Raises:
        ExportError: the format does not hold it; where it is then.
    """
    out = Path(arguments.out)
    if arguments.format == OWN_FORMAT:
        bridge.save_causal_lm(model, tokenizer, out)
        message = f"saved in {arguments.out}; tsq inspect {arguments.out} shows every layer"
    else:
        try:
            out = tsq.export_checkpoint(
                model,
                out,
                format=arguments.format,
                tokenizer=tokenizer,
                engine=arguments.engine,
                dequantize_others=arguments.dequantize_others,
                max_shard_size=getattr(arguments, "max_shard_size", "5GB"),
            )
        except Exception as error:
            if not fresh:
                raise
            raise ExportError(f"{error}. {_kept(model, tokenizer, out.absolute())}") from error
        message = f"saved as {arguments.format} in {out}"
    if arguments.json:
        write_json(summary(model, out, arguments.format))
        return
    write_summary(model)
    write(message)


def _kept(model: nn.Module, tokenizer: Any, out: Path) -> str:
    """Save a model that could not be exported in this library's own format.

    Returns:
        the directory: beside where the export should be, or among temporary files.
    """
    problems = []
    for parent in (out.parent, Path(tempfile.gettempdir())):
        place = parent / f"{out.name}-tsq-{secrets.token_hex(3)}"
        try:
            bridge.save_causal_lm(model, tokenizer, place)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
        else:
            return f"The quantised model is in {place}, which tsq export reads"
    return f"Nor could it be saved: {'; '.join(problems)}"
