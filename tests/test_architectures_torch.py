"""Models of many sorts go the whole way: prepared and back, calibrated, converted, saved and loaded.

What is not quantised is listed here for each of them, by name and reason, so that nothing is left out silently.
Architectures of transformers are in ``test_architectures_transformers.py``.
"""

import contextlib
import dataclasses
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import tsq_layers as tsq
from tsq_layers.errors import LayerError, SkippedLayerWarning
from tsq_layers.layers import packed
from tsq_layers.passes.batches import default_forward

# The data are as tiny as the models.
pytestmark = [
    pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
]

CONFIG = tsq.QuantConfig(bits=8, group_size=16, embeddings=True, skip=())
COUNT = 4  # batches

VECTOR = "no matrix: a scale, or another vector"
NEVER = "no batch reached it, or its weight is read without a call"
COMPUTED = "a weight is computed by a parametrization; torch.nn.utils.parametrize.remove_parametrizations makes it a plain layer"  # noqa: E501
BY_HOOK = "its weight or bias is computed by a hook (pruning, spectral_norm); torch.nn.utils.prune.remove, or remove_spectral_norm, makes it a plain layer"  # noqa: E501
SCRIPTED = "its code is compiled by torch.jit; give the module that it was made from"


def unknown(kind):
    return f"{kind} is no layer that is known; tsq_layers.layers.register can teach it"


def own_forward(kind):
    return f"{kind} computes something of its own around its weight; tsq_layers.layers.register can teach it"


def recurrent(kind):
    return f"the weights of {kind} are used step by step inside torch; torch.ao.quantization.quantize_dynamic takes them to 8 bits"  # noqa: E501


def adapter(layer):
    return f"part of an adapter on {layer}"


@dataclass(frozen=True)
class Case:
    """A model, and what is to become of it.

    Args:
        build: makes it, with any weights.
        batch: makes the batch of a number.
        gaps: matrix that is not quantised → the reason. Numbers stand for any numbers.
        never_called: how many layers the model reads the weight of without calling them.
        coverage: at least that share of the parameters is quantised.
        device: on which the model is built that the checkpoint is loaded into.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    gaps: Mapping[str, str] = field(default_factory=dict)
    never_called: int = 0
    coverage: float = 0.9
    device: str = "meta"


def whole_way(case, path):
    """The life of a model, step by step."""
    data = [case.batch(index) for index in range(COUNT)]
    model = made(case)
    before = output(model, data[0])
    parameters = dict(model.named_parameters())
    check_preparing(model, data[0], before)

    tsq.prepare(model, CONFIG)
    with expecting(case.never_called):
        tsq.calibrate(model, data)
    model = tsq.convert(model)
    after = output(model, data[0])
    # Rounding to 8 bits in groups of 16 changes a weight by 0.4 % of its standard deviation; some twenty layers add up.
    assert 0 < distance(after, before) < 0.025

    report = model.tsq_report
    assert {item.name: item.shape for item in report.parameters} == {
        n: tuple(p.shape) for n, p in parameters.items()
    }
    assert len(report.parameters) == len(parameters)
    assert gaps(report) == {starred(name): starred(reason) for name, reason in case.gaps.items()}
    assert report.coverage >= case.coverage

    with expecting(case.never_called):
        rough = tsq.quantize(made(case), CONFIG.changed(bits=3), data[:2], paired=False)
    assert 10 * distance(after, before) < distance(output(rough, data[0]), before)

    tsq.save(model, path)
    loaded = tsq.load(path, fresh(case))
    assert torch.equal(output(loaded, data[0]), after)
    assert loaded.tsq_report == report
    check_every_layer_counts(loaded, data[0], after)


def made(case, seed=0):
    """The model with weights that all matter: none of them is zero, and no norm is one."""
    torch.manual_seed(seed)
    model = case.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                0.15 * torch.randn_like(parameter) + (parameter if parameter.dim() < 2 else 0)
            )
    return model


def fresh(case):
    """The model for loading: without any values, or with others."""
    if case.device != "meta":
        return made(case, seed=1)
    with torch.device("meta"):
        return case.build().eval()


@torch.no_grad()
def output(model, batch):
    found = default_forward(model, batch)
    if isinstance(found, Mapping):  # of transformers
        found = found["logits" if "logits" in found else "logits_per_image"]
    assert found.isfinite().all()
    return found


def distance(found, expected):
    """Of rows, relative; the median, for a token that goes to another expert is far away."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def check_preparing(model, batch, before):
    """It changes what is computed by rounding at most, and can be undone."""
    state, training = (
        model.state_dict(keep_vars=True),
        [module.training for module in model.modules()],
    )
    torch.testing.assert_close(
        output(tsq.prepare(model, CONFIG), batch), before, rtol=1e-5, atol=1e-5
    )
    tsq.unprepare(model)
    again = model.state_dict(keep_vars=True)
    assert list(again) == list(state)
    assert all(again[key] is state[key] for key in state)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(output(model, batch), before)


