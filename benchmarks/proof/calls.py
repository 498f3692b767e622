"""Options of the functions, pruned layers, layers of one's own, and a report as a page."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tsq_layers as tsq
from benchmarks.proof import hashing
from benchmarks.proof.artefacts import (
    packed,
    record_layers,
    record_model,
    record_plan,
    record_state,
    timeless,
)
from benchmarks.proof.case import Case
from benchmarks.proof.library import configured, extenders, report_of
from benchmarks.proof.models import MODELS, Model, output
from benchmarks.proof.record import Record

# Rounding to these grids keeps zeros anyway; offsets and tables cannot hold them.
_KEEPS: dict[str, tuple[bool | None, ...]] = {
    "rtn": (None,),
    "gptq": (True, False),
    "quantease": (True, False),
    "cdquant": (True, False),
    "two-stage": (None, True, False),
    "best": (None,),
    "lnq": (None,),
}


def cases() -> Iterator[Case]:
    """List the cases."""
    for name in ("llama", "vision", "mixtral"):
        yield Case(f"calls/observed/{name}", lambda record, name=name: observed(record, name))
    yield Case("calls/padding", padding)
    yield Case("calls/offload", offload)
    yield Case("calls/loss", loss)
    yield Case("calls/distance", distance)
    yield Case("calls/fold", fold)
    yield Case("calls/perplexity", perplexity)
    yield Case("calls/plan", plan)
    yield Case("calls/page", page)
    yield Case("calls/one-layer", one_layer)
    yield Case("calls/own-kind", own_kind)
    yield Case("calls/autocast", autocast)
    yield Case("calls/exported-program", exported_program)
    yield Case("calls/compiled", compiled, compiles=True)
    for method, keeps in _KEEPS.items():
        for keep in keeps:
            name = f"calls/pruned/{method}-{keep}"
            yield Case(name, lambda record, given=(method, keep): pruned(record, *given))


def _config(kind: Model, **fields: Any) -> tsq.QuantConfig:
    return configured(**{"bits": 3, "group_size": kind.group_size, **fields})


def observed(record: Record, name: str) -> None:
    """Convert after a loop of one's own."""
    kind = MODELS[name]
    model = tsq.prepare(kind.build(), _config(kind))
    for batch in kind.batches():
        output(model, batch)
    record_model(record, tsq.convert(model, min_coverage=0.1), kind.batches()[0])


def no_last_token(batch: Any, name: str, x: Tensor) -> Tensor | None:  # noqa: ARG001
    """Say that the last token of every text is padding."""
    if x.dim() != 3:
        return None
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    mask[:, -1] = False
    return mask


def without_cache(model: nn.Module, batch: Any) -> Any:
    """Run a batch of ids."""
    return model(input_ids=batch, use_cache=False)


def padding(record: Record) -> None:
    """Calibrate with a mask and a forward of one's own."""
    kind = MODELS["llama"]
    batches = [batch["input_ids"] for batch in kind.batches()]
    model = tsq.quantize(
        kind.build(),
        _config(kind),
        batches,
        forward=without_cache,
        padding_mask=no_last_token,
    )
    record_state(record, model)


def offload(record: Record) -> None:
    """Let activations wait on another device, which is the same here."""
    kind = MODELS["llama"]
    model = tsq.quantize(kind.build(), _config(kind), kind.batches(), offload="cpu")
    record_state(record, model)


def squares(model: nn.Module, batch: Any) -> Tensor:
    """Train for small outputs."""
    return model(batch).square().mean()


def loss(record: Record) -> None:
    """Guide by a loss of one's own, resumed from a run that has come to its end."""
    kind = MODELS["vision"]
    config, folder = _config(kind, guidance=2), record.folder / "journal"
    for prefix in ("", "again/"):
        model = tsq.quantize(
            kind.build(),
            config,
            kind.batches(),
            loss=squares,
            checkpoint_dir=folder,
        )
        record_state(record, model, prefix)


def absolute(found: Tensor, wanted: Tensor, batch: Any) -> Tensor:  # noqa: ARG001
    """Measure a mean absolute difference."""
    return (found - wanted).abs().mean()


def distance(record: Record) -> None:
    """Distil by a distance of one's own."""
    kind = MODELS["vision"]
    config = _config(kind, distill_epochs=2)
    model = tsq.quantize(kind.build(), config, kind.batches(), distance=absolute)
    record_state(record, model)


def fold(record: Record) -> None:
    """Fold column scales into the norms."""
    kind = MODELS["llama"]
    config = _config(kind, channel_scaling=True)
    model = tsq.quantize(kind.build(), config, kind.batches())
    norms = {}
    for index in range(2):
        block = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj"):
            norms[f"{block}.self_attn.{name}"] = f"{block}.input_layernorm"
        for name in ("gate_proj", "up_proj"):
            norms[f"{block}.mlp.{name}"] = f"{block}.post_attention_layernorm"
    record_model(record, tsq.fold_scaling(model, norms), kind.batches()[0])


def perplexity(record: Record) -> None:
    """Measure perplexity of a float and of a quantised model."""
    kind = MODELS["llama"]
    tokens = torch.cat([batch["input_ids"].flatten() for batch in kind.batches(2, seed=3)])
    model = kind.build()
    found = {"float": tsq.perplexity(model, tokens, window=50)}
    model = tsq.quantize(model, _config(kind), kind.batches())
    found["quantized"] = tsq.perplexity(model, tokens, window=50, batch_size=2)
    record.values("perplexity", found)


