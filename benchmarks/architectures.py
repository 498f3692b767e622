"""Which models of transformers go the whole way? Every architecture, tiny and with random weights.

    python benchmarks/architectures.py [--heads causal masked …] [--only NAME …] [--config JSON] [--out FILE]

A model is built from its own configuration with all sizes reduced (`SIZES`, and `OWN` where sizes depend on one
another), quantised to 4 bits in groups of 16, two-stage, on four random batches, and saved and loaded by both doors:
`tsq.save` and `tsq.load`, `save_pretrained` and `from_pretrained`. Its outputs must stay finite, and be the same to
the last bit after loading. What cannot be made that small, or does not run in floats on such inputs, says nothing
about this library: it is counted apart. Language-and-image models get text alone, so that their
towers are never called.

Results are JSON lines in `--out`; an interrupted run goes on.
"""

import argparse
import copy
import dataclasses
import json
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tsq_layers as tsq
import tsq_layers.integrations.transformers  # from_pretrained knows packed layers

Batch = dict[str, Tensor]

VOCABULARY, SIDE, TOKENS, SEQUENCES = 128, 32, 16, 4
MOST_PARAMETERS, MOST_SECONDS = 30_000_000, 240
CONFIG = {"bits": 4, "group_size": 16, "skip": ()}