@contextlib.contextmanager
def expecting(never_called):
    if not never_called:
        yield
        return
    with pytest.warns(SkippedLayerWarning, match=f"^{never_called} layers were never called"):
        yield


def gaps(report):
    """Matrix that was kept → the reason, with stars for numbers. Of vectors it is checked that they
    were kept as such.
    """
    found = {}
    for item in report.parameters:
        if item.kept and len(item.shape) < 2:
            assert item.reason == ("bias" if "bias" in item.name.rpartition(".")[2] else VECTOR)
        elif item.kept:
            assert found.setdefault(starred(item.name), starred(item.reason)) == starred(
                item.reason
            )
    return found


def starred(text):
    return re.sub(r"\d+", "*", text)


def check_every_layer_counts(model, batch, expected):
    """Whatever is changed in a quantised layer changes the output: it is this layer that the model uses."""
    layers = list(packed(model))
    assert len(layers) > 1
    for name, _, matrix in layers:
        words = matrix.words.clone()
        matrix.words.bitwise_xor_(0x55555555)
        assert not torch.equal(output(model, batch), expected), f"{name} is not used"
        matrix.words.copy_(words)
    assert torch.equal(output(model, batch), expected)


def randn(index, *sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(index))


def rows(index):
    return randn(index, 96, 32)


def sequences(index):
    return randn(index, 8, 9, 32)


# --- models ------------------------------------------------------------------------------------


def transformer():
    return nn.Transformer(32, 4, 2, 2, 48, batch_first=True)


def two_sequences(index):
    padding = torch.zeros(6, 9, dtype=torch.bool)
    padding[1, 5:] = True
    return {
        "src": randn(index, 6, 9, 32),
        "tgt": randn(index + 50, 6, 7, 32),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
        "tgt_is_causal": True,
        "memory_key_padding_mask": padding,
    }


class Residual(nn.Module):
    """Two convolutions with normalisation between, told the time."""

    def __init__(self, channels, out):
        super().__init__()
        self.before, self.after = nn.GroupNorm(4, channels), nn.GroupNorm(4, out)
        self.first, self.second = (nn.Conv2d(width, out, 3, padding=1) for width in (channels, out))
        self.time = nn.Linear(32, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x, time):
        y = self.first(F.silu(self.before(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.after(y)))


class ImageAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(y, y, y, need_weights=False)[0].transpose(1, 2).view_as(x)


class UNet(nn.Module):
    """Denoises images as diffusion models do."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first, self.down = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
        )
        self.left, self.middle, self.right = Residual(16, 16), Residual(16, 32), Residual(32, 16)
        self.attention, self.up = ImageAttention(32), nn.Conv2d(32, 16, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, time):
        angles = time[:, None] * torch.exp(-torch.arange(8) / 2)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        left = self.left(self.first(x), time)
        middle = self.attention(self.middle(self.down(left), time))
        up = self.up(F.interpolate(middle, scale_factor=2.0))
        return self.last(F.silu(self.norm(self.right(torch.cat([left, up], 1), time))))


def noisy(index):
    return randn(index, 3, 3, 8, 8), 10 * torch.arange(1.0, 4.0)


class Decoder(nn.Module):
    """A transposed convolution, a bag of embeddings and a bilinear layer: none of them is known."""

    def __init__(self):
        super().__init__()
        self.bag, self.pair, self.wide = (
            nn.EmbeddingBag(10, 16),
            nn.Bilinear(16, 16, 16),
            nn.Linear(16, 4 * 16),
        )
        self.up, self.last = nn.ConvTranspose2d(4, 8, 2, stride=2), nn.Conv2d(8, 3, 3)

    def forward(self, ids):
        x = self.bag(ids)
        return self.last(self.up(self.wide(self.pair(x, x)).view(-1, 4, 4, 4)))


def bags(index):
    return torch.randint(10, (12, 5), generator=torch.Generator().manual_seed(index))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.cell = nn.Linear(32, 24), nn.GRUCell(24, 24)
        self.lstm, self.last = nn.LSTM(24, 16, batch_first=True), nn.Linear(16, 48)

    def forward(self, x):
        states = [x.new_zeros(len(x), 24)]
        for step in self.first(x).unbind(1):
            states.append(self.cell(step, states[-1]))
        return self.last(self.lstm(torch.stack(states, 1))[0])


def computed():
    """Layers of which a weight or a bias is computed."""
    names = ("normed", "spectral", "pruned", "bounded", "wide", "last")
    layers = {name: nn.Linear(32, 64) if name == "wide" else nn.Linear(32, 32) for name in names}
    layers["last"] = nn.Linear(64, 32)
    parametrizations.weight_norm(layers["normed"])
    spectral_norm(layers["spectral"])
    prune.l1_unstructured(layers["pruned"], "bias", 0.3)
    parametrize.register_parametrization(layers["bounded"], "bias", nn.Tanh())
    return nn.Sequential(OrderedDict(layers))


class Adapted(nn.Module):
    """A layer with a low-rank adapter, as PEFT wraps it."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict(
            {"default": nn.Linear(base_layer.in_features, rank, bias=False)}
        )
        self.lora_B = nn.ModuleDict(
            {"default": nn.Linear(rank, base_layer.out_features, bias=False)}
        )

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


