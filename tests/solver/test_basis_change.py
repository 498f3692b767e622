"""Problems in another basis: the same losses, scales that are never worse, and whole models in other bases."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.solver import basis_change as rebasing

BASES = {
    "rotation": {"rotation": 16},
    "scaling": {"channel_scaling": True},
    "both": {"rotation": 8, "channel_scaling": True},
}


def uneven(tokens, columns, seed=0, spread=2.0):
    """Inputs of which some columns are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator) * torch.exp(
        spread * torch.randn(columns, generator=torch.Generator().manual_seed(99))
    )


def problem(columns=40, rows=12, seed=0, blocks=1, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.stack([uneven(400, columns, seed + b, **options) for b in range(blocks)])
    other = x + 0.1 * torch.randn(x.shape, generator=generator)
    sums = [x.mT @ x, (x - other).mT @ x]
    hessian, deviation = sums if blocks > 1 else (part[0] for part in sums)
    return weight, LayerStatistics(hessian, torch.tensor(400), deviation)


def loss_of(weight, quantised, statistics):
    """E‖Qx − Wx̃‖² up to a constant, in float64, of each row."""
    H, R = (s.double() / statistics.count for s in (statistics.hessian, statistics.deviation))
    D = (quantised - weight).double()
    return ((D @ H) * D).sum(1) + 2 * ((weight.double() @ R) * D).sum(1)


# --- the problem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_changed_problem_has_the_same_loss(options):
    weight, statistics = problem()
    changed = rebasing.change_basis(weight, statistics, statistics, tsq.QuantConfig(**options))
    candidate = weight + 0.1 * torch.randn_like(weight)
    there = loss_of(changed.weight, changed.basis.change(candidate), changed.statistics)
    torch.testing.assert_close(there, loss_of(weight, candidate, statistics), rtol=1e-3, atol=1e-3)
    assert torch.equal(changed.held_out.hessian, changed.statistics.hessian)
    assert torch.equal(changed.statistics.hessian, changed.statistics.hessian.mT)


def test_that_check_fails_without_the_change_of_the_deviation():
    weight, statistics = problem()
    changed = rebasing.change_basis(weight, statistics, None, tsq.QuantConfig(rotation=16))
    wrong = LayerStatistics(changed.statistics.hessian, statistics.count, statistics.deviation)
    candidate = weight + 0.1 * torch.randn_like(weight)
    there = loss_of(changed.weight, changed.basis.change(candidate), wrong)
    assert (there - loss_of(weight, candidate, statistics)).abs().max() > 0.01


def test_no_other_basis_is_no_change():
    assert rebasing.change_basis(*problem(), None, tsq.QuantConfig()) is None


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_blocks_are_changed_one_by_one(options):
    weight, statistics = problem(blocks=3)
    changed = rebasing.change_basis(weight, statistics, None, tsq.QuantConfig(**options))
    for block in range(3):
        expected = changed.basis.change_metric(statistics.deviation[block])
        torch.testing.assert_close(changed.statistics.deviation[block], expected)
    assert changed.basis.columns == 40


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_other_tokens_are_changed_alike_and_the_scales_are_those_of_all(options):
    weight, statistics = problem()
    other = problem(seed=5, spread=0.5)[1]
    config = tsq.QuantConfig(bits=3, group_size=10, **options)
    changed = rebasing.change_basis(weight, statistics, None, config, other)
    both = rebasing.change_basis(weight, statistics + other, None, config)
    assert torch.equal(changed.weight, both.weight)
    total = changed.statistics + changed.validation
    torch.testing.assert_close(total.hessian, both.statistics.hessian, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(total.deviation, both.statistics.deviation, rtol=1e-4, atol=1e-2)


# --- the choice of scales ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("blocks", [1, 3])
def test_scaling_never_is_worse_by_the_measure_it_is_chosen_by(bits, seed, blocks):
    weight, statistics = problem(seed=seed, spread=seed / 3, blocks=blocks)
    rotation = 8 if seed % 2 else None
    config = tsq.QuantConfig(
        bits=bits, group_size=10, symmetric=seed > 3, channel_scaling=True, rotation=rotation
    )
    hessian = statistics.hessian / statistics.count
    scaling = rebasing.choose_scaling(weight, statistics, config)
    none = rebasing.rounding_loss(weight, hessian, torch.ones(40), config)
    assert rebasing.rounding_loss(weight, hessian, scaling, config) <= none


def test_uneven_inputs_are_scaled_and_it_pays():
    weight, statistics = problem(columns=128)
    config = tsq.QuantConfig(bits=3, group_size=32, channel_scaling=True)
    hessian = statistics.hessian / statistics.count
    scaling = rebasing.choose_scaling(weight, statistics, config)
    none = rebasing.rounding_loss(weight, hessian, torch.ones(128), config)
    assert rebasing.rounding_loss(weight, hessian, scaling, config) < 0.8 * none
    assert scaling.log().mean().abs() < 1e-5
    order = statistics.hessian.diagonal().argsort()
    assert scaling[order[0]] < scaling[order[-1]]


def test_columns_without_inputs_get_a_finite_scale():
    weight, statistics = problem()
    hessian = statistics.hessian.clone()
    hessian[3], hessian[:, 3] = 0, 0
    for given in (hessian, torch.zeros_like(hessian)):
        config = tsq.QuantConfig(channel_scaling=True)
        scaling = rebasing.choose_scaling(weight, LayerStatistics(given, torch.tensor(400)), config)
        assert torch.isfinite(scaling).all()
        assert (scaling > 0).all()


# --- whole models --------------------------------------------------------------------------------


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 8)
    )


