"""The solver and the observer by themselves."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import tsq_layers as tsq
from benchmarks.proof.case import Case
from benchmarks.proof.library import configured
from benchmarks.proof.record import Record

_N, _K, _TOKENS = 24, 44, 300

WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "two-stage": {},
    "two-stage-joint": {"joint_rounds": 2},
    "offsets": {"zero_points": "float", "joint_rounds": 1},
    "quantease": {"method": "quantease"},
    "outliers": {"method": "quantease", "outliers": 0.05},
    "cdquant": {"method": "cdquant", "greedy_pairs": True},
    "lnq": {"method": "lnq"},
    "lnq-group": {"method": "lnq", "codebook": "group"},
}


def cases() -> Iterator[Case]:
    """List the cases."""
    yield Case("solver/observer", observer)
    for way, fields in WAYS.items():
        yield Case(f"solver/run/{way}", functools.partial(solve, fields=fields))
        yield Case(f"solver/blocks/{way}", functools.partial(solve, fields=fields, blocks=3))
    yield Case("solver/steps", steps)
    yield Case("solver/start", start)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(blocks: int = 1, seed: int = 0) -> tsq.LayerStatistics:
    """Observe correlated inputs of two streams."""
    mixing = torch.eye(_K) + 0.3 * _normal(_K, _K, seed=9)
    shape = (_TOKENS, _K) if blocks == 1 else (_TOKENS, blocks, _K)
    reference = _normal(*shape, seed=seed) @ mixing
    seen = tsq.HessianObserver(_K, blocks=blocks)
    seen.observe(reference + 0.1 * _normal(*shape, seed=seed + 1), reference)
    return seen.statistics()


def observer(record: Record) -> None:
    """Observe in all ways."""
    x, reference = _normal(4, 50, _K, seed=0), _normal(4, 50, _K, seed=1)
    mask = _normal(4, 50, seed=2) > 0
    weights = _normal(4, 50, 3, seed=3).abs()
    ways: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
        "plain": ({}, (x,)),
        "paired": ({}, (x, reference)),
        "masked": ({}, (x, reference, mask)),
        "double": ({"dtype": torch.float64}, (x, reference)),
        "half": ({}, (x.bfloat16(),)),
        "weighted": ({"blocks": 3}, (x, reference, mask, weights)),
        "blocks": ({"blocks": 5}, (x.reshape(4, 10, 5, _K), reference.reshape(4, 10, 5, _K))),
    }
    for name, (options, given) in ways.items():
        seen = tsq.HessianObserver(_K, **options)
        seen.observe(*given)
        seen.observe(*given)
        record.tensors(name, _parts(seen.statistics()))


def _parts(found: tsq.LayerStatistics) -> dict[str, Tensor | None]:
    return {"hessian": found.hessian, "count": found.count, "deviation": found.deviation}


def _config(**fields: Any) -> tsq.QuantConfig:
    return configured(**{"bits": 3, "group_size": 16, **fields})


def solve(record: Record, *, fields: dict[str, Any], blocks: int = 1) -> None:
    """Run all steps of a method."""
    weight, known = _normal(_N, _K, seed=5), statistics(blocks)
    quantizer = tsq.TwoStageGroupQuantizer(weight, known, _config(**fields))
    record_result(record, quantizer.run(statistics(blocks, seed=20)))


def record_result(record: Record, result: Any) -> None:
    """Keep the weight, the losses, and what else the solver says."""
    record_weight(record, result.weight)
    for name in ("losses", "held_out_losses", "objective"):
        record.tensors(name, dict(getattr(result, name)))
    signals = {"signal": result.signal, "held_out_signal": result.held_out_signal}
    record.tensors("signals", signals)
    record.values("damping", result.damping)


def record_weight(record: Record, found: tsq.QuantizedWeight) -> None:
    """Keep a quantised weight."""
    names = ("codes", "scales", "zeros", "offsets", "tables")
    record.tensors("weight", {name: getattr(found, name) for name in names})
    record.tensors("dequantized", {"weight": found.dequantize()})
    layer = tsq.QuantLinear.from_quantized(found, torch.ones(found.codes.shape[0]))
    record.tensors("packed", layer.state_dict())


def steps(record: Record) -> None:
    """Do the steps one after the other, and look at the loss after each."""
    quantizer = tsq.TwoStageGroupQuantizer(
        _normal(_N, _K, seed=5),
        statistics(),
        _config(joint_rounds=1),
    )
    losses: dict[str, Tensor | None] = {"target": quantizer.target}
    for name in ("initialize_scales", "assign_codes", "refine_scales", "refine_jointly"):
        getattr(quantizer, name)()
        losses[name] = quantizer.row_losses()
        losses[f"{name}, others"] = quantizer.loss(statistics(seed=30))
    record.tensors("losses", losses)
    record_weight(record, quantizer.quantized_weight())


def start(record: Record) -> None:
    """Go on from the codes and grids of somebody else."""
    weight, known = _normal(_N, _K, seed=5), statistics()
    rounded = tsq.TwoStageGroupQuantizer(weight, None, _config(method="rtn")).run().weight
    quantizer = tsq.TwoStageGroupQuantizer(weight, known, _config())
    record_result(record, quantizer.run(start=rounded))
