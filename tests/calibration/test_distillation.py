"""Model-wise refinement: the distance falls, codes stay, and nothing else changes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tsq_layers as tsq
from tsq_layers.calibration.distillation import Student, distil, output_distance
from tsq_layers.errors import (
    CalibrationError,
    ConfigError,
    CoverageError,
    FewTokensWarning,
    StateError,
)

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{FewTokensWarning.__module__}.{FewTokensWarning.__name__}"
)
KINDS = {
    "integer zero points": {},
    "symmetric": {"symmetric": True},
    "float zero points": {"zero_points": "float"},
    "tables": {"method": "lnq"},
    "tables for groups": {"method": "lnq", "codebook": "group"},
    "rotated": {"rotation": 8},
    "scaled columns": {"channel_scaling": True},
    "outliers": {"method": "quantease", "outliers": 0.02},
    "8-bit inputs": {"activation_bits": 8},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 6)
    )


def batches(count: int = 6, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(99)) / 4
    return [torch.randn(64, 24, generator=generator) @ mixing for _ in range(count)]


def config(**changes: object) -> tsq.QuantConfig:
    return tsq.QuantConfig(bits=2, group_size=8, **changes)  # type: ignore[arg-type]


def error(model: nn.Module, data: list[Tensor]) -> float:
    wanted = net()
    with torch.no_grad():
        return sum(float(output_distance(model(x), wanted(x), x)) for x in data) / len(data)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_falls_on_tokens_that_were_not_seen_and_codes_stay(kind: str) -> None:
    before = tsq.quantize(net(), config(**KINDS[kind]), batches())
    after = tsq.quantize(
        net(), config(**KINDS[kind], distill_epochs=6, distill_rate=0.01), batches()
    )
    assert error(after, batches(seed=2)) < error(before, batches(seed=2))
    for layer, trained in zip(before, after, strict=True):
        if isinstance(layer, tsq.QuantLinear):
            assert torch.equal(layer.words, trained.words)
            assert not torch.equal(layer.weight, trained.weight)
            if "offsets" not in kind and layer.zero_words is not None:
                assert torch.equal(layer.zero_words, trained.zero_words)


def test_the_report_has_the_distance_of_every_epoch() -> None:
    report = tsq.quantize(net(), config(distill_epochs=4, distill_rate=0.01), batches()).tsq_report
    assert len(report.distances) == 4
    assert report.distances[-1] < report.distances[0]
    assert tsq.Report.from_json(report.to_json()) == report
    assert tsq.quantize(net(), config(), batches()).tsq_report.distances == ()


def test_gradients_are_those_of_the_dequantised_weight() -> None:
    """One step of gradient descent in place of Adam's, by hand."""
    model, data = net(), batches(1)
    packed = tsq.quantize(net(), config(scale_dtype="float32"), data)[0]
    start = packed.quantized_weight()
    delta = torch.zeros_like(start.scales, requires_grad=True)
    steps = start.codes.float() - start.zeros.float().repeat_interleave(8, 1)
    weight = (steps.view(32, 3, 8) * (start.scales * (1 + delta)).unsqueeze(-1)).flatten(1)
    wanted = model(data[0]).detach()
    value = output_distance(model[1:](F.linear(data[0], weight, model[0].bias)), wanted, data[0])
    (gradient,) = torch.autograd.grad(value, delta)
    matrix = copy.deepcopy(packed)
    student = Student(model[0], matrix, lambda module, w: w)
    (found,) = distil(
        model, [student], data, lambda m, x: m(x), epochs=1, rate=1e-3, progress=False
    )
    assert found == pytest.approx(value.item(), rel=1e-5)
    moved = matrix.scales / packed.scales - 1
    big = gradient.abs() > gradient.abs().max() * 1e-4
    assert_close(
        moved[big], (-1e-3 * gradient.sign())[big], rtol=1e-2, atol=1e-6
    )  # Adam's first step
    assert torch.equal(matrix.bias, packed.bias)