BATCHES = [uneven(300, 40, seed) for seed in range(4)]


def distance(model, original, x):
    return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease", "cdquant", "two-stage"])
@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_every_method_solves_in_another_basis(method, options):
    original = net()
    config = tsq.QuantConfig(bits=6, group_size=16, method=method, **options)
    model = tsq.quantize(copy.deepcopy(original), config, BATCHES, held_out=BATCHES[:1])
    assert model[0].basis.rotation == options.get("rotation")
    with torch.no_grad():
        assert distance(model, original, BATCHES[0]) < (0.1 if method == "rtn" else 0.05)


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_reported_losses_are_those_of_the_effective_weight(options):
    original = net()[:1]
    config = tsq.QuantConfig(bits=3, group_size=16, **options)
    model = tsq.quantize(copy.deepcopy(original), config, BATCHES)
    x = torch.cat(BATCHES).double()
    exact, found = x @ original[0].weight.detach().T.double(), x @ model[0].weight.T.double()
    measured = float((found - exact).square().sum() / exact.square().sum())
    assert model.tsq_report.layers[0].losses["refine"] == pytest.approx(measured, rel=0.01)


def test_scaling_helps_plain_rounding_of_uneven_inputs():
    losses = {}
    for scaling in (False, True):
        config = tsq.QuantConfig(bits=3, group_size=20, method="rtn", channel_scaling=scaling)
        original = net()[:1]
        model = tsq.quantize(copy.deepcopy(original), config, BATCHES)
        with torch.no_grad():
            losses[scaling] = distance(model, original, BATCHES[0])
    assert losses[True] < 0.8 * losses[False]


def test_layers_with_one_input_have_one_basis():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(40, 16), nn.Linear(40, 8)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], -1)

    model = tsq.quantize(
        Shared(), tsq.QuantConfig(group_size=8, rotation=8, channel_scaling=True), BATCHES
    )
    assert torch.equal(model.a.basis.scaling, model.b.basis.scaling)
    assert model.a.column_scale_bits.data_ptr() != model.b.column_scale_bits.data_ptr()
    assert model.tsq_report.layers[0].shared_with == ("b",)


