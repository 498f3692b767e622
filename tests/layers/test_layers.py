"""Kinds of layers, composites and what users register: what is found, what is named, what stays tied."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import tsq_layers as tsq
from tsq_layers.errors import (
    ConfigError,
    FewTokensWarning,
    LayerError,
    SkippedLayerWarning,
    StateError,
)
from tsq_layers.layers import kind_behind, kind_of, why_not
from tsq_layers.layers.expert_weights import ExpertWeights
from tsq_layers.layers.pools import Pool, expert_pool

CONFIG = tsq.QuantConfig(bits=8, group_size=16, skip=())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(width=16, count=1024):
    return torch.randn(count, width)


def entry(model, name):
    return next(layer for layer in model.tsq_report.layers if layer.name == name)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class Doubled(nn.Linear):
    """A subclass whose forward is its own: no layer that the library knows."""

    def forward(self, x):
        return 2 * super().forward(x)


class QuantDoubled(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        return 2 * self.matrix(x)


class Plain(nn.Linear):
    """A subclass that computes the same."""


DOUBLED = tsq.layers.LayerKind(
    name="Doubled",
    matches=lambda module: type(module) is Doubled,
    replacement=lambda module, matrix: QuantDoubled(matrix).train(module.training),
)


class Pair(nn.Module):
    """Two matrices in one parameter, used without a layer."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 16, 16) / 4)

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.weights[0])), self.weights[1])


class SplitPair(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.first, self.second = (nn.Linear(16, 16, bias=False, device="meta") for _ in range(2))
        self.first.weight, self.second.weight = (
            nn.Parameter(weight) for weight in pair.weights.detach()
        )

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


PAIR = tsq.layers.Composite(
    name="Pair", matches=lambda module: type(module) is Pair, split=SplitPair
)


@pytest.fixture
def registered():
    for known in (DOUBLED, PAIR):
        tsq.layers.register(known)
    yield
    for known in (DOUBLED, PAIR):
        tsq.layers.unregister(known.name)


def test_own_kind_is_quantised_saved_and_loaded(registered, tmp_path):
    model = nn.Sequential(Doubled(16, 24), nn.ReLU(), nn.Linear(24, 8))
    x, fresh = rows(), copy.deepcopy(model)
    before = model(x).detach()
    model = tsq.quantize(model, CONFIG, [x])
    assert isinstance(model[0], QuantDoubled)
    assert entry(model, "0").kind == "Doubled"
    assert 0 < distance(model(x).detach(), before) < 0.01
    tsq.save(model, tmp_path)
    assert torch.equal(tsq.load(tmp_path, fresh)(x), model(x))


def test_own_composite_is_split_quantised_saved_and_loaded(registered, tmp_path):
    model = nn.Sequential(Pair(), nn.ReLU(), nn.Linear(16, 8))
    x, fresh, keys = rows(), copy.deepcopy(model), list(model.state_dict())
    before = model(x).detach()
    assert torch.equal(tsq.prepare(model, CONFIG)(x), before)
    assert "0.second.weight" in model.state_dict()
    assert list(tsq.unprepare(model).state_dict()) == keys
    model = tsq.quantize(model, CONFIG, [x])
    assert isinstance(model[0].second, tsq.QuantLinear)
    assert 0 < distance(model(x).detach(), before) < 0.01
    tsq.save(model, tmp_path)
    assert torch.equal(tsq.load(tmp_path, fresh)(x), model(x))


def test_checkpoint_with_an_own_kind_says_that_it_must_be_registered(tmp_path):
    model = nn.Sequential(Doubled(16, 24), nn.Linear(24, 8))
    fresh = copy.deepcopy(model)
    tsq.layers.register(DOUBLED)
    try:
        tsq.save(tsq.quantize(model, CONFIG, [rows()]), tmp_path)
    finally:
        tsq.layers.unregister("Doubled")
    with pytest.raises(tsq.errors.CheckpointError, match=r"layer '0'.*Doubled.*registered"):
        tsq.load(tmp_path, fresh)


def test_what_is_no_kind_is_refused_and_unknown_names_are_told():
    with pytest.raises(ConfigError, match="give a LayerKind, or a Composite"):
        tsq.layers.register(nn.Linear)
    with pytest.raises(ConfigError, match=r"unregister\('Nothing'\).*'Linear'"):
        tsq.layers.unregister("Nothing")


def test_subclass_that_computes_the_same_is_quantised_and_one_that_does_not_is_named():
    model = tsq.quantize(nn.Sequential(Plain(16, 16), Doubled(16, 16)), CONFIG, [rows()])
    assert [(layer.name, layer.status) for layer in model.tsq_report.layers] == [
        ("0", "quantized"),
        ("1.weight", "not supported"),
    ]
    assert "tsq_layers.layers.register" in entry(model, "1.weight").reason


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (parametrizations.weight_norm(nn.Linear(16, 16)), "remove_parametrizations"),
        (parametrizations.spectral_norm(nn.Linear(16, 16)), "remove_parametrizations"),
        (prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5), "prune.remove"),
        (nn.LSTM(16, 16), "quantize_dynamic"),
        (nn.GRUCell(16, 16), "quantize_dynamic"),
        (nn.Bilinear(16, 16, 4), "tsq_layers.layers.register"),
        (nn.Embedding(16, 16, max_norm=1.0), "without max_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_module_that_cannot_be_quantised_says_why(module, reason):
    assert kind_of(module) is None
    assert reason in why_not(module)


class TiedNet(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.embed, self.up, self.head = (
            nn.Embedding(40, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 40, bias=bias),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.up(self.embed(ids))))


def ids():
    return torch.randint(40, (64, 16))


@pytest.mark.parametrize("bias", [False, True])
def test_tied_table_and_head_are_quantised_once_and_still_tied(bias, tmp_path):
    model = TiedNet(bias)
    x, fresh = ids(), copy.deepcopy(model)
    before = model(x).detach()
    model = tsq.quantize(
        model, tsq.QuantConfig(bits=8, group_size=16, skip=(), embeddings=True), [x]
    )
    assert model.embed.matrix is model.head
    assert [layer.name for layer in model.tsq_report.quantized] == ["up", "head"]
    assert entry(model, "head").tokens == x.numel()
    assert {item.name: item.layers for item in model.tsq_report.parameters}["embed.weight"] == (
        "embed",
        "head",
    )
    assert 0 < distance(model(x).detach(), before) < 0.02
    tsq.save(model, tmp_path)
    again = tsq.load(tmp_path, fresh)
    assert again.embed.matrix is again.head
    assert torch.equal(again(x), model(x))


def test_tied_table_of_a_skipped_head_stays_with_a_warning():
    model = TiedNet()
    with pytest.warns(
        SkippedLayerWarning, match="embed stays in full precision: its weight is tied to head"
    ):
        model = tsq.quantize(
            model, tsq.QuantConfig(bits=8, skip=("head",), embeddings=True), [ids()]
        )
    assert model.head.weight is model.embed.weight


class TwoHeads(nn.Module):
    """Two linear layers with one weight, on different inputs."""

    def __init__(self, biases=(False, False)):
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.a, self.b = nn.Linear(16, 8, bias=biases[0]), nn.Linear(16, 8, bias=biases[1])
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(torch.relu(self.up(x))) + self.b(x)


def test_tied_layers_have_statistics_from_all_their_calls():
    model, x = TwoHeads(), rows()
    before = model(x).detach()
    model = tsq.quantize(model, CONFIG, [x])
    assert entry(model, "a").tokens == 2 * len(x)
    assert model.a is model.b
    assert 0 < distance(model(x).detach(), before) < 0.01


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)], ids=str)
def test_tied_layers_with_biases_of_their_own_are_left_alone(biases):
    model = TwoHeads(biases)
    with pytest.warns(
        SkippedLayerWarning,
        match="a, b stays in full precision: the weight of a and b is tied, their",
    ):
        model = tsq.quantize(model, CONFIG, [rows()])
    assert model.a.weight is model.b.weight


