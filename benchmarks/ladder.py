"""Perplexity of SmolLM2-135M as the steps of the method are added one by one.

    python benchmarks/ladder.py [--bits 2 3] [--steps rtn gptq …] [--text FILE …] [--out DIR]

The data are those of `tsq demo`: 32,768 tokens of State of the Union addresses of 1946–1999 for
calibration, 8,192 tokens of those of 2000 and later for evaluation, and as many of each `--text`.
Groups of 64. Results are kept as JSON lines in `--out` as they are done; an interrupted run goes on.
"""

import argparse
import time
from pathlib import Path

import torch

import tsq_layers as tsq
from tsq_layers.cli.demonstration import assets, results
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)

STEPS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "stage 1, blocks": {"grid_metric": "blocks", "refine": "none", "deviation": "none"},
    "stage 1": {"refine": "none", "deviation": "none"},
    "stage 1+2": {"deviation": "none"},
    "stage 1+2, R in stage 2": {"deviation": "refine"},
    "two-stage, blocks, R at 0.25": {"grid_metric": "blocks", "deviation_strength": 0.25},
    "two-stage": {},
}


def drawn(tokens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Windows drawn evenly from a text, one behind the other."""
    return torch.cat([batch["input_ids"].flatten() for batch in windows(tokens, length, count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("tsq-ladder"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cache = assets.cache_directory()
    directory, files = assets.smollm2(cache), assets.speeches(cache)
    tokenizer = load_tokenizer(directory)
    calibration = windows(
        read_tokens(assets.text_of_years(files, 1946, 1999), tokenizer), 1024, 32, 1
    )
    texts = {
        "speeches": drawn(read_tokens(assets.text_of_years(files, 2000, 9999), tokenizer), 8, 1024)
    }
    texts |= {path.stem: drawn(read_tokens(path, tokenizer), 8, 1024) for path in arguments.text}

    def row(name: str, config: tsq.QuantConfig | None) -> results.Row:
        key = results.fingerprint(
            name, config and config.to_dict(), sorted(texts), results.library_digest()
        )
        known = results.kept(arguments.out / "runs.jsonl").get(key)
        if known is not None:
            return known
        model, started = load_causal_lm(directory), time.perf_counter()
        if config is not None:
            model = tsq.quantize(model, config, calibration if config.needs_calibration else None)
        seconds = time.perf_counter() - started
        found = results.Row(
            method=name,
            bits=config.bits if config else 32,
            group_size=config.group_size if config else None,
            bits_per_weight=(model.tsq_report.bits_per_weight or 0.0) if config else 32.0,
            size=model.tsq_report.size_after if config else 0,
            perplexity={text: tsq.perplexity(model, tokens) for text, tokens in texts.items()},
            seconds=seconds,
        )
        results.keep(arguments.out / "runs.jsonl", key, found)
        ratios = [f"{text} {value:.2f}" for text, value in found.perplexity.items()]
        print(f"{found.label}: {', '.join(ratios)}; {seconds:.0f} s", flush=True)
        return found

    rows = [row("float", None)]
    for bits in arguments.bits:
        rows += [
            row(name, tsq.QuantConfig(bits=bits, group_size=64, **STEPS[name]))
            for name in arguments.steps
        ]
    print("\n".join(results.table(rows)))


if __name__ == "__main__":
    main()