class Kinds(nn.Module):
    """A convolution with groups, a tied table, attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.conv = nn.Embedding(40, 16), nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.other = nn.Embedding(40, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.conv((self.embed(ids) + self.other(ids)).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_every_kind_of_layer(options, tmp_path):
    original, ids = Kinds().eval(), torch.randint(0, 40, (64, 16))
    config = tsq.QuantConfig(bits=8, group_size=8, skip=(), embeddings=True, **options)
    model = tsq.quantize(copy.deepcopy(original), config, [ids] * 2).eval()
    with torch.no_grad():
        assert distance(model, original, ids) < 0.05
    assert model.other.matrix.basis is None  # a table has no inputs
    assert model.embed.matrix is model.head
    assert model.conv.matrix.basis is not None
    torch.testing.assert_close(model.embed(ids), model.embed.weight[ids], rtol=1e-5, atol=1e-6)
    tsq.save(model, tmp_path)
    again = tsq.load(tmp_path, Kinds()).eval()
    assert torch.equal(again(ids), model(ids))


def test_gradients_of_a_convolution_in_another_basis():
    config = tsq.QuantConfig(bits=4, group_size=6, rotation=8, channel_scaling=True)
    batch = torch.randn(50, 4, 12)
    model = tsq.quantize(nn.Sequential(nn.Conv1d(4, 8, 3)), config, [batch]).double()
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    y = model(x)
    weight = model[0].matrix.dequantize(torch.float64).view(8, 4, 3)
    torch.testing.assert_close(y, nn.functional.conv1d(x, weight, model[0].bias))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(
        nn.functional.conv1d(x, weight, model[0].bias).square().sum(), x
    )
    torch.testing.assert_close(gradient, expected)


# --- keeping -------------------------------------------------------------------------------------

ADDITIONS = BASES | {
    "8-bit inputs": {"activation_bits": 8},
    "all": {**BASES["both"], "activation_bits": 8},
}


@pytest.fixture(params=ADDITIONS)
def made(request):
    config = tsq.QuantConfig(group_size=16, **ADDITIONS[request.param])
    return tsq.quantize(net(), config, BATCHES), config


def test_saved_model_comes_back_bit_by_bit(made, tmp_path):
    model, _ = made
    tsq.save(model, tmp_path)
    with torch.device("meta"):
        empty = net()
    for fresh in (empty, net()):
        again = tsq.load(tmp_path, fresh)
        assert torch.equal(again(BATCHES[0]), model(BATCHES[0]))
        assert torch.equal(again[0].weight, model[0].weight)
        assert repr(again) == repr(model)


def test_copies_are_equal(made):
    model, _ = made
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(BATCHES[0]), model(BATCHES[0]))


def test_plan_knows_the_bytes(made):
    model, config = made
    plan = tsq.plan(net(), config, BATCHES[0], n_batches=4)
    assert plan.size_after == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )
    assert plan.bits_per_weight == pytest.approx(model.tsq_report.bits_per_weight)


def test_killed_run_goes_on(made, tmp_path):
    model, config = made
    for again in range(2):
        found = tsq.prepare(net(), config)
        tsq.calibrate(found, BATCHES, checkpoint_dir=tmp_path)
        if not again:
            max(tmp_path.glob("stage-*")).unlink()
        found = tsq.convert(found)
        assert torch.equal(found(BATCHES[0]), model(BATCHES[0]))


def test_repr_names_it(made):
    model, config = made
    for name in ("rotation", "channel_scaling", "activation_bits"):
        assert (f"{name}=" in repr(model[0])) == bool(getattr(config, name))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_compiles_in_one_graph():
    torch._dynamo.reset()
    model = tsq.quantize(net()[:3], tsq.QuantConfig(group_size=16, **ADDITIONS["all"]), BATCHES)
    run = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(run(BATCHES[0]), model(BATCHES[0]), rtol=1e-3, atol=1e-3)


def test_model_exports(made):
    model, _ = made
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model[0], (BATCHES[0][:4],), dynamic_shapes=({0: rows},))
    for count in (2, 40):
        torch.testing.assert_close(
            program.module()(BATCHES[1][:count]), model[0](BATCHES[1][:count])
        )
