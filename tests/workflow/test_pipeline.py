"""`prepare`, `calibrate`, `convert`: what is run how often, what is seen, what is solved, and what is left behind."""

import copy
import warnings
from collections import Counter, UserDict
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import tsq_layers as tsq
from tsq_layers.calibration import solving
from tsq_layers.errors import (
    CalibrationError,
    FewTokensWarning,
    SameInputWarning,
    ScaleRangeWarning,
    SkippedLayerWarning,
    StateError,
)
from tsq_layers.observer import HessianObserver
from tsq_layers.passes import batches as batch_forms
from tsq_layers.workflow import conversion

CONFIG = tsq.QuantConfig(bits=3, group_size=16)
STAGES = [
    "blocks.0.q, blocks.0.k, blocks.0.v",
    "blocks.0.o",
    "blocks.0.up",
    "blocks.0.down",
    "blocks.1.q, blocks.1.k, blocks.1.v",
    "blocks.1.o",
    "blocks.1.up",
    "blocks.1.down",
]


class Batch(UserDict):
    """Keyword arguments that are attributes too, as transformers' batches are."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Block(nn.Module):
    """Three layers with the same input, then three in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.o, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.drop(self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x)))
        return x + self.down(torch.relu(self.up(x)))


class Toy(nn.Module):
    """An embedding, two blocks, and a head that the default configuration skips."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Identity()
        self.lm_head = nn.Linear(16, 40, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.last(x))


class Steps(nn.Module):
    """Layers by name, called in a given sequence with tanh between them."""

    def __init__(self, layers, path) -> None:
        super().__init__()
        self.layers, self.path = nn.ModuleDict(layers), path

    def forward(self, x, path=None):
        for name in self.path if path is None else path:
            x = torch.tanh(self.layers[name](x))
        return x


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def toy():
    return Toy().eval()


def ids(count=4):
    """Token batches: 16 tokens for each of the 24 columns of the widest layer, and more."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (12, 12), generator=generator) for _ in range(count)]


def rows(columns, tokens=512, seed=2):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def squares(*names, columns=16):
    return {name: nn.Linear(columns, columns) for name in names}


def weights_of(model):
    """The records of all quantised layers, by name."""
    found = {
        name: m.quantized_weight()
        for name, m in model.named_modules()
        if isinstance(m, tsq.QuantLinear)
    }
    assert found
    return found


def equal(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("codes", "scales", "zeros")
    )


def assert_same_weights(model, other):
    one, two = weights_of(model), weights_of(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not equal(one[name], two[name])] == []


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def entry(model, name):
    return next(layer for layer in model.tsq_report.layers if layer.name == name)


@pytest.fixture
def seen(monkeypatch):
    """All statistics that `calibrate` hands to the solver, by the name of the stage."""
    found, original = {}, solving.TwoStageGroupQuantizer

    def spy(weight, statistics, config, *, name):
        assert name not in found
        found[name] = statistics
        return original(weight, statistics, config, name=name)

    monkeypatch.setattr(solving, "TwoStageGroupQuantizer", spy)
    return found


# --- prepare and unprepare -----------------------------------------------------------------------