def adapted():
    return nn.Sequential(Adapted(nn.Linear(32, 64)), nn.Tanh(), Adapted(nn.Linear(64, 32)))


class Loop(nn.Module):
    """One layer is called as often as the batch says, another one by three names."""

    def __init__(self):
        super().__init__()
        self.first, self.core, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.again = nn.ModuleList([self.last, self.last])

    def forward(self, x, times):
        x = self.first(x)
        for _ in range(times):
            x = x + torch.tanh(self.core(x))
        return self.again[1](self.again[0](x).tanh())


class Read(nn.Module):
    """The decoder is the encoder's weight, read; so is the weight of a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.encoder, self.other, self.middle = (
            nn.Linear(32, 48),
            nn.Linear(32, 32),
            nn.Linear(48, 48),
        )

    def forward(self, x):
        x = F.linear(x, self.other.weight, self.other.bias)
        return F.linear(torch.tanh(self.middle(torch.tanh(self.encoder(x)))), self.encoder.weight.T)


class Widths(nn.Module):
    """A mixture of experts, each of another width."""

    def __init__(self):
        super().__init__()
        widths = (16, 48, 48)
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))
                for width in widths
            ]
        )

    def forward(self, x):
        y, choice = torch.zeros_like(x), x[:, 0].round().clamp(-1, 1) + 1
        for index, expert in enumerate(self.experts):
            y[choice == index] = expert(x[choice == index])
        return y


class Matrices(nn.Module):
    """Children that are called like the packed matrix of a quantised layer."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(32, 32)
        self.inner = nn.ModuleDict({"matrix": nn.ModuleDict({"matrix": nn.Linear(32, 32)})})

    def forward(self, x):
        return self.inner["matrix"]["matrix"](torch.tanh(self.matrix(x)))


class Extra(nn.Linear):
    """It computes what a linear layer does, but holds more."""

    def __init__(self):
        super().__init__(32, 32)
        self.extra = nn.Parameter(torch.ones(32, 32))


class UsesExtra(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = (
            Extra(),
            nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)),
        )

    def forward(self, x):
        return self.last(self.layer(x) @ self.layer.extra)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(nn.Linear(32, 32))
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), inner)


def patched():
    """A layer that somebody has put another forward on."""
    layer = nn.Linear(32, 32)
    forward = layer.forward
    layer.forward = lambda x: forward(x) / 2
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.convolution, self.table = (
            nn.Linear(32, 32),
            nn.Conv1d(1, 16, 3),
            nn.Embedding(8, 32),
        )

    def forward(self, x):
        x = self.dense(input=x) + self.table(input=(x[:, 0] > 0).long())
        return self.convolution(input=x[:, None])


class Empty(nn.Module):
    """Layers without any weights."""

    def __init__(self):
        super().__init__()
        self.none, self.nothing = nn.Linear(0, 32), nn.Linear(32, 0)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x) + self.none(self.nothing(x))


