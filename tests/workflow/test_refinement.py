"""Stage 2 on finished models: the same as within a run, codes frozen, no loss that rises, and what is refused."""

import copy
import warnings

import pytest
import torch
from export_models import llama, quantised
from torch import nn

import tsq_layers as tsq
from tsq_layers.calibration import preparation
from tsq_layers.calibration import run as calibration
from tsq_layers.errors import CheckpointError, ConfigError, LayerError, LostZerosWarning, StateError
from tsq_layers.layers import packed
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.weight import stacked
from tsq_layers.solver import TwoStageGroupQuantizer

pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")


def network(seed=0, width=32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, width), nn.ReLU(), nn.Linear(width, 8)
    )


def data(count=4, width=32, seed=1):
    torch.manual_seed(seed)
    mixing = torch.randn(width, width)
    return [torch.randn(256, width) @ mixing for _ in range(count)]


def made(model, **options):
    """A quantised copy of a model."""
    config = {"bits": 3, "group_size": 16, "method": "rtn", **options}
    batches = None if config["method"] == "rtn" else data()
    return tsq.quantize(copy.deepcopy(model), tsq.QuantConfig(**config), batches)


def matrices(model):
    return {name: matrix.quantized_weight() for name, _, matrix in packed(model)}


def error(model, reference, batches):
    """Mean squared error of the outputs."""
    with torch.no_grad():
        return float(sum((model(x) - reference(x)).square().mean() for x in batches))


# --- the solver --------------------------------------------------------------------------------


def problem(seed, columns=40, rows=12, blocks=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (300, columns) if blocks is None else (blocks, 300, columns)
    x, other = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    other = x + 0.1 * other
    weight = torch.randn(rows, columns, generator=generator)
    return weight, LayerStatistics(x.mT @ x, torch.tensor(300), (x - other).mT @ x)


@pytest.mark.parametrize("blocks", [None, 3], ids=["one metric", "blocks of rows"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"zero_points": "float"},
        {"group_size": None},
        {"joint_rounds": 2},
        {"refine": "descent"},
    ],
    ids=str,
)
def test_going_on_from_gptq_is_the_whole_run(options, blocks):
    config = tsq.QuantConfig(**{"bits": 3, "group_size": 16, **options})
    weight, statistics = problem(0, blocks=blocks)
    whole = TwoStageGroupQuantizer(weight, statistics, config).run()
    first = TwoStageGroupQuantizer(
        weight, statistics, config.changed(refine="none", joint_rounds=0)
    ).run()
    rest = TwoStageGroupQuantizer(weight, statistics, config).run(start=first.weight)
    for name in ("codes", "zeros"):
        assert torch.equal(getattr(rest.weight, name), getattr(whole.weight, name))
    # GPTQ leaves (Q − W') V, codes that are given have products with H: sums of 40 in another order, of float32.
    for name in ("scales", "offsets"):
        one, other = getattr(rest.weight, name), getattr(whole.weight, name)
        one_unit = torch.finfo(config.torch_scale_dtype).eps
        assert (one is None and other is None) or torch.allclose(one, other, rtol=one_unit, atol=0)
    for step in ("assign", "refine"):
        assert torch.allclose(rest.losses[step], whole.losses[step], rtol=4 * 40 * 2**-24, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_loss_of_no_row_rises(seed):
    weight, statistics = problem(seed)
    start = (
        TwoStageGroupQuantizer(weight, None, tsq.QuantConfig(bits=2, group_size=8, method="rtn"))
        .run()
        .weight
    )
    result = TwoStageGroupQuantizer(weight, statistics, tsq.QuantConfig(bits=2, group_size=8)).run(
        start=start
    )
    assert bool((result.losses["refine"] <= result.losses["assign"] * 1.001).all())
    assert float(result.losses["refine"].sum()) < 0.9 * float(result.losses["assign"].sum())


@pytest.mark.parametrize(
    "change",
    [{"bits": 2}, {"group_size": 8}, {"symmetric": True}, {"scale_dtype": "float32"}],
    ids=str,
)
def test_a_start_of_another_kind_is_refused(change):
    weight, statistics = problem(0)
    rtn = tsq.QuantConfig(bits=3, group_size=16, method="rtn")
    start = TwoStageGroupQuantizer(weight, None, rtn).run().weight
    other = tsq.QuantConfig(**{"bits": 3, "group_size": 16, **change})
    with pytest.raises(LayerError, match="codes to start from are of rows, columns"):
        TwoStageGroupQuantizer(weight, statistics, other).start_from(start)


def test_only_weights_of_one_kind_are_stacked():
    weight, _ = problem(0)
    parts = [
        TwoStageGroupQuantizer(
            weight, None, tsq.QuantConfig(bits=bits, group_size=16, method="rtn")
        )
        .run()
        .weight
        for bits in (3, 3, 4)
    ]
    both = stacked(parts[:2])
    assert torch.equal(both.dequantize(), torch.cat([parts[0].dequantize(), parts[1].dequantize()]))
    assert [torch.equal(part.codes, parts[0].codes) for part in both.split([12, 12])] == [
        True,
        True,
    ]
    with pytest.raises(LayerError, match="of one width"):
        stacked(parts)


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"group_size": None},
        {"method": "gptq"},
        {"scale_dtype": "float32"},
        {"rotation": 16},
    ],
    ids=str,
)
def test_scales_change_and_nothing_else_and_outputs_come_nearer(options):
    reference = network()
    model = made(reference, **options)
    before, old = matrices(model), error(model, reference, data(seed=2))
    found = tsq.refine(model, reference, data())
    assert found is model
    for name, weight in matrices(model).items():
        assert torch.equal(weight.codes, before[name].codes)
        assert torch.equal(weight.zeros, before[name].zeros)
        assert weight.scales.dtype == before[name].scales.dtype
        assert not torch.equal(weight.scales, before[name].scales)
    assert error(model, reference, data(seed=2)) < old