def test_prepare_changes_no_output_and_attaches_an_observer_to_every_target():
    model, batch = toy(), ids()[0]
    before, state = model(batch), copy.deepcopy(model.state_dict())
    assert tsq.prepare(model, CONFIG) is model
    assert torch.equal(model(batch), before)
    watched = {name for name, m in model.named_modules() if m._forward_pre_hooks}
    assert watched == {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {
        "lm_head"
    }
    assert model.state_dict().keys() == state.keys()


def test_unprepare_leaves_the_model_as_it_was():
    model, batch = toy(), ids()[0]
    before, attributes = model(batch), {name: set(vars(m)) for name, m in model.named_modules()}
    state = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    tsq.prepare(model, CONFIG)
    model(batch)
    assert tsq.unprepare(model) is model
    assert hooks(model) == 0
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert torch.equal(model(batch), before)
    for name, value in model.named_parameters():
        assert id(value) == state[name][0]
        assert torch.equal(value, state[name][1])


def test_unprepare_after_calibrate_leaves_the_model_as_it_was():
    model, batches = toy(), ids()
    before = model(batches[0])
    tsq.calibrate(tsq.prepare(model, CONFIG), batches)
    assert torch.equal(model(batches[0]), before)
    tsq.unprepare(model)
    assert hooks(model) == 0
    assert torch.equal(model(batches[0]), before)


def test_prepared_model_can_be_prepared_again_after_unprepare():
    model, batches = toy(), ids()
    tsq.unprepare(tsq.prepare(model, CONFIG))
    assert_same_weights(
        tsq.quantize(model, CONFIG, batches), tsq.quantize(toy_again(), CONFIG, batches)
    )


def toy_again():
    """The model that :func:`toy` made first in this test."""
    torch.manual_seed(0)
    return toy()


# --- the loop of torch.ao ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["two-stage", "gptq"])
def test_loop_equals_the_solver_on_full_precision_statistics(method):
    config = CONFIG.changed(method=method)
    model, reference, batches = toy(), toy_again(), ids()
    tsq.prepare(model, config)
    for batch in batches:
        model(batch)
    model = tsq.convert(model)

    layers = {
        name: m
        for name, m in reference.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    observers = {name: HessianObserver(layer.in_features) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(observers[name])
    for batch in batches:
        reference(batch)
    for name, weight in weights_of(model).items():
        statistics = observers[name].statistics()
        assert statistics.deviation is None
        assert equal(
            weight, tsq.TwoStageGroupQuantizer(layers[name].weight, statistics, config).run().weight
        )
    assert not model.tsq_report.paired
    assert hooks(model) == 0


def test_loop_may_call_a_layer_by_keyword():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            return self.fc(input=x)

    model, x = Keyword(), rows(16)
    before = model(x)
    tsq.prepare(model, CONFIG)
    assert torch.equal(model(x), before)
    model = tsq.convert(model)
    torch.manual_seed(0)
    assert_same_weights(model, tsq.quantize(Keyword(), CONFIG, [x]))


def test_quantize_equals_the_three_calls():
    batches = ids()
    model = toy()
    three = tsq.convert(tsq.calibrate(tsq.prepare(model, CONFIG), batches))
    assert three is model
    one = tsq.quantize(toy_again(), CONFIG, batches)
    assert_same_weights(one, three)
    assert torch.equal(one(batches[0]), three(batches[0]))
    assert hooks(one) == hooks(three) == 0


def test_quantize_twice_gives_the_same_bits():
    batches = ids()
    assert_same_weights(
        tsq.quantize(toy(), CONFIG, batches), tsq.quantize(toy_again(), CONFIG, batches)
    )


# --- what is run, and how often ------------------------------------------------------------------


@pytest.mark.parametrize(("paired", "times"), [(True, 2), (False, 1), (None, 2)])
def test_calibrate_runs_every_batch_as_often_as_there_are_streams(paired, times):
    model, batches, calls = toy(), ids(), Counter()
    model.embed.register_forward_hook(
        lambda module, args, output: calls.update([tuple(args[0].flatten().tolist())])
    )
    tsq.calibrate(tsq.prepare(model, CONFIG), batches, paired=paired)
    expected = [times + 1] + [times] * 3  # the first batch is recorded too
    assert [calls[tuple(batch.flatten().tolist())] for batch in batches] == expected
    assert calls.total() == sum(expected)


def test_calibrate_runs_one_stream_where_no_layer_uses_the_deviation():
    model, calls = toy(), []
    model.embed.register_forward_hook(lambda *_: calls.append(1))
    tsq.calibrate(tsq.prepare(model, CONFIG.changed(deviation="none")), ids(3))
    assert len(calls) == 1 + 3


def test_calibrate_runs_held_out_batches_once():
    model, calls = toy(), []
    model.embed.register_forward_hook(lambda *_: calls.append(1))
    tsq.calibrate(tsq.prepare(model, CONFIG), ids(3), held_out=ids(2))
    assert len(calls) == 1 + 2 * 3 + 2


def test_calibrate_ends_passes_at_the_last_target():
    model, calls = toy(), []
    model.last.register_forward_hook(lambda *_: calls.append(1))
    tsq.calibrate(tsq.prepare(model, CONFIG), ids(3))
    assert len(calls) == 1  # the recording pass only


def test_calibrate_observes_and_solves_layers_with_the_same_input_once(monkeypatch, seen):
    calls, original = [], HessianObserver.observe
    monkeypatch.setattr(
        HessianObserver,
        "observe",
        lambda self, *args: calls.append(len(args)) or original(self, *args),
    )
    model = tsq.quantize(toy(), CONFIG, ids(4))
    assert list(seen) == STAGES
    assert len(calls) == len(STAGES) * 4
    assert entry(model, "blocks.1.k").shared_with == ("blocks.1.q", "blocks.1.v")
    assert entry(model, "blocks.1.o").shared_with == ()


def test_stacked_layers_are_solved_as_alone():
    batches = ids()
    model = tsq.quantize(toy(), CONFIG, batches, paired=False)
    alone, observer = toy_again(), HessianObserver(16)
    handle = alone.blocks[0].q.register_forward_pre_hook(observer)
    for batch in batches:
        alone(batch)
    handle.remove()
    for name in "qkv":
        weight = alone.blocks[0].get_submodule(name).weight
        result = tsq.TwoStageGroupQuantizer(weight, observer.statistics(), CONFIG).run().weight
        found = weights_of(model)[f"blocks.0.{name}"]
        assert torch.equal(found.codes, result.codes)
        torch.testing.assert_close(
            found.scales, result.scales, rtol=2**-10, atol=0
        )  # a bit of float16


# --- H and R -------------------------------------------------------------------------------------


def by_hand(first, weight, bias, x):
    """H and R of the second of two linear layers, float64; ``weight`` is the first one's quantised weight."""
    x, bias = x.double(), bias.double()
    full = x @ first.double().T + bias
    quantised = x @ weight.double().T + bias
    return quantised.T @ quantised, (quantised - full).T @ quantised


def relative(value, expected):
    # detached: torch warns where a tensor with a gradient becomes a number
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm())


def test_calibrate_takes_the_deviation_from_pairs(seen):
    config = tsq.QuantConfig(bits=2, group_size=8, deviation_strength=1.0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 64)).requires_grad_(requires_grad=False)
    first, second, bias = model[0].weight.clone(), model[1].weight.clone(), model[0].bias.clone()
    batches = [rows(16, 400, seed) for seed in range(3)]
    model = tsq.quantize(model, config, batches)
    hessian, deviation = by_hand(first, model[0].weight, bias, torch.cat(batches))
    assert relative(seen["1"].hessian, hessian) < 1e-5
    assert relative(seen["1"].deviation, deviation) < 1e-5
    assert deviation.norm() > 0.01 * hessian.norm()
    assert int(seen["1"].count) == 1200
    assert not seen["0"].deviation.any()

    def codes(deviation):
        statistics = tsq.LayerStatistics(hessian, torch.tensor(1200), deviation)
        return tsq.TwoStageGroupQuantizer(second, statistics, config).run().weight.codes

    found = model[1].quantized_weight().codes
    assert (codes(deviation) != found).float().mean() < 0.01
    for wrong in (-deviation, deviation.T.contiguous(), None):
        assert (codes(wrong) != found).float().mean() > 0.02


def test_calibrate_unpaired_sees_the_quantised_stream_without_deviation(seen):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).requires_grad_(requires_grad=False)
    first, bias, x = model[0].weight.clone(), model[0].bias.clone(), rows(16)
    model = tsq.quantize(model, tsq.QuantConfig(bits=2, group_size=8), [x], paired=False)
    hessian, _ = by_hand(first, model[0].weight, bias, x)
    assert relative(seen["1"].hessian, hessian) < 1e-5
    assert (
        relative(seen["1"].hessian, by_hand(first, first, bias, x)[0]) > 1e-3
    )  # what the full-precision stream gives
    assert seen["1"].deviation is None
    assert not model.tsq_report.paired