def one_bias():
    """Layers whose biases are one parameter."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model[2].bias = model[0].bias
    return model


def compiled():
    return torch.compile(
        nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), backend="eager"
    )


CASES = {
    "transformer": Case(transformer, two_sequences),
    "unet": Case(UNet, noisy, device="cpu"),
    "decoder": Case(
        Decoder,
        bags,
        {
            "bag.weight": unknown("EmbeddingBag"),
            "pair.weight": unknown("Bilinear"),
            "up.weight": unknown("ConvTranspose2d"),
        },
        coverage=0.2,
    ),
    "recurrent": Case(
        Recurrent,
        sequences,
        {
            "cell.weight_ih": recurrent("GRUCell"),
            "cell.weight_hh": recurrent("GRUCell"),
            "lstm.weight_ih_l0": recurrent("LSTM"),
            "lstm.weight_hh_l0": recurrent("LSTM"),
        },
        coverage=0.15,
    ),
    "computed": Case(
        computed,
        rows,
        {
            "normed.parametrizations.weight.original0": COMPUTED,
            "spectral.weight_orig": BY_HOOK,
            "pruned.weight": BY_HOOK,
            "bounded.weight": COMPUTED,
        },
        coverage=0.4,
        device="cpu",  # with old hooks, weights are attributes that nobody fills
    ),
    "adapters": Case(
        adapted,
        rows,
        {
            "0.lora_A.default.weight": adapter("0.base_layer"),
            "0.lora_B.default.weight": adapter("0.base_layer"),
        },
        coverage=0.85,
    ),
    "loop": Case(Loop, lambda index: (rows(index), (3, 1, 0, 5)[index])),
    "read": Case(Read, rows, {"other.weight": NEVER}, never_called=1, coverage=0.7),
    "widths": Case(Widths, rows),
    "matrices": Case(Matrices, rows),
    "extra": Case(
        UsesExtra,
        rows,
        {"layer.weight": own_forward("Extra"), "layer.extra": own_forward("Extra")},
        coverage=0.6,
    ),
    "patched": Case(patched, rows, {"0.weight": own_forward("Linear")}, coverage=0.7),
    "scripted": Case(scripted, rows, {"3.weight": SCRIPTED}, coverage=0.7, device="cpu"),
    "keywords": Case(Keywords, rows),
    "empty": Case(Empty, rows),
    "one bias": Case(one_bias, rows),
    "compiled": Case(compiled, rows),
}


@pytest.mark.parametrize("name", CASES)
def test_model_goes_the_whole_way(name, tmp_path):
    whole_way(CASES[name], tmp_path)


def test_gap_that_is_not_listed_is_found(tmp_path):
    case = dataclasses.replace(CASES["decoder"], gaps={"bag.weight": unknown("EmbeddingBag")})
    with pytest.raises(AssertionError, match="Bilinear"):
        whole_way(case, tmp_path)


class Hiding(nn.Module):
    """It calls a layer by a reference that torch does not know of, which nobody can replace."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.layers = [self.first]

    def forward(self, x):
        return self.last(torch.tanh(self.layers[0](x)))


def test_layer_that_the_model_does_not_use_is_found(tmp_path):
    model = tsq.quantize(made(Case(Hiding, rows)), CONFIG, [rows(0)])
    with pytest.raises(AssertionError, match="first is not used"):
        check_every_layer_counts(model, rows(0), output(model, rows(0)))


def hooked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    before = model[0].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    after = model[2].register_forward_hook(lambda layer, args, output: output - 3)
    return model, (before, after)


def test_hooks_of_the_user_stay_until_they_are_removed(tmp_path):
    model, handles = hooked()
    x = rows(0)
    with_hooks = model(x).detach()
    model = tsq.quantize(model, CONFIG, [x])
    assert distance(model(x).detach(), with_hooks) < 0.02
    tsq.save(model, tmp_path)
    for handle in handles:
        handle.remove()
    model_without, _ = hooked()
    for hooks in (model_without[0]._forward_pre_hooks, model_without[2]._forward_hooks):
        hooks.clear()
    assert distance(model(x).detach(), model_without(x).detach()) < 0.02


def test_hooks_of_the_user_stay_when_a_checkpoint_is_loaded(tmp_path):
    model = tsq.quantize(hooked()[0], CONFIG, [rows(0)])
    tsq.save(model, tmp_path)
    assert torch.equal(tsq.load(tmp_path, hooked()[0])(rows(0)), model(rows(0)))


def test_layer_without_a_shape_is_named():
    model = nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(8))
    with pytest.raises(LayerError, match=r"1\.weight has no shape yet"):
        tsq.prepare(model, CONFIG)
    model(rows(0))
    assert "1" in {
        layer.name for layer in tsq.quantize(model, CONFIG, [rows(0)]).tsq_report.quantized
    }
