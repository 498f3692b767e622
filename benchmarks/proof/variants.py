"""Fields of a configuration that the table does not have, one or a few at a time."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import tsq_layers as tsq
from benchmarks.proof.artefacts import record_layers, record_plan, record_state
from benchmarks.proof.case import Case
from benchmarks.proof.library import configured
from benchmarks.proof.models import MODELS, output
from benchmarks.proof.record import Record

_AUTO = {"damping": "auto", "deviation_strength": "auto", "deviation_damping": "auto"}
_FLOAT = {"zero_points": "float"}

GENERAL: dict[str, dict[str, Any]] = {
    "joint": {"joint_rounds": 2},
    "joint-symmetric": {"joint_rounds": 2, "symmetric": True, "joint_sweeps": 2},
    "joint-float": {**_FLOAT, "joint_rounds": 2},
    "refine-descent": {"refine": "descent", "refine_sweeps": 2},
    "refine-descent-float": {**_FLOAT, "refine": "descent"},
    "refine-none": {"refine": "none"},
    "refine-ridge": {"refine_ridge": 0.0},
    "blocks": {"grid_metric": "blocks"},
    "blocks-float": {**_FLOAT, "grid_metric": "blocks", "deviation": "refine"},
    "deviation-refine": {"deviation": "refine"},
    "deviation-none": {"deviation": "none"},
    "deviation-full": {"deviation_strength": 1.0, "deviation_damping": 0.1},
    "auto": _AUTO,
    "quantease-auto": {"method": "quantease", **_AUTO},
    "damping": {"damping": 0.1},
    "row": {"group_size": None},
    "row-rtn": {"group_size": None, "method": "rtn"},
    "ragged": {"group_size": 20},
    "ragged-float": {**_FLOAT, "group_size": 20},
    "ragged-lnq": {"group_size": 20, "method": "lnq", "codebook": "group"},
    "scales-bfloat16": {"scale_dtype": "bfloat16"},
    "scales-float32": {**_FLOAT, "scale_dtype": "float32"},
    "in-order": {"act_order": False},
    "in-order-gptq": {"act_order": False, "method": "gptq"},
    "quantease-nearest": {"method": "quantease", "descent_start": "nearest", "descent_sweeps": 2},
    "quantease-relaxed": {"method": "quantease", "descent_relax": True},
    "quantease-refine": {"method": "quantease", "deviation": "refine"},
    "cdquant-nearest": {"method": "cdquant", "descent_start": "nearest"},
    "cdquant-pairs": {"method": "cdquant", "greedy_pairs": True, "greedy_steps": 0.5},
    "lnq-rounds": {"method": "lnq", "codebook_rounds": 1, "codebook_sweeps": 2},
    "lnq-none": {"method": "lnq", "deviation": "none", "scale_dtype": "float32"},
    "embeddings": {"embeddings": True, "skip": []},
    "embeddings-rotation": {"embeddings": True, "skip": [], "rotation": 16},
    "embeddings-rtn": {"embeddings": True, "skip": [], "method": "rtn"},
    "distill": {"distill_epochs": 2},
    "distill-float": {**_FLOAT, "distill_epochs": 1, "distill_rate": 0.01},
    "distill-lnq": {"method": "lnq", "distill_epochs": 1},
}
"""What any model can have."""

OF_LANGUAGE: dict[str, dict[str, Any]] = {
    "scaling": {"channel_scaling": True},
    "scaling-rtn": {"channel_scaling": True, "method": "rtn"},
    "scaling-rotation": {"channel_scaling": True, "rotation": 64, "activation_bits": 8},
    "guidance": {"guidance": 2},
    "guidance-gptq": {"guidance": 2, "method": "gptq"},
    "guidance-lnq": {"guidance": 1, "method": "lnq"},
    "guidance-best": {"guidance": 2, "method": "best"},
    "best-all": {"method": "best", "activation_bits": 8, "distill_epochs": 1, "embeddings": True},
    "outliers-inputs": {"method": "quantease", "outliers": 0.05, "activation_bits": 8},
    "outliers-rotation": {"method": "quantease", "outlier_columns": 3, "rotation": 16},
    "overrides": {
        "skip": ["lm_head", "*.0.self_attn.o_proj"],
        "overrides": {
            "*.down_proj": {"bits": 4, "method": "gptq"},
            "mlp.*": {"group_size": 32, "symmetric": True},
            "re:.*[qk]_proj": {"method": "best", "group_size": None},
            "v_proj": {"method": "lnq", "bits": 2},
            "no_such_layer": {"bits": 8},
        },
    },
}
"""What needs linear layers, a loss, or the names of a Llama."""

OF_EXPERTS: dict[str, dict[str, Any]] = {
    "experts-all": {"min_expert_tokens": 10_000},
    "experts-own": {"min_expert_tokens": 0},
    "experts-quantease": {"min_expert_tokens": 200, "method": "quantease", "outliers": 0.02},
    "experts-joint-float": {**_FLOAT, "joint_rounds": 1},
    "experts-auto": _AUTO,
    "experts-distill": {"distill_epochs": 1},
    "experts-scaling": {"channel_scaling": True},
}


_OF_GPT2 = ("joint", "refine-descent", "auto", "embeddings", "in-order-gptq", "distill")
_OF_TIED = ("embeddings", "embeddings-rotation", "embeddings-rtn")


def cases() -> Iterator[Case]:
    """List the cases."""
    yield from _of("llama", _widths())
    for name in ("llama", "vision"):
        yield from _of(name, GENERAL)
    yield from _of("llama", OF_LANGUAGE)
    yield from _of("mixtral", OF_EXPERTS)
    yield from _of("gpt2", {variant: GENERAL[variant] for variant in _OF_GPT2})
    yield from _of("gpt2", _methods("best", "rtn", "cdquant"))
    yield from _of("tied", {variant: GENERAL[variant] for variant in _OF_TIED})
    for name in ("llama-bfloat16", "vision-float16"):
        yield from _of(name, _methods("rtn", "two-stage", "best", "lnq", "quantease"))


def _widths() -> dict[str, dict[str, Any]]:
    """Name every width that codes can have, on grids and in tables."""
    found: dict[str, dict[str, Any]] = {}
    for bits in range(1, 9):
        found[f"bits-{bits}"] = {"bits": bits}
        found[f"bits-{bits}-symmetric"] = {"bits": bits, "symmetric": True}
    for bits in range(1, 5):
        table = {"bits": bits, "method": "lnq"}
        found[f"bits-{bits}-lnq"] = table
        found[f"bits-{bits}-lnq-group"] = {**table, "codebook": "group"}
    return found


def _methods(*methods: str) -> dict[str, dict[str, Any]]:
    return {method: {"method": method} for method in methods}


def _of(name: str, variants: Mapping[str, dict[str, Any]]) -> Iterator[Case]:
    for variant, fields in variants.items():
        run = functools.partial(record_variant, name=name, fields=fields)
        yield Case(f"{name}/variants/{variant}", run)


def record_variant(record: Record, *, name: str, fields: dict[str, Any]) -> None:
    """Quantise a model as one variant says."""
    kind = MODELS[name]
    config = configured(**{"bits": 3, "group_size": kind.group_size, **fields})
    batches = kind.batches()
    if name != "vision":  # plans are the same for many of these, and take long
        record_plan(record, tsq.plan(kind.build(), config, batches[0], len(batches)))
    model = tsq.quantize(kind.build(), config, batches)
    record_state(record, model)
    record.tensors("output", {"output": output(model, batches[0])})
    if "bits" in fields or "embeddings" in fields:
        record_layers(record, model)