def test_calibrate_reports_held_out_losses():
    model = tsq.quantize(toy(), CONFIG, ids(4), held_out=ids(6)[4:])
    for layer in model.tsq_report.quantized:
        assert (
            layer.held_out_losses.keys()
            == layer.losses.keys()
            == {"initialize", "assign", "refine"}
        )
        assert all(value > 0 for value in layer.held_out_losses.values())
        assert all(layer.held_out_losses[step] != layer.losses[step] for step in layer.losses)
    assert_same_weights(model, tsq.quantize(toy_again(), CONFIG, ids(4)))


def test_held_out_loss_of_the_fitted_data_is_the_fitted_loss():
    x = rows(16)
    model = tsq.quantize(nn.Sequential(nn.Linear(16, 8)), CONFIG, [x], held_out=[x])
    layer = entry(model, "0")
    for step, loss in layer.losses.items():
        assert layer.held_out_losses[step] == pytest.approx(loss, rel=1e-3)


# --- configurations ------------------------------------------------------------------------------


def test_rtn_needs_no_batches():
    config = CONFIG.changed(method="rtn")
    model, reference = tsq.quantize(toy(), config), toy_again()
    for name, weight in weights_of(model).items():
        assert equal(
            weight,
            tsq.TwoStageGroupQuantizer(reference.get_submodule(name).weight, None, config)
            .run()
            .weight,
        )
    assert {layer.tokens for layer in model.tsq_report.quantized} == {None}


def test_overrides_mix_bits_and_methods_among_layers_with_the_same_input(seen):
    overrides = {
        "*.k": {"bits": 4},
        "*.v": {"method": "rtn"},
        "blocks.1.down": {"method": "gptq", "bits": 8},
    }
    model = tsq.quantize(toy(), CONFIG.changed(overrides=overrides), ids())
    assert list(seen)[:3] == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    assert seen["blocks.0.q"] is seen["blocks.0.k"]
    assert seen["blocks.0.v"] is None
    assert {
        name: weight.bits for name, weight in weights_of(model).items() if weight.bits != 3
    } == {
        "blocks.0.k": 4,
        "blocks.1.k": 4,
        "blocks.1.down": 8,
    }
    methods = {name: entry(model, f"blocks.1.{name}").method for name in ("q", "v", "down")}
    assert methods == {"q": "two-stage", "v": "rtn", "down": "gptq"}
    weight = toy_again().blocks[0].v.weight
    rtn = tsq.TwoStageGroupQuantizer(weight, None, CONFIG.changed(method="rtn")).run().weight
    assert equal(weights_of(model)["blocks.0.v"], rtn)


def test_rtn_layer_that_is_never_called_is_quantised_with_and_without_calibrate():
    config = CONFIG.changed(overrides={"unused": {"method": "rtn"}})

    def made():
        torch.manual_seed(0)
        return Steps(squares("a", "unused"), "a")

    called, x = tsq.prepare(made(), config), rows(16)
    called(x)
    assert_same_weights(tsq.convert(called), tsq.quantize(made(), config, [x], paired=False))


def test_skip_leaves_layers_alone_and_reports_them():
    model, reference = (
        tsq.quantize(toy(), CONFIG.changed(skip=("lm_head", "blocks.1.*")), ids()),
        toy_again(),
    )
    assert set(weights_of(model)) == {
        f"blocks.0.{name}" for name in ("q", "k", "v", "o", "up", "down")
    }
    assert torch.equal(model.blocks[1].q.weight, reference.blocks[1].q.weight)
    assert entry(model, "blocks.1.q").status == entry(model, "lm_head").status == "skipped"
    assert entry(model, "embed").reason == "embeddings=False in the configuration"