def test_corrupted_scales_are_repaired():
    reference = network()
    model = made(reference, bits=4)
    good = error(model, reference, data())
    for _, _, matrix in packed(model):
        factors = 1 + 0.2 * torch.randn(
            matrix.scales.shape, generator=torch.Generator().manual_seed(0)
        )
        matrix.scale_bits = (matrix.scales.float() * factors).half().view(torch.int16)
    assert error(model, reference, data()) > 4 * good
    tsq.refine(model, reference, data())
    assert error(model, reference, data()) < good


def test_offsets_are_refined_too():
    reference = network()
    model = made(reference, method="two-stage", zero_points="float", refine="none")
    before, old = matrices(model), error(model, reference, data())
    tsq.refine(model, reference, data())
    assert any(
        not torch.equal(weight.offsets, before[name].offsets)
        for name, weight in matrices(model).items()
    )
    assert error(model, reference, data()) < old


def test_joint_rounds_improve_codes_within_the_format():
    reference = network()
    plain, joint = made(reference, bits=2), made(reference, bits=2)
    before = matrices(joint)
    tsq.refine(plain, reference, data())
    tsq.refine(joint, reference, data(), config=tsq.QuantConfig(joint_rounds=2))
    assert any(
        not torch.equal(weight.codes, before[name].codes)
        for name, weight in matrices(joint).items()
    )
    assert {(weight.bits, weight.group_size) for weight in matrices(joint).values()} == {(2, 16)}
    assert error(joint, reference, data()) < error(plain, reference, data())


def test_report_says_what_it_did():
    reference = network()
    model = made(reference)
    tsq.refine(model, reference, data(), held_out=data(1, seed=3))
    for layer in model.tsq_report.layers:
        assert layer.losses["refine"] <= layer.losses["assign"]
        assert "refine" in layer.held_out_losses
        assert (layer.method, layer.bits, layer.status) == ("rtn", 3, "quantized")
        assert layer.tokens == 1024
    assert model.tsq_report.paired


def test_a_model_without_a_report_gets_one():
    reference = network()
    model = made(reference)
    del model.tsq_report
    tsq.refine(model, reference, data())
    assert len(model.tsq_report.quantized) == 3


def test_attention_and_convolutions_are_refined():
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv1d(8, 32, 3, padding=1, groups=2),
        nn.Flatten(1),
        nn.Unflatten(1, (8, 32)),
        nn.TransformerEncoderLayer(32, 2, 48, batch_first=True),
    ).eval()
    batches = [torch.randn(16, 8, 8) for _ in range(4)]
    model = tsq.quantize(
        copy.deepcopy(reference), tsq.QuantConfig(bits=3, group_size=8, method="rtn")
    )
    old, names = error(model, reference, batches), [name for name, _, _ in packed(model)]
    tsq.refine(model, reference, batches)
    assert error(model, reference, batches) < old
    assert names == [name for name, _, _ in packed(model)]
    assert not any(True for _ in packed(reference))


def test_a_shared_matrix_and_a_quantised_table_stay_what_they_are():
    reference = llama(tie_word_embeddings=True)
    config = tsq.QuantConfig(bits=4, group_size=32, method="rtn", embeddings=True, skip=())
    model = tsq.quantize(copy.deepcopy(reference), config)
    shared = model.lm_head.words
    tsq.refine(model, reference, [torch.randint(48, (4, 32)) for _ in range(4)])
    assert model.model.embed_tokens.matrix.words is model.lm_head.words
    assert torch.equal(shared, model.lm_head.words)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_checkpoint_of_another_tool_is_refined_and_written_back(tmp_path, form):
    reference = llama()
    there = tsq.export_checkpoint(
        quantised(3, model=copy.deepcopy(reference)), tmp_path / "theirs", format=form
    )
    model = tsq.import_checkpoint(there)
    before = matrices(model)
    tsq.refine(model, reference, [torch.randint(48, (8, 32)) for _ in range(4)])
    back = tsq.import_checkpoint(tsq.export_checkpoint(model, tmp_path / "ours", format=form))
    for name, weight in matrices(back).items():
        assert torch.equal(weight.codes, before[name].codes)
        assert not torch.equal(weight.scales, before[name].scales)
        assert torch.equal(weight.scales, matrices(model)[name].scales)