def test_own_loop_sees_tied_layers_as_calibration_does():
    model, x = TwoHeads(), rows()
    tsq.prepare(model, CONFIG)
    model(x)
    assert entry(tsq.convert(model), "a").tokens == 2 * len(x)


def test_adapters_are_left_alone():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(16, 16)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    model = tsq.quantize(nn.Sequential(Lora(), nn.Linear(16, 8)), CONFIG, [rows()])
    assert [layer.name for layer in model.tsq_report.quantized] == ["0.base_layer", "1"]
    assert entry(model, "0.lora_A.default").reason == "part of an adapter on 0.base_layer"


def test_linear_layer_of_a_library_with_a_forward_of_its_own():
    class Linear(nn.Linear):
        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)

    assert kind_of(Linear(16, 16)) is None
    Linear.__module__ = "whisper.model"
    model, x = nn.Sequential(Linear(16, 16), nn.Linear(16, 8)), rows()
    before = model(x).detach()
    model = tsq.quantize(model, CONFIG, [x])
    assert entry(model, "0").kind == "Linear"
    assert 0 < distance(model(x).detach(), before) < 0.01
    assert model[0](x.double()).dtype == torch.float64


def test_network_with_a_layer_of_its_own_called_base_layer():
    class Stages(nn.Module):
        """As DLA of timm."""

        def __init__(self):
            super().__init__()
            self.base_layer, self.level0 = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.level0(self.base_layer(x).relu())

    model = tsq.quantize(Stages(), CONFIG, [rows()])
    assert [layer.name for layer in model.tsq_report.quantized] == ["base_layer", "level0"]


@pytest.mark.parametrize("mode", [False, True])
def test_parts_of_a_composite_are_in_its_mode(mode):
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8)).train(
        mode
    )
    tsq.prepare(model, CONFIG)
    assert {module.training for module in model.modules()} == {mode}


def test_composite_whose_part_is_in_another_mode_gets_it_back():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8))
    model[0].out_proj.eval()
    tsq.prepare(model, CONFIG)
    tsq.unprepare(model)
    assert {name for name, module in model.named_modules() if not module.training} == {"0.out_proj"}