def test_batches_come_from_an_iterator_one_by_one():
    model, events = toy(), []

    def stream():
        for batch in ids(3):
            events.append("batch")
            yield batch

    model.embed.register_forward_hook(lambda *_: events.append("pass"))
    tsq.quantize(model, CONFIG, stream())
    recording, batch = (
        ["batch", "pass"],
        ["pass", "pass"],
    )  # both streams of a batch start before the next one
    assert events == [*recording, *batch, "batch", *batch, "batch", *batch]
    listed = weights_of(tsq.quantize(toy_again(), CONFIG, ids(3)))
    assert all(
        torch.equal(weight.codes, listed[name].codes) for name, weight in weights_of(model).items()
    )


def test_iterator_without_batches_is_an_error():
    model = tsq.prepare(toy(), CONFIG)
    with pytest.raises(CalibrationError, match="batches holds no batch"):
        tsq.calibrate(model, iter([]))


def test_tied_weights_are_skipped_with_a_warning_and_stay_tied():
    model = toy()
    model.lm_head.weight = model.embed.weight
    with pytest.warns(
        SkippedLayerWarning, match="lm_head stays in full precision: its weight is tied"
    ):
        model = tsq.quantize(model, CONFIG.changed(skip=()), ids())
    assert model.lm_head.weight is model.embed.weight
    assert entry(model, "lm_head").status == "skipped"
    assert "tied" in entry(model, "lm_head").reason


def test_tied_weights_that_are_skipped_on_purpose_do_not_warn():
    model = toy()
    model.lm_head.weight = model.embed.weight
    model = tsq.quantize(model, CONFIG, ids())
    assert model.lm_head.weight is model.embed.weight


def test_linear_whose_weight_is_computed_is_reported_and_left_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    nn.utils.parametrizations.orthogonal(model[0])
    prune.l1_unstructured(model[1], "weight", 0.5)
    model = tsq.quantize(model, CONFIG, [rows(16)])
    assert set(weights_of(model)) == {"2"}
    assert [layer.status for layer in model.tsq_report.layers].count("not supported") == 2


# --- modules in unusual places -------------------------------------------------------------------


def test_module_with_two_names_is_solved_once_and_replaced_everywhere(seen):
    layers = squares("a", "b")
    model = Steps({"a": layers["a"], "b": layers["b"], "again": layers["a"]}, ["a", "b", "again"])
    model = tsq.quantize(model, CONFIG, [rows(16, 300)])
    assert list(seen) == ["layers.b", "layers.a"]  # a is solved at its last call
    assert model.layers["a"] is model.layers["again"]
    assert isinstance(model.layers["a"], tsq.QuantLinear)
    assert int(seen["layers.a"].count) == 600


def test_root_layer_returns_its_twin():
    linear, x = nn.Linear(16, 8), rows(16)
    model = tsq.quantize(linear, CONFIG, [x])
    assert isinstance(model, tsq.QuantLinear)
    assert isinstance(linear, nn.Linear)
    assert hooks(linear) == 0
    assert "_tsq_preparation" not in vars(linear)
    assert torch.allclose(model(x), F.linear(x, model.weight, linear.bias), atol=1e-5)
    assert model.tsq_report.layers[0].name == ""


def test_layer_called_in_a_loop_is_seen_at_all_calls_and_solved_once(seen):
    model, x = Steps(squares("a", "b"), ["a", "b", "a", "a"]), rows(16, 300)
    inputs = []
    handle = model.layers["a"].register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].double())
    )
    model(x)
    handle.remove()
    model = tsq.quantize(model, CONFIG.changed(deviation="none", skip=("b",)), [x])
    assert list(seen) == ["layers.a"]
    assert int(seen["layers.a"].count) == entry(model, "layers.a").tokens == 900
    assert relative(seen["layers.a"].hessian, sum(x.T @ x for x in inputs).detach()) < 1e-5


def test_layer_called_in_a_loop_of_varying_length_is_seen_at_all_calls(seen):
    model, x = Steps(squares("a", "b"), ""), rows(16, 300)
    tsq.quantize(model, CONFIG, [(x, "aaab"), (x, "ab"), (x, "aab")])
    assert {name: int(statistics.count) for name, statistics in seen.items()} == {
        "layers.a": 1800,
        "layers.b": 900,
    }


def test_layer_called_less_often_than_in_the_recording_pass_is_solved(seen):
    model, x = Steps(squares("a", "b"), ""), rows(16, 300)
    model = tsq.quantize(model, CONFIG, [(x, "aba"), (x, "ab")])
    assert set(weights_of(model)) == {"layers.a", "layers.b"}
    assert int(seen["layers.b"].count) == 600


def test_branch_that_some_batches_take_is_seen_in_those(seen):
    model = Steps(squares("a", "b", "c"), "")
    model = tsq.quantize(
        model, CONFIG, [(rows(16, 300), "ac"), (rows(16, 400), "abc"), (rows(16, 500), "abc")]
    )
    counts = {name: int(statistics.count) for name, statistics in seen.items()}
    assert counts == {"layers.a": 1200, "layers.b": 900, "layers.c": 1200}
    assert len(weights_of(model)) == 3


