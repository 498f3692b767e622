"""Every parameter of a model is named, with what became of it; and too little coverage is an error."""

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import ConfigError, CoverageError, SkippedLayerWarning

CONFIG = tsq.QuantConfig(bits=8, group_size=16)


class Mixed(nn.Module):
    """Something of everything."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.position = nn.Parameter(torch.randn(1, 8, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.up, self.lm_head = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.Linear(32, 40, bias=False),
        )
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.unused = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        x = self.embed(ids) + self.position
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.lm_head(torch.relu(self.up(x + self.experts[0](x) * self.scale)))


def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


def ids():
    return [torch.randint(40, (64, 8)) for _ in range(2)]


@pytest.fixture
def converted():
    with pytest.warns((SkippedLayerWarning, tsq.errors.FewTokensWarning)):
        return tsq.quantize(mixed(), CONFIG, ids())


def test_every_parameter_is_named_once_with_its_reason(converted):
    found = {item.name: (item.status, item.reason) for item in converted.tsq_report.parameters}
    assert list(found) == [name for name, _ in mixed().named_parameters()]
    vector = "no matrix: a scale, or another vector"
    assert found == {
        "position": (
            "kept",
            "Mixed is no layer that is known; tsq_layers.layers.register can teach it",
        ),
        "scale": ("kept", vector),
        "embed.weight": ("kept", "embeddings=False in the configuration"),
        "attention.in_proj_weight": ("quantized", ""),
        "attention.in_proj_bias": ("kept", "bias"),
        "attention.out_proj.weight": ("quantized", ""),
        "attention.out_proj.bias": ("kept", "bias"),
        "norm.weight": ("kept", vector),
        "norm.bias": ("kept", "bias"),
        "up.weight": ("quantized", ""),
        "up.bias": ("kept", "bias"),
        "lm_head.weight": ("kept", "skip in the configuration"),
        "experts.0.weight": ("quantized", ""),
        "experts.0.bias": ("kept", "bias"),
        "experts.1.weight": ("quantized", ""),
        "experts.1.bias": ("kept", "bias"),
        "unused.weight": ("kept", "no batch reached it, or its weight is read without a call"),
        "unused.bias": ("kept", "bias"),
    }


def test_shares_are_counted_in_entries_and_in_bytes(converted):
    report, total = (
        converted.tsq_report,
        sum(parameter.numel() for parameter in mixed().parameters()),
    )
    quantised = 4 * 16 * 16 + 16 * 32 + 2 * 16 * 16
    assert report.coverage == pytest.approx(quantised / total)
    assert report.byte_coverage == pytest.approx(quantised / total)


def test_parts_of_a_packed_weight_that_are_skipped_are_told():
    config = tsq.QuantConfig(
        bits=8, group_size=16, skip=("lm_head", "unused", "experts.*", "v_proj")
    )
    model = tsq.quantize(mixed(), config, ids())
    packed = next(
        item for item in model.tsq_report.parameters if item.name == "attention.in_proj_weight"
    )
    assert (packed.status, packed.quantized) == ("partly quantized", 2 * 16 * 16)
    assert packed.reason == "1 of 3 parts: skip in the configuration"
    assert packed.layers == ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def test_too_little_coverage_is_an_error_that_names_the_gaps_and_loses_nothing():
    model = mixed()
    with pytest.warns((SkippedLayerWarning, tsq.errors.FewTokensWarning)):
        tsq.calibrate(tsq.prepare(model, CONFIG), ids())
    with pytest.raises(
        CoverageError, match=r"45\.2% of the parameters.*min_coverage=0\.9.*lm_head\.weight \(skip"
    ):
        tsq.convert(model, min_coverage=0.9)
    assert isinstance(model.up, nn.Linear)
    model = tsq.convert(model, min_coverage=0.45)
    assert isinstance(model.up, tsq.QuantLinear)


def test_quantize_restores_the_model_when_coverage_is_too_little():
    model = nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16))
    x, before = torch.randn(512, 16), dict(model.named_parameters())
    with pytest.raises(CoverageError, match="weight_ih_l0"):
        tsq.quantize(model, CONFIG, [x], min_coverage=0.9)
    assert dict(model.named_parameters()) == before


@pytest.mark.parametrize("share", [-0.1, 1.5, 90])
def test_coverage_that_is_no_share_is_refused_before_anything_runs(share):
    with pytest.raises(ConfigError, match="min_coverage=.*at least 0 and at most 1"):
        tsq.quantize(nn.Sequential(nn.Linear(16, 16)), CONFIG, iter([]), min_coverage=share)