# --- refusals ----------------------------------------------------------------------------------


def other_norm():
    reference = llama()
    with torch.no_grad():
        reference.model.norm.weight.mul_(1.5)
    return reference


@pytest.mark.parametrize(
    ("model", "reference", "message"),
    [
        (
            lambda: made(network()),
            lambda: network(seed=5),
            "differs by .* % from that of the reference",
        ),
        (
            lambda: made(network()),
            lambda: network(width=16),
            r"0: it is \(48, 16\) in the reference",
        ),
        (
            lambda: made(network()),
            lambda: nn.Sequential(nn.Linear(32, 48)),
            "2: there is no such layer",
        ),
        (
            lambda: quantised(4),
            other_norm,
            "model.norm.weight: it differs by 33 % .*after norms were merged",
        ),
    ],
    ids=["other weights", "other shape", "other layers", "other norm"],
)
def test_another_reference_is_refused(model, reference, message):
    with pytest.raises(LayerError, match=message):
        tsq.refine(model(), reference(), data())


def test_layers_without_plain_scales_are_refused():
    reference = network()
    model = made(reference, method="lnq")
    with pytest.raises(
        LayerError, match="0: it has look-up tables, and refine takes plain codes and scales"
    ):
        tsq.refine(model, reference, data())


def test_float_models_and_methods_without_stage_2_are_refused():
    reference = network()
    with pytest.raises(StateError, match="holds no packed layers"):
        tsq.refine(network(), reference, data())
    with pytest.raises(StateError, match="already converted"):
        tsq.refine(made(reference), made(reference), data())
    for options in ({"method": "gptq"}, {"refine": "none"}):
        with pytest.raises(ConfigError, match="only two-stage refines scales"):
            tsq.refine(made(reference), reference, data(), config=tsq.QuantConfig(**options))


def test_a_run_that_was_broken_off_goes_on_from_its_last_layer(tmp_path, monkeypatch):
    reference = network()
    expected = matrices(tsq.refine(made(reference), reference, data()))
    solve, solved = calibration.solve, []

    def counted(*args, **kwargs):
        solved.append(args)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(calibration, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        tsq.refine(made(reference), reference, data(), checkpoint_dir=tmp_path)
    found = matrices(tsq.refine(made(reference), reference, data(), checkpoint_dir=tmp_path))
    assert len(solved) == 4  # two of three layers were there
    assert all(torch.equal(weight.scales, expected[name].scales) for name, weight in found.items())


def test_another_start_does_not_go_on_from_a_journal(tmp_path):
    reference = network()
    tsq.refine(made(reference), reference, data(), checkpoint_dir=tmp_path)
    model = made(reference)
    model[0].words[0, 0] ^= 1
    with pytest.raises(CheckpointError, match="start: 0.words"):
        tsq.refine(model, reference, data(), checkpoint_dir=tmp_path)


def test_an_error_leaves_both_models_as_they_were():
    reference = network()
    model = made(reference)
    before, weights = matrices(model), copy.deepcopy(reference.state_dict())

    def failing(model, batch):
        model(batch)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        tsq.refine(model, reference, data(), forward=failing)
    assert all(
        torch.equal(weight.scales, before[name].scales) for name, weight in matrices(model).items()
    )
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in reference.state_dict().items()
    )
    assert not preparation.is_prepared(reference)
    tsq.refine(model, reference, data())


def test_zeros_of_a_pruned_checkpoint_stay():
    reference = network()
    with torch.no_grad():
        for layer in (reference[0], reference[2]):
            layer.weight.mul_(layer.weight.abs() > layer.weight.abs().median())
    model = tsq.refine(made(reference), reference, data(), config=tsq.QuantConfig(joint_rounds=2))
    for name in ("0", "2"):
        pruned = reference.get_submodule(name).weight == 0
        assert pruned.any()
        assert (model.get_submodule(name).dequantize(torch.float32)[pruned] == 0).all()


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("grid", [{"zero_points": "float"}, {"rotation": 16}, {}], ids=str)
def test_a_pruned_layer_is_refined_on_any_grid(grid, rounds):
    reference = network()
    with torch.no_grad():
        reference[0].weight.mul_(reference[0].weight.abs() > reference[0].weight.abs().median())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostZerosWarning)
        model = made(reference, bits=4, method="two-stage", **grid)
        before = error(model, reference, data())
        options = {} if rounds == 0 else {"config": tsq.QuantConfig(joint_rounds=rounds)}
        assert (
            error(tsq.refine(model, reference, data(), **options), reference, data()) < 1.1 * before
        )
