"""Passes of torch.ao before and after ours, each on a real forward."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier

import tsq_layers as tsq
from tsq_layers.calibration import preparation
from tsq_layers.errors import LostZerosWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.ao import quantization as ao

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:.*reduce_range",
    "ignore:torch.quantize_per_tensor",
)

CONFIG = tsq.QuantConfig(bits=4, group_size=32)


class Tagger(nn.Module):
    """Recurrent and linear parts."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(64, 64, batch_first=True)
        self.hidden = nn.Linear(64, 128)
        self.head = nn.Linear(128, 8)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.recurrent(x)[0])))


def tagger():
    torch.manual_seed(0)
    return Tagger().eval(), [torch.randn(32, 65, 64) for _ in range(2)]


def relative(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@torch.no_grad()
def test_recurrent_parts_go_to_8_bits_by_quantize_dynamic(order):
    model, batches = tagger()
    wanted = model(batches[0])
    if order == "ours first":
        model = ao.quantize_dynamic(
            tsq.quantize(model, CONFIG, batches), {nn.LSTM}, dtype=torch.qint8
        )
    else:
        model = tsq.quantize(
            ao.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8), CONFIG, batches
        )
    assert type(model.recurrent).__module__.startswith("torch.ao.nn.quantized.dynamic")
    assert isinstance(model.hidden, tsq.QuantLinear)
    assert isinstance(model.head, tsq.QuantLinear)
    assert relative(model(batches[0]), wanted) < 0.1


def test_fake_quantisation_after_ours_trains_what_we_skip():
    model, batches = tagger()
    config = tsq.QuantConfig(bits=4, group_size=32, skip=("head",))
    model = tsq.quantize(model, config, batches).train()
    words = model.hidden.words.clone()
    model.head.qconfig = ao.get_default_qat_qconfig("fbgemm")
    ao.prepare_qat(model, inplace=True)
    assert "qat" in type(model.head).__module__
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(batches[0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert torch.equal(model.hidden.words, words)


def pruned():
    """Three layers, two of which have every other block of four weights masked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    sparsifier = WeightNormSparsifier(
        sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=4
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    mixed = torch.randn(64, 64)  # otherwise there is no error to carry from one column to others
    return model, sparsifier, [torch.randn(1024, 64) @ mixed for _ in range(2)]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 4},
        {"bits": 4, "symmetric": True},
        {"bits": 2},
        {"bits": 8, "method": "gptq"},
        {"bits": 4, "method": "quantease"},
        {"bits": 4, "method": "cdquant"},
        {"bits": 3, "joint_rounds": 2},
        {"bits": 4, "channel_scaling": True},
        {"bits": 4, "method": "rtn"},
    ],
    ids=str,
)
def test_weights_that_a_sparsifier_has_masked_stay_exactly_zero(changes):
    model, sparsifier, batches = pruned()
    sparsifier.squash_mask()
    masked = {name: model.get_submodule(name).weight == 0 for name in ("0", "2")}
    wanted = model(batches[0])
    found = tsq.quantize(copy.deepcopy(model), tsq.QuantConfig(group_size=32, **changes), batches)
    for name, mask in masked.items():
        assert 0.4 < mask.float().mean() < 0.6
        assert not found.get_submodule(name).weight[mask].any()
    assert relative(found(batches[0]), wanted) < 0.6


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_points": "float"},
        {"method": "lnq"},
        {"rotation": 32},
        {"method": "quantease", "outliers": 0.02},
    ],
    ids=str,
)
def test_zeros_that_cannot_be_kept_are_told(changes):
    model, sparsifier, _ = pruned()
    sparsifier.squash_mask()
    with pytest.warns(
        LostZerosWarning,
        match="2 layers look pruned, 0 first.*leave these out, or set keep_zeros=False",
    ):
        tsq.prepare(model, tsq.QuantConfig(group_size=32, bits=3, **changes))
    tsq.unprepare(model)
    tsq.prepare(model, tsq.QuantConfig(group_size=32, bits=3, keep_zeros=False, **changes))


def test_zeros_are_filled_where_that_is_asked_for():
    model, sparsifier, batches = pruned()
    sparsifier.squash_mask()
    mask = model[0].weight == 0
    filled = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=32, keep_zeros=False), batches)
    assert filled[0].weight[mask].any()


def test_a_few_zeros_make_no_pruned_layer():
    model, sparsifier, _ = pruned()
    sparsifier.squash_mask()
    with torch.no_grad():
        model[4].weight[0, :3] = 0
    targets = preparation.inspect(model, CONFIG).targets
    assert {name: target.config.keep_zeros for name, target in targets.items()} == {
        "0": True,
        "2": True,
        "4": False,
    }


def test_kept_zeros_cost_less_than_zeros_written_over_the_codes():
    model, sparsifier, batches = pruned()
    sparsifier.squash_mask()
    x = torch.cat(batches)
    kept, filled = (
        tsq.quantize(
            copy.deepcopy(model[0]),
            tsq.QuantConfig(bits=3, group_size=32, keep_zeros=keep),
            batches,
        ).weight
        for keep in (True, False)
    )
    weight = model[0].weight
    errors = [
        float((x @ (found - weight).T).detach().norm()) for found in (kept, filled * (weight != 0))
    ]
    assert errors[0] < errors[1]


def test_layers_with_the_mask_still_on_are_left_alone_and_the_report_says_what_to_do():
    model, _, batches = pruned()
    model = tsq.quantize(model, CONFIG, batches)
    reports = {layer.name: layer for layer in model.tsq_report.layers}
    assert reports["4"].status == "quantized"
    assert "parametrization" in reports["0.parametrizations.weight.original"].reason