def test_the_model_is_as_it_was_before_and_after_an_error() -> None:
    model = net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    keys = [set(vars(module)) for module in model.modules()]

    def broken(found: object, wanted: object, batch: Tensor) -> Tensor:
        raise RuntimeError("mine")

    tsq.prepare(model, config(distill_epochs=1))
    with pytest.raises(RuntimeError, match="mine"):
        tsq.calibrate(model, batches(), distance=broken)
    tsq.unprepare(model)
    assert [set(vars(module)) for module in model.modules()] == keys
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_parameters_that_are_not_trained_have_no_gradient_and_the_order_that_they_had() -> None:
    model = nn.Sequential(
        nn.LayerNorm(24), nn.Linear(24, 24), nn.ReLU(inplace=True), nn.Linear(24, 6)
    )
    order = [name for name, _ in model.named_parameters()]
    model[0].weight.grad = torch.ones(24)
    settings = config(distill_epochs=1, skip=("3",))
    with pytest.raises(CoverageError):
        tsq.quantize(model, settings, batches(), min_coverage=1.0)
    assert [name for name, _ in model.named_parameters()] == order
    model = tsq.quantize(model, settings, batches())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert torch.equal(gradients.pop("0.weight"), torch.ones(24))
    assert set(gradients.values()) == {None}


class Checkpointed(nn.Sequential):
    """A network that keeps no activations, in the old way of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return self[3](checkpoint(lambda y: self[2](self[1](y)), self[0](x), use_reentrant=True))


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch, in passes without gradients
def test_grids_inside_a_reentrant_checkpoint_are_trained() -> None:
    layers = [nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)]
    settings = config(distill_epochs=2, skip=("3",))
    plain, again = (
        tsq.quantize(kind(*copy.deepcopy(layers)), settings, batches())
        for kind in (nn.Sequential, Checkpointed)
    )
    assert again.tsq_report.distances == pytest.approx(plain.tsq_report.distances, rel=1e-4)
    assert_close(again[1].scales, plain[1].scales)


def test_epochs_without_a_calibration_are_refused() -> None:
    model = tsq.prepare(net(), config(distill_epochs=2))
    model(batches()[0])
    with pytest.raises(StateError, match=r"distill_epochs=2 needs calibrate\(model, batches\)"):
        tsq.convert(model)
    with pytest.raises(StateError, match="distill_epochs=2"):
        tsq.quantize(net(), config(distill_epochs=2, method="rtn"))


def test_a_table_alone_has_nothing_to_be_trained() -> None:
    ids = [torch.randint(20, (4, 8))]
    settings = config(method="rtn", embeddings=True, distill_epochs=1)
    assert (
        tsq.quantize(
            nn.Sequential(nn.Embedding(20, 8), nn.ReLU()), settings, ids
        ).tsq_report.distances
        == ()
    )


def test_a_distance_of_ones_own_is_lowered() -> None:
    def last_output(found: Tensor, wanted: Tensor, batch: Tensor) -> Tensor:
        return (found - wanted)[:, -1].square().mean()

    settings = config(distill_epochs=6, distill_rate=0.02)
    own = tsq.quantize(net(), settings, batches(), distance=last_output)
    others = tsq.quantize(net(), settings, batches())

    def measured(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(last_output(model(x), net()(x), x)) for x in batches(seed=2))

    assert measured(own) < measured(others)


def test_a_distance_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match="lower distill_rate"):
        tsq.quantize(
            net(),
            config(distill_epochs=1),
            batches(),
            distance=lambda found, wanted, batch: found.sum() / 0.0,
        )


def test_one_layer_cannot_have_epochs_of_its_own() -> None:
    with pytest.raises(ConfigError, match="unknown field 'distill_epochs'"):
        config(overrides={"0": {"distill_epochs": 1}})


# ---- the distance of two outputs ------------------------------------------------------------------------------------


def test_logits_are_compared_by_divergence_over_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(3)
    found, wanted = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    p, q = wanted.softmax(-1), found.softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1)[mask.bool()].mean()
    outputs = [SimpleNamespace(logits=value) for value in (found, wanted)]
    assert_close(output_distance(*outputs, {"attention_mask": mask}), by_hand)
    assert not torch.isclose(output_distance(*outputs, {}), by_hand)


@pytest.mark.parametrize(
    "pack", [lambda x: x, lambda x: (x, 1), lambda x: {"a": x}], ids=["tensor", "tuple", "dict"]
)
def test_other_outputs_are_compared_by_relative_squares(pack: object) -> None:
    found, wanted = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])
    assert float(output_distance(pack(found), pack(wanted), None)) == pytest.approx(10 / 25)  # type: ignore[operator]


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(CalibrationError, match="give distance="):
        output_distance(None, None, None)


def test_a_distance_without_a_gradient_is_refused():
    model = nn.Sequential(nn.Linear(16, 8))
    config = tsq.QuantConfig(bits=3, group_size=8, distill_epochs=1)
    with pytest.raises(CalibrationError, match="the distance is no scalar tensor with a gradient"):
        tsq.quantize(model, config, [torch.randn(256, 16)], distance=lambda *_: torch.zeros(()))