def test_composite_that_is_put_back_takes_over_the_mode():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8))
    attention = model[0]
    tsq.prepare(model, CONFIG)
    model.eval()
    tsq.unprepare(model)
    assert model[0] is attention
    assert not any(module.training for module in model.modules())


def test_model_that_is_a_composite_is_refused_with_what_to_do():
    with pytest.raises(
        LayerError, match=r"the model is itself a MultiheadAttention.*nn.Sequential"
    ):
        tsq.prepare(nn.MultiheadAttention(16, 2), CONFIG)


def test_converted_convolution_is_refused_a_second_time():
    model = tsq.quantize(nn.Sequential(nn.Conv1d(4, 8, 3)), CONFIG, [torch.randn(8, 4, 64)])
    with pytest.raises(StateError, match="already converted"):
        tsq.prepare(model, CONFIG)


def test_expert_pools_are_found_by_name():
    class MoeExperts(nn.ModuleDict):
        pass

    fused = ExpertWeights(nn.Parameter(torch.zeros(2, 2, 2)), transposed=False)
    lists = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(2, 2)})])
    block = nn.ModuleDict(
        {"moe": MoeExperts({"up": fused}), "experts": lists, "groups": nn.ModuleDict({"up": fused})}
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    modules = dict(model.named_modules(remove_duplicate=False))
    assert expert_pool("layers.0.moe.up.1", modules) == Pool(
        "layers.0.moe.up.*", "layers.0.moe", 1, in_order=True
    )
    assert expert_pool("layers.0.groups.up.1", modules) is None
    assert expert_pool("layers.0.experts.0.w1", modules) == Pool(
        "layers.0.experts.*.w1", "layers.0.experts", 0, in_order=False
    )
    assert expert_pool("layers.0", modules) is None


def test_attention_that_is_skipped_is_split_all_the_same():
    """Otherwise torch's encoder would pass by the layers around it."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    mask = torch.arange(8) >= torch.tensor([[8], [6], [4]])
    x = torch.randn(3, 8, 16)
    before = model(x, src_key_padding_mask=mask).detach()
    config = tsq.QuantConfig(bits=8, group_size=8, skip=("*self_attn*",))
    batch = {"src": x, "src_key_padding_mask": mask}
    with pytest.warns(FewTokensWarning):
        model = tsq.quantize(model, config, [batch])
    assert len(model.tsq_report.quantized) == 4
    calls = []
    model.layers[1].linear2.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = model(x, src_key_padding_mask=mask)
    assert calls
    assert distance(found[~mask], before[~mask]) < 0.01


def test_unprepare_gives_back_the_original_with_a_new_dtype():
    model = nn.Sequential(Pair())
    tsq.layers.register(PAIR)
    try:
        tsq.prepare(model, CONFIG).double()
        tsq.unprepare(model)
    finally:
        tsq.layers.unregister("Pair")
    assert isinstance(model[0], Pair)
    assert model[0].weights.dtype == torch.float64


def test_attentions_that_share_their_weights_are_quantised_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                nn.MultiheadAttention(16, 2, bias=False, batch_first=True) for _ in range(2)
            )
            self.b.in_proj_weight = self.a.in_proj_weight

        def forward(self, x):
            x = x + self.a(x, x, x)[0]
            return x + self.b(x, x, x)[0]

    x = torch.randn(4, 64, 16)
    model = tsq.quantize(Two(), tsq.QuantConfig(bits=8, group_size=8), [x])
    assert [layer.name for layer in model.tsq_report.quantized] == [
        "a.q_proj",
        "a.k_proj",
        "a.v_proj",
        "a.out_proj",
        "b.out_proj",
    ]
    assert model.a.q_proj is model.b.q_proj


def test_old_name_of_replacement_is_accepted_with_a_warning():
    def replacement(module, matrix):
        return QuantDoubled(matrix)

    with pytest.warns(tsq.errors.TSQDeprecationWarning, match=r"LayerKind\.replacement") as caught:
        kind = tsq.layers.LayerKind(
            name="Doubled", matches=lambda module: type(module) is Doubled, twin=replacement
        )
    assert caught[0].filename == __file__
    assert kind.replacement.__wrapped__ is replacement
    with pytest.warns(tsq.errors.TSQDeprecationWarning, match=r"LayerKind\.replacement") as caught:
        assert kind.twin is kind.replacement
    assert caught[0].filename == __file__


def test_old_and_new_name_of_replacement_together_are_refused():
    with (
        pytest.warns(tsq.errors.TSQDeprecationWarning),
        pytest.raises(TypeError, match="give replacement alone"),
    ):
        tsq.layers.LayerKind(name="a", matches=bool, twin=QuantDoubled, replacement=QuantDoubled)


def test_copy_of_a_kind_by_dataclasses_replace_warns_of_nothing():
    kind = dataclasses.replace(DOUBLED, name="Other")
    module = Doubled(4, 4)
    layer = kind.replacement(module, tsq.QuantLinear(4, 4, bits=4, group_size=None))
    assert kind_behind(layer) == "Other"
