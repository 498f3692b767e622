"""What vLLM's processes run of a packed layer: shares of it, put together again, are the layer. Needs no vLLM."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tsq_layers as tsq
from tsq_layers.errors import CheckpointError, ConfigError
from tsq_layers.integrations.vllm import assembly, description
from tsq_layers.integrations.vllm.assembly import Intake, Matrices, Share
from tsq_layers.integrations.vllm.sharding import Cut, Span, part, row_spans, share_of
from tsq_layers.numerics import packing
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.spec import LayerSpec

KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "zero points": {},
    "offsets": {"offsets": True},
    "row tables": {"tables": "row"},
    "group tables": {"tables": "group"},
    "rotated": {"rotation": 16},
    "scaled": {"channel_scaling": True},
    "rotated and scaled": {"rotation": 32, "channel_scaling": True, "offsets": True},
    "8-bit inputs": {"activation_bits": 8},
}
CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", KINDS)
WIDTHS = [
    pytest.param(kind, bits, id=f"{kind}-{bits}")
    for kind in KINDS
    for bits in range(1, 5 if "tables" in kind else 9)
]
every = pytest.mark.parametrize(("kind", "bits"), WIDTHS)
WHOLE = Cut()


def layer_of(
    bits: int = 3,
    rows: int = 12,
    columns: int = 128,
    group_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> QuantLinear:
    """A packed layer of random codes, grids and basis."""
    generator = torch.Generator().manual_seed(seed)
    layer = QuantLinear(columns, rows, bits=bits, group_size=group_size, bias=False, **options)

    def codes(width: int) -> Tensor:
        return packing.pack(
            torch.randint(1 << bits, (rows, width), generator=generator).to(torch.uint8), bits
        )

    layer.words = codes(columns)
    if layer.zero_words is not None:
        layer.zero_words = codes(layer.scales.shape[1])
    for name in ("scale_bits", "offset_bits", "table_bits", "outlier_bits"):
        buffer = getattr(layer, name)
        if buffer is not None:
            values = torch.rand(buffer.shape, generator=generator) + 0.1
            setattr(layer, name, values.to(layer.scale_dtype).view(buffer.dtype))
    if layer.rotation_signs is not None:
        layer.rotation_signs = (torch.randint(2, (columns,), generator=generator) * 2 - 1).to(
            torch.int8
        )
    if layer.column_scale_bits is not None:
        layer.column_scale_bits = (torch.rand(columns, generator=generator) + 0.5).view(torch.int32)
    return layer


def share(layer: QuantLinear, cut: Cut = WHOLE, name: str = "fc") -> Share:
    """What a process runs of a layer, by way of what it reads."""
    intake = Intake(name, LayerSpec.of(layer), (layer.out_features, layer.in_features), cut)
    for key, buffer in layer.state_dict().items():
        intake.take(key, buffer)
    return intake.share()


def matrices(*shares: Share) -> Matrices:
    return Matrices(shares, torch.float32, CPU)


def only(shared: Share) -> QuantLinear:
    (layer,) = matrices(shared).parts
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- rows --------------------------------------------------------------------------------------


@every
def test_shares_of_rows_are_the_rows(kind: str, bits: int) -> None:
    layer = layer_of(bits, **KINDS[kind])
    parts = [only(share(layer, Cut(rows=(Span(first, 4),)))) for first in (0, 4, 8)]
    assert torch.equal(torch.cat([p.weight for p in parts]), layer.weight)
    x = inputs(3, 128)
    assert torch.allclose(torch.cat([p(x) for p in parts], -1), layer(x), atol=1e-4)


def test_spans_are_put_one_below_the_other() -> None:
    layer = layer_of()
    assert torch.equal(
        only(share(layer, Cut(rows=(Span(8, 2), Span(1, 3))))).weight, layer.weight[[8, 9, 1, 2, 3]]
    )


def test_padding_is_rows_of_zeros() -> None:
    layer = layer_of(symmetric=True)
    padded = only(share(layer, Cut(rows=(Span(10, 2),), padding=3)))
    assert padded.weight.shape == (5, 128)
    assert torch.equal(padded.weight[:2], layer.weight[10:])
    assert not padded.weight[2:].any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_every_process_gets_its_heads(ranks: int, kv_heads: int) -> None:
    """Brute force: query head h of 12 uses key head h·kv/12, and a process runs neighbouring query heads."""
    if max(ranks, kv_heads) % min(ranks, kv_heads):
        pytest.skip("such heads cannot be divided")
    size, heads = 2, 12
    own = heads // ranks
    for rank in range(ranks):
        mine = range(rank * own, rank * own + own)
        used = sorted({head * kv_heads // heads for head in mine})
        sizes, wholes = [own * size, len(used) * size], [heads * size, kv_heads * size]
        expected = [head * size + i for head in mine for i in range(size)]
        expected += [(heads + head) * size + i for head in used for i in range(size)]
        spans = row_spans(sizes, wholes, rank, ranks)
        found = (
            range(sum(wholes))
            if spans is None
            else [span.start + i for span in spans for i in range(span.length)]
        )
        assert list(found) == expected


# --- columns -----------------------------------------------------------------------------------


@every
def test_outputs_of_shares_of_columns_add_up_to_the_layers(kind: str, bits: int) -> None:
    layer, x = layer_of(bits, **KINDS[kind]), inputs(5, 128).double()
    spans = [Span(0, 64), Span(64, 32), Span(96, 32)]
    parts = [only(share(layer, Cut(columns=span))) for span in spans]
    total = sum(
        x.narrow(1, *span) @ p.dequantize(torch.float64).T
        for span, p in zip(spans, parts, strict=True)
    )
    assert torch.allclose(total, x @ layer.dequantize(torch.float64).T, rtol=1e-6, atol=1e-6)
    if "rotated" not in kind:
        assert torch.equal(torch.cat([p.weight for p in parts], 1), layer.weight)


def test_a_share_at_the_wrong_place_is_seen() -> None:
    layer, x = layer_of(), inputs(5, 128)
    parts = [only(share(layer, Cut(columns=Span(first, 64)))) for first in (0, 32)]
    assert not torch.allclose(
        sum(p(half) for p, half in zip(parts, x.split(64, 1), strict=True)), layer(x), rtol=0.1
    )


@pytest.mark.parametrize("tables", [None, "row", "group"])
def test_one_group_a_row_is_cut_anywhere(tables: Any) -> None:
    layer = layer_of(group_size=100, columns=100, tables=tables)
    parts = [only(share(layer, Cut(columns=span))).weight for span in (Span(0, 37), Span(37, 63))]
    assert torch.equal(torch.cat(parts, 1), layer.weight)


def test_row_tables_are_cut_anywhere_whatever_their_group_size() -> None:
    layer = layer_of(tables="row", group_size=32)
    parts = [only(share(layer, Cut(columns=span))).weight for span in (Span(0, 37), Span(37, 91))]
    assert torch.equal(torch.cat(parts, 1), layer.weight)


@pytest.mark.parametrize("kind", ["zero points", "offsets", "group tables", "rotated"])
def test_a_short_last_group_stays_with_the_last_share(kind: str) -> None:
    layer = layer_of(columns=116, **KINDS[kind])
    parts = [only(share(layer, Cut(columns=span))).weight for span in (Span(0, 64), Span(64, 52))]
    assert torch.allclose(torch.cat(parts, 1), layer.weight, atol=1e-5)


def test_rows_and_columns_are_cut_together() -> None:
    layer = layer_of()
    cut = Cut(rows=(Span(2, 3),), columns=Span(32, 64))
    assert torch.equal(only(share(layer, cut)).weight, layer.weight[2:5, 32:96])


def test_float_weights_are_cut_too() -> None:
    weight = inputs(6, 8)
    assert torch.equal(
        part("weight", weight, None, Cut((Span(1, 2),), Span(4, 4))), weight[1:3, 4:]
    )


@pytest.mark.parametrize(
    ("options", "columns", "named"),
    [
        ({}, Span(0, 48), "groups of 32"),
        ({}, Span(16, 112), "groups of 32"),
        ({"tables": "group"}, Span(48, 48), "groups of 32"),
        ({"rotation": 64, "group_size": 32}, Span(0, 32), "blocks of the rotation of 64"),
    ],
)
def test_a_cut_through_a_group_or_block_is_refused(
    options: dict[str, Any], columns: Span, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"'down' has {named} columns.*tensor_parallel_size"):
        share_of("down", LayerSpec.of(layer_of(**options)), Cut(columns=columns))


@pytest.mark.parametrize("options", [{"outliers": 4}, {"outlier_columns": 2}], ids=str)
def test_a_sparse_part_is_run_whole_and_not_cut(options: dict[str, int]) -> None:
    layer = layer_of(**options)
    if layer.outlier_places is not None:
        layer.outlier_places = torch.arange(len(layer.outlier_places), dtype=torch.int32) * 5
    assert torch.equal(only(share(layer)).weight, layer.weight)
    with pytest.raises(ConfigError, match="'fc' has a sparse part.*tensor_parallel_size=1"):
        share(layer, Cut(rows=(Span(0, 4),)))


# --- putting together --------------------------------------------------------------------------


@kinds
def test_neighbours_of_one_form_become_one_matrix(kind: str) -> None:
    layers = [layer_of(rows=rows, seed=seed, **KINDS[kind]) for seed, rows in enumerate((12, 4, 4))]
    for layer in layers:  # they share their input, and so its basis
        layer.rotation_signs, layer.column_scale_bits = (
            layers[0].rotation_signs,
            layers[0].column_scale_bits,
        )
    fused, x, bias = matrices(*map(share, layers)), inputs(9, 128), inputs(20)
    assert len(fused.parts) == 1
    assert torch.equal(fused.parts[0].weight, torch.cat([layer.weight for layer in layers]))
    assert torch.allclose(
        fused(x, bias), torch.cat([layer(x) for layer in layers], -1) + bias, atol=1e-4
    )


OTHERS: dict[str, QuantLinear] = {
    "bits": layer_of(bits=4),
    "group size": layer_of(group_size=64),
    "kind": layer_of(offsets=True),
    "dtype of scales": layer_of(scale_dtype=torch.float32),
    "rotation": layer_of(rotation=16),
}


@pytest.mark.parametrize("other", OTHERS)
def test_others_run_one_by_one(other: str) -> None:
    layers = [layer_of(), OTHERS[other], layer_of(seed=3)]
    fused, x, bias = matrices(*map(share, layers)), inputs(2, 9, 128), inputs(36)
    assert len(fused.parts) == 3
    assert torch.allclose(
        fused(x, bias), torch.cat([layer(x) for layer in layers], -1) + bias, atol=1e-4
    )


def test_another_scaling_is_another_basis() -> None:
    layers = [layer_of(seed=seed, channel_scaling=True) for seed in (0, 1)]
    fused, x = matrices(*map(share, layers)), inputs(3, 128)
    assert len(fused.parts) == 2
    assert torch.allclose(fused(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-4)


def test_a_layer_in_full_precision_runs_beside_packed_ones() -> None:
    layer, weight, x = layer_of(), inputs(4, 128), inputs(3, 128)
    floats = [Share("k", None, {"weight": weight}), Share("v", None, {"weight": 2 * weight})]
    fused = matrices(share(layer), *floats)
    assert len(fused.parts) == 2
    expected = torch.cat([layer(x), x @ weight.T, 2 * x @ weight.T], -1)
    assert torch.allclose(fused(x), expected, atol=1e-4)


@kinds
def test_in_a_compiled_model_a_matrix_is_one_operation(kind: str) -> None:
    torch._dynamo.reset()
    fused = matrices(share(layer_of(**KINDS[kind])))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad(), torch.compiler.set_stance("default"):
        compiled = torch.compile(fused, backend=keep, fullgraph=True, dynamic=True)
        for rows in (9, 12, 17):
            x = inputs(rows, 128)
            assert torch.equal(compiled(x), fused(x))
    (graph,) = graphs
    assert sum("serve" in str(node.target) for node in graph.graph.nodes) == 1


def test_the_operation_is_what_it_says() -> None:
    layer = layer_of(rotation=16)
    torch.library.opcheck(
        assembly._operation,
        (inputs(3, 128), inputs(12), list(layer.parts), assembly._text_of(layer.format)),
        test_utils=("test_schema", "test_faketensor"),
    )


# --- what is read ------------------------------------------------------------------------------


def test_damage_names_the_layer_and_the_tensor() -> None:
    layer = layer_of()
    shape = (layer.out_features, layer.in_features)
    intake = Intake("a.fc", LayerSpec.of(layer), shape, Cut())
    with pytest.raises(CheckpointError, match=r"a\.fc\.words is int32 \[12, 4\].*int32 \[12, 12\]"):
        intake.take("words", layer.words[:, :4])
    with pytest.raises(CheckpointError, match=r"a\.fc\.scale_bits is float16.*int16"):
        intake.take("scale_bits", layer.scales)
    with pytest.raises(CheckpointError, match="'a.fc' has no 'weight', it has words"):
        intake.take("weight", layer.weight)
    intake.take("words", layer.words)
    with pytest.raises(CheckpointError, match=r"holds no a\.fc\.scale_bits"):
        intake.share()
    with pytest.raises(
        CheckpointError, match="'a.fc' is 12×128 in the file, and vLLM expects 10×128"
    ):
        Intake("a.fc", LayerSpec.of(layer), (10, 128), Cut())


def test_layers_are_read_from_what_save_writes(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    config = tsq.QuantConfig(bits=3, group_size=32, method="rtn", overrides={"1": {"bits": 5}})
    model = tsq.quantize(model, config)
    tsq.save(model, tmp_path)
    specs = description.layer_specs(json.loads((tmp_path / "tsq.json").read_text()))
    assert specs == {"0": LayerSpec.of(model[0]), "1": LayerSpec.of(model[1])}


@pytest.mark.parametrize(
    "values",
    [{"layers": {"fc": {"bits": 3}}}, {"layers": [1]}, {"layers": {"fc": {"colour": "red"}}}],
    ids=str,
)
def test_layers_that_say_too_little_are_refused(values: Any) -> None:
    with pytest.raises(CheckpointError):
        description.layer_specs(values)


def test_fused_names_are_taken_apart_unless_the_file_holds_them() -> None:
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    spec = dataclasses.replace(LayerSpec.of(layer_of()))
    assert description.parts_of("m.qkv_proj", fused, {"m.q_proj": spec}) == [
        "m.q_proj",
        "m.k_proj",
        "m.v_proj",
    ]
    assert description.parts_of("m.qkv_proj", fused, {"m.qkv_proj": spec}) == ["m.qkv_proj"]
    assert description.parts_of("m.down", fused, {}) == ["m.down"]
    assert description.parts_of("qkv_proj", fused, {}) == ["q_proj", "k_proj", "v_proj"]


def test_packed_layers_that_vllm_runs_otherwise_are_refused() -> None:
    spec = LayerSpec.of(layer_of())
    layers = {"m.mlp.experts.0.up": spec, "m.fc": spec}
    with pytest.raises(
        ConfigError, match=r"'m.mlp.experts.0.up' is quantised.*skip=\('experts\.\*',\)"
    ):
        description.check_within("m.mlp.experts", layers)
    description.check_within("m.mlp.other", layers)
    with pytest.raises(
        ConfigError,
        match=r"'m.mlp.experts.0.up' is quantised, but is no linear layer.*skip=\('m\.mlp\.experts\.\*\.up',\)",
    ):
        description.check_unclaimed(layers, {"m.fc"})
    description.check_unclaimed(layers, set(layers))