SIZES: tuple[tuple[str, int], ...] = (
    (
        r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_blocks|num_hidden_groups)",
        4,
    ),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|word_embed_proj_dim|embedding_size|encoder_hidden_size",
        64,
    ),
    (
        r"attention_hidden_size|lru_width|emb_dim|projection_dim|out_hidden_size|hidden_size_per_layer_input",
        64,
    ),
    (r".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|intermediate_dim|n_inner)", 96),
    (r".*(num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups)", 2),
    (r".*(num_attention_heads|n_heads?|num_heads|attention_heads|num_query_heads)", 4),
    (
        r"head_dim|d_kv|v_head_dim|qk_head_dim|attention_head_dim|attention_head_size|global_head_dim|swa_head_dim",
        16,
    ),
    (r"linear_(key|value)_head_dim", 16),
    (r"qk_(rope|nope)_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank", 32),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", 4),
    (
        r".*(num_experts_per_tok|experts_per_token|moe_topk|moe_k|num_selected_experts|top_k_experts|moe_top_k)",
        2,
    ),
    (r"n_group|topk_group|first_k_dense_replace", 1),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r".*(state_size|d_state)", 8),
    (r".*(vocab_size|num_embeddings).*", VOCABULARY),
    (
        r".*(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_sequence_length)",
        64,
    ),
    (r".*(sliding_window|attention_window_size)", 8),
    (r"image_size|img_size", SIDE),
    (r"patch_size", 8),
    (r".*_token_(id|index)", 1),
)
"""Names of integers in configurations → the most that they are."""

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = {"num_key_value_heads": 4, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
OWN: Mapping[str, Mapping[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cpmant": {"dim_ff": 96},
    "ctrl": {"dff": 96},
    "deepseek_v2": {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v32": SPARSE,
    "glm_moe_dsa": SPARSE,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        **MAMBA,
        **EXPERTS,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 64,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one architecture.

    Args:
        head: one of `HEADS`.
        name: the ``model_type`` of its configuration.
        reached: "done", or the step that failed; "building" and "floats" are not this library's.
        why: what was raised there, or what was not as it should be.
        seconds: that quantising took.
        coverage: share of the parameters that was quantised.
        error: distance of the outputs to those of the float model, relative to their spread.
    """

    head: str
    name: str
    reached: str
    why: str = ""
    seconds: float = 0.0
    coverage: float = 0.0
    error: float = 0.0


class WrongError(Exception):
    """An output that is not as it should be."""


# --- models and data -----------------------------------------------------------------------------


def text(seed: int) -> Batch:
    """Random tokens."""
    return {
        "input_ids": _tokens(seed, TOKENS),
        "attention_mask": torch.ones(SEQUENCES, TOKENS, dtype=torch.long),
    }


def translation(seed: int) -> Batch:
    """Tokens of both sides."""
    return {**text(seed), "decoder_input_ids": _tokens(seed + 100, TOKENS // 2)}


def images(seed: int) -> Batch:
    """Noise."""
    return {
        "pixel_values": torch.randn(
            SEQUENCES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)
        )
    }


def _tokens(seed: int, count: int) -> Tensor:
    return torch.randint(
        3, VOCABULARY - 8, (SEQUENCES, count), generator=torch.Generator().manual_seed(seed)
    )


HEADS: Mapping[str, tuple[Mapping[str, Any], Callable[[int], Batch]]] = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, text),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, text),
    "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, translation),
    "image": (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, images),
    "image-text": (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, text),
}


def reduced(kind: type[Any], depth: int = 0) -> dict[str, Any]:
    """Arguments of a configuration class that make the model small, those of its parts included."""
    standard: Any = kind() if _makes(kind) else None
    parts = dict(getattr(kind, "sub_configs", None) or {})
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        usual = _usual(standard, field.name)
        most = next((most for names, most in SIZES if re.fullmatch(names, field.name)), None)
        if (
            field.name not in parts
            and isinstance(usual, int)
            and not isinstance(usual, bool)
            and most is not None
        ):
            values[field.name] = min(usual, most)
    for name, declared in parts.items():
        part = type(usual) if (usual := _usual(standard, name)) is not None else declared
        if depth < 3 and getattr(part, "model_type", ""):
            values[name] = {**reduced(part, depth + 1), "model_type": part.model_type}
    return values


def _makes(kind: type[Any]) -> bool:
    try:
        kind()
    except Exception:  # noqa: BLE001  # whatever it is that this one cannot be made without
        return False
    return True


def _usual(standard: Any, name: str) -> Any:
    try:
        return getattr(standard, name, None)
    except Exception:  # noqa: BLE001  # some differ by layer, and say so
        return None


def built(head: str, name: str) -> nn.Module:
    """A model in evaluation mode.

    Raises:
        Exception: it cannot be made small that way.
    """
    names = HEADS[head][0][name]
    kind: Any = getattr(transformers, names if isinstance(names, str) else names[0])
    whole: Any = CONFIG_MAPPING[name]
    config = whole(**{**reduced(whole), **OWN.get(name, {})})
    if head == "causal":
        config = config.get_text_config()
    config.use_cache = False
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    return _livened(kind(config)).eval()


def _livened(model: nn.Module) -> nn.Module:
    """With weights large enough that every layer shows in the output."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 / 2 + 0.02)
    return model


def output(model: nn.Module, batch: Batch) -> Tensor:
    """The logits, or the first tensor."""
    with torch.no_grad():
        found: Any = model(**batch)
    found = getattr(found, "logits", None) if getattr(found, "logits", None) is not None else found
    while not isinstance(found, Tensor):
        found = found.to_tuple()[0] if hasattr(found, "to_tuple") else found[0]
    return found.float()


# --- the way -------------------------------------------------------------------------------------


def row(head: str, name: str, config: tsq.QuantConfig) -> Row:
    """One architecture, the whole way."""
    step, values = "building", {}
    signal.alarm(MOST_SECONDS)
    try:
        model = built(head, name)
        step = "floats"
        batches = [HEADS[head][1](seed) for seed in range(4)]
        expected = output(model, batches[0])
        _check(expected.isfinite().all(), "not finite")
        _check(torch.equal(output(model, batches[0]), expected), "another output each time")
        step = "quantising"
        started = time.perf_counter()
        quantised = tsq.quantize(
            copy.deepcopy(model), config, batches if config.needs_calibration else None
        )
        values["seconds"] = round(time.perf_counter() - started, 2)
        found = output(quantised, batches[0])
        values["coverage"] = round(quantised.tsq_report.coverage, 3)
        values["error"] = round(
            ((found - expected).norm() / (expected - expected.mean()).norm()).item(), 4
        )
        _check(found.isfinite().all(), "not finite")
        with tempfile.TemporaryDirectory() as folder:
            step = "tsq.load"
            tsq.save(quantised, f"{folder}/own")
            loaded = tsq.load(f"{folder}/own", type(model)(copy.deepcopy(model.config)).eval())
            _check(torch.equal(output(loaded, batches[0]), found), "another output than before")
            step = "from_pretrained"
            quantised.save_pretrained(f"{folder}/theirs")
            loaded = type(model).from_pretrained(f"{folder}/theirs").eval()
            _check(torch.equal(output(loaded, batches[0]), found), "another output than before")
        return Row(head=head, name=name, reached="done", **values)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what we want to know
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {str(error).strip()[:300]} ({Path(where.filename).name}:{where.lineno})"
        return Row(head=head, name=name, reached=step, why=why, **values)
    finally:
        signal.alarm(0)


def _check(sound: bool | Tensor, problem: str) -> None:
    if not sound:
        raise WrongError(problem)


def _late(*_: object) -> None:
    raise TimeoutError(f"{MOST_SECONDS} s")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All that was asked for, from the file of results where it is there already."""
    out, config = options.out, tsq.QuantConfig(**CONFIG, **options.config)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    kept = {(each.head, each.name): each for each in (Row(**json.loads(line)) for line in lines)}
    for head in options.heads:
        for name in HEADS[head][0]:
            if options.only and name not in options.only:
                continue
            if (head, name) not in kept or options.only:
                kept[head, name] = row(head, name, config)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(kept[head, name])) + "\n")
                print(head, name, kept[head, name].reached, kept[head, name].why, flush=True)
            yield kept[head, name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--only", nargs="+", default=[], help="these architectures, anew")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="more fields of the QuantConfig, as JSON"
    )
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _late)
    found = list(rows(options))
    print(
        "\n| head | tried | not built | no floats | went in | done |\n|---|---:|---:|---:|---:|---:|"
    )
    for head in options.heads:
        counts = Counter(each.reached for each in found if each.head == head)
        tried = counts.total()
        unbuilt, no_floats = counts["building"], counts["floats"]
        print(
            f"| {head} | {tried} | {unbuilt} | {no_floats} | {tried - unbuilt - no_floats} | {counts['done']} |"
        )
    for each in found:
        if each.reached not in ("done", "building", "floats"):
            print(f"{each.head} {each.name}: {each.reached}: {each.why}")


if __name__ == "__main__":
    main()