def test_branch_that_is_reached_in_two_ways_is_seen_in_all_calls(seen):
    batches = [(rows(16, 300), path) for path in ("ad", "abd", "acd", "abcd", "acbd")]
    model = tsq.quantize(Steps(squares("a", "b", "c", "d"), ""), CONFIG, batches)
    counts = {name: int(statistics.count) for name, statistics in seen.items()}
    assert counts == {"layers.a": 1500, "layers.b": 900, "layers.c": 900, "layers.d": 1500}
    assert len(weights_of(model)) == 4


def test_layer_that_is_never_called_stays_float_and_is_named():
    model = Steps(squares("a", "b"), "a")
    weight = model.layers["b"].weight
    with pytest.warns(SkippedLayerWarning, match=r"1 layers were never called .*: layers\.b;"):
        model = tsq.quantize(model, CONFIG, [rows(16)])
    assert model.layers["b"].weight is weight
    layer = entry(model, "layers.b")
    assert (layer.status, layer.reason) == (
        "never called",
        "no batch reached it, or its weight is read without a call",
    )
    assert set(weights_of(model)) == {"layers.a"}


def test_layer_that_is_never_called_in_a_loop_of_ones_own_stays_float():
    model = tsq.prepare(Steps(squares("a", "b"), "a"), CONFIG)
    model(rows(16))
    with pytest.warns(SkippedLayerWarning, match=r"layers\.b"):
        model = tsq.convert(model)
    assert set(weights_of(model)) == {"layers.a"}


def test_layer_that_only_held_out_batches_reach_stays_float():
    model = Steps(squares("a", "b"), "")
    with pytest.warns(SkippedLayerWarning, match=r"layers\.b"):
        model = tsq.quantize(model, CONFIG, [(rows(16), "a")], held_out=[(rows(16), "ab")])
    assert set(weights_of(model)) == {"layers.a"}