def plan(record: Record) -> None:
    """Plan with all options, on the meta device too."""
    kind = MODELS["llama"]
    batch, config = kind.batches()[0], _config(kind, method="best", guidance=2, bits=2)
    options: dict[str, Any] = {"held_out": 2, "offload": "cpu", "paired": True}
    record_plan(record, tsq.plan(kind.build(), config, batch, 5, **options), "offload/")
    with torch.device("meta"):
        empty = kind.make()
    record_plan(record, tsq.plan(empty, config, batch, 5, **options), "meta/")


def page(record: Record) -> None:
    """Write the report as a page and as a picture."""
    kind = MODELS["vision"]
    model = tsq.quantize(kind.build(), _config(kind), kind.batches())
    report = timeless(report_of(model))
    path = record.folder / "report.html"
    report.to_html(path, title="A model")
    record.text("html", path.read_text(encoding="utf-8"))
    report.plot(record.folder / "report.png")
    # matplotlib writes no time into this format.
    record.note("png", hashing.of_bytes((record.folder / "report.png").read_bytes()))
    record.values("gaps", [gap.to_dict() for gap in report.gaps()])
    shares = [report.coverage, report.byte_coverage, report.share_quantized]
    record.values("shares", [*shares, report.bits_per_weight])


def one_layer(record: Record) -> None:
    """Quantise models that are themselves a layer."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    made = {
        "linear": (nn.Linear(32, 8), torch.randn(300, 32)),
        "conv1d": (nn.Conv1d(8, 12, 3, groups=2), torch.randn(9, 8, 20)),
        "conv3d": (nn.Conv3d(4, 6, 2, stride=2), torch.randn(5, 4, 6, 6, 6)),
        "encoder": (encoder, torch.randn(9, 20, 16)),
    }
    for name, (layer, batch) in made.items():
        config = configured(bits=3, group_size=8)
        record_model(record, tsq.quantize(layer.eval(), config, [batch]), batch, f"{name}/")


class Doubled(nn.Linear):
    """A layer that the library does not know."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (so it is called in nn.Linear)
        return 2 * super().forward(input)


class QuantDoubled(nn.Module):
    """What takes its place."""

    def __init__(self, matrix: tsq.QuantLinear) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (so it is called in nn.Linear)
        return 2 * self.matrix(input)


def own_kind(record: Record) -> None:
    """Register a kind of layer, and take it back."""
    kind = extenders.LayerKind(
        name="Doubled",
        matches=lambda module: type(module) is Doubled,
        twin=lambda module, matrix: QuantDoubled(matrix),  # noqa: ARG005
    )
    extenders.register(kind)
    try:
        model, batch = nn.Sequential(Doubled(32, 16), nn.Linear(16, 8)), torch.randn(500, 32)
        model = tsq.quantize(model, configured(bits=3, group_size=8), [batch])
        record_model(record, model, batch)
    finally:
        extenders.unregister(kind.name)


def pruned(record: Record, method: str, keep: bool | None) -> None:
    """Quantise a model of which many weights are zero."""
    kind = MODELS["llama"]
    model = kind.build()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            small = parameter.abs() < parameter.abs().median()
            parameter.data[small] = 0
    config = _config(kind, method=method, keep_zeros=keep, joint_rounds=1)
    model = tsq.quantize(model, config, kind.batches())
    record_state(record, model)
    zeros = {name: (layer.weight == 0).sum() for name, layer in packed(model)}
    record.tensors("zeros", zeros)


def autocast(record: Record) -> None:
    """Calibrate and run in half precision where torch says so."""
    kind = MODELS["vision"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = tsq.quantize(kind.build(), _config(kind), kind.batches())
        record.tensors("output", {"output": output(model, kind.batches()[0])})
    record_state(record, model)


def exported_program(record: Record) -> None:
    """Export programs of packed layers, which must run by the plain path."""
    for name, fields in _KINDS.items():
        torch.manual_seed(0)
        x = torch.randn(64, 40)
        plain = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
        model = tsq.quantize(plain, configured(bits=3, group_size=8, **fields), [x])
        rows = torch.export.Dim("rows", min=2, max=512)
        program = torch.export.export(model, (x,), dynamic_shapes=((rows, None),))
        with torch.no_grad():
            found = {"few": program.module()(x[:3]), "many": program.module()(x)}
        record.tensors(name, found)


_KINDS: dict[str, dict[str, Any]] = {
    "integer": {},
    "float": {"zero_points": "float"},
    "tables": {"method": "lnq"},
    "outliers": {"method": "quantease", "outliers": 0.05},
    "rotation": {"rotation": 8, "activation_bits": 8},
}


def compiled(record: Record) -> None:
    """Compile a model, and what runs packed layers where the library's operations do not."""
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    plain = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
    model = tsq.quantize(plain, configured(bits=4, group_size=16), [x])
    record.values("warmed", sorted(tsq.warmup(model)))
    record_layers(record, model)  # in float64 these are compiled
    fast = torch.compile(model)
    with torch.no_grad():
        record.tensors("output", {"one": fast(x[:1]), "many": fast(x)})