class Router(nn.Module):
    """Goes to ``full`` as long as the first layer gives what it gave when the model was made, else to ``other``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.full, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("original", self.first.weight.detach().clone())

    def forward(self, x):
        h = self.first(x)
        return (
            self.full if torch.equal(h, F.linear(x, self.original, self.first.bias)) else self.other
        )(h)


def test_streams_that_part_give_no_deviation_and_a_layer_of_the_full_stream_alone_stays_float(seen):
    with pytest.warns(SkippedLayerWarning, match=r"never called .*: full;"):
        model = tsq.quantize(Router(), CONFIG, [rows(16)])
    assert set(weights_of(model)) == {"first", "other"}
    assert not seen["other"].deviation.any()


def test_same_input_in_the_recording_pass_only_warns():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, apart):
            return self.c(self.a(x) + self.b(x + 1 if apart else x))

    with pytest.warns(SameInputWarning, match="b shared its input with other layers"):
        tsq.quantize(Fork(), CONFIG, [(rows(16), False), (rows(16), True)])


def test_transformer_encoder_layer_is_calibrated_and_runs():
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = rows(16).reshape(32, 16, 16)
    before = model(x)
    model = tsq.quantize(model, tsq.QuantConfig(bits=8, group_size=8), [x])
    projections = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    assert set(weights_of(model)) == {"linear1", "linear2"} | projections
    assert entry(model, "self_attn.q_proj").shared_with == ("self_attn.k_proj", "self_attn.v_proj")
    assert relative(model(x).detach(), before.detach().double()) < 0.01


# --- batches -------------------------------------------------------------------------------------


class Named(NamedTuple):
    x: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: (x,), None),
        (lambda x: [x], None),
        (lambda x: {"ids": x}, None),
        (
            lambda x: {"tokens": [x], "other": "text"},
            lambda model, batch: model(batch["tokens"][0]),
        ),
        (Named, lambda model, batch: model(batch.x)),
        (lambda x: x.tolist(), lambda model, batch: model(torch.tensor(batch))),
    ],
    ids=["tuple", "list", "dict", "nested", "named", "foreign"],
)
def test_batches_of_every_form_give_the_same(wrap, forward):
    options = {} if forward is None else {"forward": forward}
    model = tsq.quantize(toy(), CONFIG, [wrap(batch) for batch in ids()], **options)
    assert_same_weights(model, tsq.quantize(toy_again(), CONFIG, ids()))


def test_batches_may_be_a_generator():
    model = tsq.quantize(toy(), CONFIG, (batch for batch in ids()))
    assert_same_weights(model, tsq.quantize(toy_again(), CONFIG, ids()))


def test_batch_is_moved_with_all_that_it_holds():
    tensor = torch.ones(2)
    batch = {"a": tensor, "b": [tensor, (tensor, "text")], "c": None, "d": Named(tensor)}
    moved = batch_forms.moved_to(batch, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1][0].is_meta
    assert moved["b"][1][1] == "text"
    assert isinstance(moved["b"][1], tuple)
    assert moved["c"] is None
    assert isinstance(moved["d"], Named)
    assert moved["d"].x.is_meta
    assert not batch["a"].is_meta


class Masked(nn.Module):
    """Two layers that see tokens one by one, so that padding is the only thing a mask can change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        return self.b(torch.tanh(self.a(self.embed(input_ids))))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_does_not_count(seen, dtype):
    tokens, lengths = torch.randint(40, (30, 20)), torch.randint(5, 21, (30,))
    mask = torch.arange(20) < lengths.unsqueeze(1)
    model = Masked()
    other = copy.deepcopy(model)
    model = tsq.quantize(model, CONFIG, [{"input_ids": tokens, "attention_mask": mask.to(dtype)}])
    padded = dict(seen)
    seen.clear()
    other = tsq.quantize(other, CONFIG, [{"input_ids": tokens[mask].unsqueeze(0)}])
    for name in "ab":
        assert int(padded[name].count) == int(seen[name].count) == int(lengths.sum())
        torch.testing.assert_close(padded[name].hessian, seen[name].hessian, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(
            padded[name].deviation, seen[name].deviation, rtol=1e-4, atol=1e-3
        )
        different = weights_of(model)[name].codes != weights_of(other)[name].codes
        assert different.float().mean() < 0.02


def test_padding_counts_without_a_mask(seen):
    tokens = torch.randint(40, (30, 20))
    tsq.quantize(Masked(), CONFIG, [{"input_ids": tokens}])
    assert int(seen["a"].count) == 600


def test_padding_mask_function_is_asked_for_every_layer(seen):
    asked = []

    def padding_mask(batch, name, x):
        asked.append((name, tuple(x.shape)))
        return torch.arange(x.shape[0]) < 300

    model = Steps(squares("a", "b"), "ab")
    tsq.quantize(model, CONFIG, [rows(16)], padding_mask=padding_mask)
    assert set(asked) == {("layers.a", (512, 16)), ("layers.b", (512, 16))}
    assert int(seen["layers.a"].count) == int(seen["layers.b"].count) == 300


def test_attention_mask_of_an_encoder_is_not_taken_for_the_decoder():
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    x = torch.ones(2, 3, 8)
    assert batch_forms.attention_mask(batch, "a", x) is batch["attention_mask"]
    assert batch_forms.attention_mask(batch, "a", x[:, :2]) is None
    assert (
        batch_forms.attention_mask({**batch, "decoder_input_ids": torch.ones(2, 3)}, "a", x) is None
    )
    assert batch_forms.attention_mask((batch,), "a", x) is None


# --- what is restored and kept -------------------------------------------------------------------


def test_calibrate_runs_in_evaluation_mode_and_restores_flags():
    model = toy().train()
    model.blocks[1].eval()
    model.blocks[1].q.train()
    flags = {name: m.training for name, m in model.named_modules()}
    modes = []
    model.embed.register_forward_hook(
        lambda *_: modes.append((model.training, torch.is_grad_enabled()))
    )
    tsq.calibrate(tsq.prepare(model, CONFIG), ids())
    assert set(modes) == {(False, False)}
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert torch.is_grad_enabled()
    model = tsq.convert(model)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert_same_weights(model, tsq.quantize(toy_again(), CONFIG, ids()))  # dropout was off


def test_calibrate_turns_the_cache_off_and_restores_it():
    class Config:
        use_cache = True

    model, found = toy(), []
    model.config = Config()
    model.embed.register_forward_hook(lambda *_: found.append(model.config.use_cache))
    tsq.quantize(model, CONFIG, ids())
    assert set(found) == {False}
    assert model.config.use_cache is True


def test_calibrate_keeps_no_graph_and_restores_every_parameter():
    model = toy()
    before = dict(model.named_parameters())
    tsq.calibrate(tsq.prepare(model, CONFIG), ids())
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert all(value.requires_grad and value.grad is None for value in before.values())
    assert hooks(model) == 0


def test_calibration_runs_under_autocast_and_counts_in_float32():
    plain = tsq.quantize(toy_again(), tsq.QuantConfig(bits=8, group_size=8), ids())
    with torch.autocast("cpu", torch.bfloat16):
        model = tsq.quantize(toy_again(), tsq.QuantConfig(bits=8, group_size=8), ids())
        assert model(ids()[0]).dtype == torch.bfloat16
    assert model.blocks[0].q.dtype == torch.float32
    assert model.tsq_report.quantized[0].damping == plain.tsq_report.quantized[0].damping
    assert relative(model(ids()[0]).detach(), plain(ids()[0]).detach().double()) < 0.02


def test_bfloat16_model_is_quantised_in_its_dtype():
    model = tsq.quantize(toy().bfloat16(), tsq.QuantConfig(bits=8, group_size=8), ids())
    reference = toy_again().bfloat16()
    assert model(ids()[0]).dtype == torch.bfloat16
    assert model.blocks[0].q.bias.dtype == torch.bfloat16
    weight = reference.blocks[0].q.weight.double()
    assert relative(model.blocks[0].q.quantized_weight().dequantize(), weight) < 0.01
    assert relative(model(ids()[0]).detach(), reference(ids()[0]).detach().double()) < 0.05


def test_convert_keeps_biases_and_whether_they_train():
    model, reference = toy(), toy_again()
    model.blocks[0].q.bias.requires_grad_(requires_grad=False)
    model = tsq.quantize(model, CONFIG, ids())
    assert torch.equal(model.blocks[0].q.bias, reference.blocks[0].q.bias)
    assert model.blocks[0].k.bias is None
    assert not model.blocks[0].q.bias.requires_grad
    assert model.blocks[0].o.bias.requires_grad


def test_report_numbers_add_up():
    batches, float_model = ids(), toy()
    expected = sum(p.numel() * 4 for p in float_model.parameters())
    model = tsq.quantize(float_model, CONFIG, batches)
    report = model.tsq_report
    assert report is model.tsq_report
    assert report.config == CONFIG
    assert report.paired
    assert report.seconds > 0
    assert report.size_before == expected
    buffers = [*model.parameters(), *model.buffers()]
    assert report.size_after == sum(b.numel() * b.element_size() for b in buffers) < expected
    assert [layer.name for layer in report.quantized] == ", ".join(STAGES).split(", ")
    assert {layer.tokens for layer in report.quantized} == {4 * 12 * 12}
    down = entry(model, "blocks.0.down")
    assert (down.rows, down.columns, down.bits, down.group_size, down.kind) == (
        16,
        24,
        3,
        16,
        "Linear",
    )
    assert (
        down.bits_per_weight == model.blocks[0].down.bits_per_weight == 8.0
    )  # short rows fill up their last words
    assert (down.method, down.deviation, down.damping, down.symmetric) == (
        "two-stage",
        "target",
        0.01,
        False,
    )
    assert 0 < down.losses["refine"] <= 1.02 * down.losses["assign"] < 1
    assert (
        down.objective["exact"]
        <= 1.001 * down.objective["descent"]
        <= 1.002 * down.objective["assign"]
    )
    assert entry(model, "blocks.0.q").damping == 0.01


def test_report_loss_is_the_relative_output_error():
    linear, x = nn.Linear(16, 8, bias=False), rows(16)
    model = tsq.quantize(nn.Sequential(linear), CONFIG.changed(bits=2), [x])
    full = F.linear(x, linear.weight).detach().double()
    error = (F.linear(x, model[0].weight).double() - full).square().sum() / full.square().sum()
    assert entry(model, "0").losses["refine"] == pytest.approx(float(error), rel=1e-3)


def test_calibrate_is_quiet_where_there_is_no_terminal(capfd):
    tsq.quantize(toy(), CONFIG, ids())
    assert capfd.readouterr() == ("", "")


def test_calibrate_shows_a_bar_of_all_layers_on_request(capfd):
    tsq.quantize(toy(), CONFIG, ids(), progress=True)
    assert "12/12" in capfd.readouterr().err


def test_few_tokens_warn_once_with_the_worst_layer():
    with pytest.warns(
        FewTokensWarning,
        match=r"12 layers saw .* the worst is blocks\.\d\.down: 144 tokens, 24 columns, 384 tokens wanted",
    ) as found:
        tsq.quantize(toy(), CONFIG, ids(1))
    assert len(found) == 1


# ---- batches of other forms, and other modes -------------------------------------------------------------------------


def test_a_batch_keeps_its_class_on_its_way():
    batch = Batch(x=torch.ones(2, 16), name="a", more=[torch.ones(1)])
    moved = batch_forms.moved_to(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert (moved.x.device.type, moved.more[0].device.type, moved.name) == ("meta", "meta", "a")
    assert batch.x.device.type == "cpu"


class Wrapping(Mapping):
    """A mapping that a copy would share its items with."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def test_the_batch_of_the_caller_is_left_alone():
    batch = Wrapping(x=torch.ones(2, 16))
    assert batch_forms.moved_to(batch, torch.device("meta"))["x"].is_meta
    assert not batch["x"].is_meta
    assert isinstance(batch_forms.moved_to(torch.ones(2, 2).max(0), None), tuple)

    def forward(model, batch):
        batch.pop("labels")
        return model(**batch)

    given = [{"input": torch.randn(300, 16), "labels": torch.ones(1)} for _ in range(2)]
    model = tsq.quantize(nn.Sequential(nn.Linear(16, 16)), CONFIG, given, forward=forward)
    assert isinstance(model[0], tsq.QuantLinear)
    assert all("labels" in batch for batch in given)


@pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
@pytest.mark.parametrize(
    "changes", [{}, {"distill_epochs": 1}, {"guidance": 2}, {"method": "best"}], ids=str
)
@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
def test_what_is_quantised_in_inference_mode_can_be_trained_afterwards(changes, resumed, tmp_path):
    model = nn.Sequential(
        nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 8)
    )
    config = tsq.QuantConfig(**{"bits": 3, "group_size": 8, **changes})
    other = copy.deepcopy(model)
    with torch.inference_mode():
        batches = [torch.randn(64, 16) for _ in range(4)]
        options = {
            "loss": lambda model, batch: model(batch).square().sum(),
            "checkpoint_dir": tmp_path,
        }
        if resumed:
            tsq.quantize(other, config, batches, **options)
        model = tsq.quantize(model, config, batches, **options)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    x = torch.randn(3, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
@pytest.mark.parametrize("rounded", [("q",), ("k",), ("q", "v"), ("q", "k", "v")], ids=str)
def test_one_of_the_layers_with_an_input_may_need_no_statistics(rounded):
    torch.manual_seed(0)
    overrides = {name: {"method": "rtn"} for name in rounded}
    data = [torch.randn(8, 16, 16) for _ in range(2)]
    block = Block()
    report = tsq.quantize(
        copy.deepcopy(block), CONFIG.changed(overrides=overrides), data
    ).tsq_report
    alone = tsq.quantize(copy.deepcopy(block), CONFIG, data).tsq_report
    for entry, other in zip(report.layers[:3], alone.layers[:3], strict=True):
        assert entry.method == ("rtn" if entry.name in rounded else "two-stage")
        assert entry.name in rounded or entry.losses == pytest.approx(other.losses, rel=1e-3)


class Routed(nn.Module):
    """Experts of which the second sees few tokens."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        parts = (x[5:], x[:5], x[:0])
        return torch.cat(
            [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)]
        )


@pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
def test_a_loop_of_ones_own_lends_experts_the_statistics_of_all():
    model = tsq.prepare(Routed(), CONFIG)
    model(torch.randn(400, 16))
    report = tsq.convert(model).tsq_report
    assert [(entry.status, entry.tokens) for entry in report.layers] == [
        ("quantized", 395),
        ("fallback", 5),
        ("fallback", 0),
    ]
    assert "solved with the 400 of all experts" in report.layers[1].reason


@pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
def test_an_expert_that_needs_no_statistics_is_no_fallback():
    config = CONFIG.changed(overrides={"experts.1": {"method": "rtn"}})
    report = tsq.quantize(Routed(), config, [torch.randn(400, 16)]).tsq_report
    assert [entry.status for entry in report.layers] == ["quantized", "quantized", "fallback"]


@pytest.mark.parametrize(
    ("factor", "options"),
    [
        (1e-9, {}),
        (1e9, {}),
        (1e9, {"zero_points": "float"}),
        (1e9, {"method": "lnq"}),
        (1e9, {"method": "rtn"}),
    ],
    ids=str,
)
def test_scales_that_their_dtype_cannot_hold_are_warned_of(factor, options):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        model[0].weight.data *= factor
        model[1].weight.data[:2] = 0  # no scale is needed for these
        return model

    config = tsq.QuantConfig(bits=4, group_size=8, keep_zeros=False, **options)
    with pytest.warns(
        ScaleRangeWarning,
        match=r"cannot hold the scales of 0 \(8 of 8 rows\), whose weights .* set scale_dtype='",
    ):
        tsq.quantize(made(), config, [torch.randn(512, 16)])
    wide = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScaleRangeWarning)
        tsq.quantize(wide, config.changed(scale_dtype="float32"), [torch.randn(512, 16)])
    expected = made()[0].weight.detach()
    assert (wide[0].dequantize(torch.float32) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("at", ["replace", "model_bytes", "tell_hosts"])
def test_whatever_interrupts_convert_the_model_is_still_calibrated(at, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8))
    forward = lambda model, x: model[1](model[0](x, x, x)[0])  # noqa: E731
    tsq.prepare(model, tsq.QuantConfig(bits=4, group_size=8))
    tsq.calibrate(model, [torch.randn(32, 8, 16)], forward=forward)
    before, calls = dict(model.named_modules()), []

    def interrupt(*arguments):
        calls.append(arguments)
        if at == "model_bytes" and len(calls) == 1:
            return 0
        raise KeyboardInterrupt

    real = getattr(conversion, at)
    with monkeypatch.context() as patched:
        if at == "replace":
            patched.setattr(
                conversion, at, lambda *arguments: interrupt() if not calls else real(*arguments)
            )
        else:
            patched.setattr(conversion, at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            tsq.convert(model)
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not hasattr(model, "tsq_report")
    assert type(tsq.convert(model)[1]) is tsq.QuantLinear


def test_a_copy_of_a_prepared_model_sees_tied_layers_too():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    other = copy.deepcopy(tsq.prepare(model, tsq.QuantConfig(bits=4, group_size=8)))
    tsq.calibrate(other, [torch.randn(512, 16)])
    assert {layer.tokens for layer in tsq.convert(other).tsq_report.quantized} == {1024}


def test_a_layer_that_was_replaced_after_prepare_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    tsq.calibrate(tsq.prepare(model, tsq.QuantConfig(bits=4, group_size=8)), [torch.randn(512, 16)])
    model[0] = nn.Linear(16, 16)
    with pytest.raises(
        StateError, match="0 is another module than the one that was prepared; call unprepare"
    ):
        tsq.convert(model)
    assert type(tsq.unprepare(model)[2]) is nn.Linear


def test_observers_are_back_where_convert_was_interrupted(monkeypatch):
    model = tsq.prepare(nn.Sequential(nn.Linear(16, 8)), tsq.QuantConfig(bits=4, group_size=8))
    model(torch.randn(300, 16))

    def interrupt(_model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(conversion, "tell_hosts", interrupt)
        tsq.convert(model)
    model(torch.randn(300, 16))
    assert tsq.convert(model).tsq_report.quantized[0].tokens == 600
