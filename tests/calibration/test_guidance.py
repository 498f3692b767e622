"""Guidance: weights of tokens from gradients of the loss, and what they do to the statistics and to the layers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tsq_layers as tsq
from tsq_layers.calibration import guidance
from tsq_layers.calibration.guidance import (
    TokenWeights,
    Watched,
    groups_of,
    model_loss,
    token_weights,
)
from tsq_layers.errors import CalibrationError, FewTokensWarning, UnguidedLayerWarning
from tsq_layers.observer import HessianObserver

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{FewTokensWarning.__module__}.{FewTokensWarning.__name__}"
)
WIDTH, HIDDEN, CLASSES = 6, 8, 4


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
        .to(dtype)
        .eval()
    )


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, WIDTH, generator=generator, dtype=dtype) for _ in range(count)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) ** 3).logsumexp(-1).sum()


def found(model: nn.Module, groups: int = 2) -> TokenWeights:
    return token_weights(
        model, {"0": Watched(model[0], groups), "2": Watched(model[2], groups)}, batches(), loss
    )


def by_hand(model: nn.Module, layer: int, groups: int) -> list[Tensor]:
    """Mean squared gradient of each token and group, by differentiating the rest of the network as a function."""
    weights = []
    for batch in batches():
        z = model[: layer + 1](batch).detach().requires_grad_()
        value = (model[layer + 1 :](z) ** 3).logsumexp(-1).sum()
        (gradient,) = torch.autograd.grad(value, z)
        weights.append((gradient**2).reshape(10, groups, -1).mean(-1))
    return weights


def tempered(squares: list[Tensor]) -> list[Tensor]:
    """Over their mean, and drawn towards 1 until their variance is 1."""
    mean = torch.cat(squares).mean(0)
    variance = (torch.cat(squares) / mean).var(0, correction=0)
    return [1 + (part / mean - 1) * (1 / variance).sqrt().clamp(max=1) for part in squares]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_are_tempered_mean_squares_of_the_gradients_and_have_mean_one(
    layer: int, groups: int
) -> None:
    model = net()
    weights, expected = found(model, groups), tempered(by_hand(model, layer, groups))
    for batch, values in enumerate(expected):
        assert_close(weights.of(str(layer), batch, 0).double(), values, rtol=1e-5, atol=1e-6)
    everything = torch.cat([weights.of(str(layer), batch, 0) for batch in range(3)])
    assert_close(everything.mean(0), torch.ones(groups), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", [0.0, 1.0, 1e4])
def test_however_few_tokens_have_the_gradient_all_are_worth_half_their_number(tail: float) -> None:
    squares = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    squares[7] += tail
    squares[:, 2] = 0  # nothing depends on these channels
    parts = guidance._tempered({0: [squares[:100]], 5: [squares[100:]]})
    weights = torch.cat([*parts[0], *parts[5]])
    assert (weights.sum(0).square() / weights.square().sum(0) > 199.9).all()
    assert (weights >= 0).all()
    assert torch.equal(weights[:, 2], torch.ones(400))
    plain = squares[:, :2] / squares[:, :2].mean(0)
    if tail <= 1:
        assert_close(weights[:, :2], plain)  # light tails are left alone
    else:
        assert (weights[7, :2] < plain[7]).all()


def test_groups_are_contiguous_channels() -> None:
    model = net()
    permuted = by_hand(model, 0, 4)[0][:, [1, 0, 2, 3]]
    assert not torch.allclose(
        found(model, 4).of("0", 0, 0).double() * torch.cat(by_hand(model, 0, 4)).mean(0), permuted
    )


def test_the_model_is_as_it_was() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [
        True,
        False,
        True,
        True,
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks


def test_what_follows_a_layer_may_work_in_place() -> None:
    plain = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)).double()
    in_place = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    for batch in range(3):
        assert torch.equal(found(in_place).of("0", batch, 0), found(plain).of("0", batch, 0))


class Checkpointed(nn.Sequential):
    """A network whose hidden layer is run again in the backward pass."""

    def __init__(self, *layers: nn.Module, reentrant: bool, first: int = 1) -> None:
        super().__init__(*layers)
        self.reentrant, self.first = reentrant, first

    def forward(self, x: Tensor) -> Tensor:
        before, inside = list(self)[: self.first], list(self)[self.first : 3]
        for layer in before:
            x = layer(x)

        def run(y: Tensor) -> Tensor:
            for layer in inside:
                y = layer(y)
            return y

        return self[3](checkpoint(run, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("first", [0, 1])
def test_layers_that_run_again_in_the_backward_pass_are_seen_once(first: int) -> None:
    layers = [
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, HIDDEN),
        nn.Linear(HIDDEN, CLASSES),
    ]
    watched = {str(place): Watched(layers[place].double(), 2) for place in (0, 2, 3)}
    plain = token_weights(nn.Sequential(*layers), watched, batches(), loss)
    again = token_weights(
        Checkpointed(*layers, reentrant=False, first=first), watched, batches(), loss
    )
    for name in watched:
        assert len(again.calls[name][0]) == 1
        assert_close(again.of(name, 0, 0), plain.of(name, 0, 0))


def test_layers_without_a_gradient_are_named() -> None:
    layers = [
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, HIDDEN),
        nn.Linear(HIDDEN, CLASSES),
    ]
    watched = {str(place): Watched(layers[place].double(), 2) for place in (0, 2, 3)}
    with pytest.warns(
        UnguidedLayerWarning, match="no gradient at the output of 1 layers.*: 2; check"
    ):
        weights = token_weights(Checkpointed(*layers, reentrant=True), watched, batches(), loss)
    assert weights.of("2", 0, 0) is None
    assert weights.of("3", 0, 0) is not None


def test_a_call_of_few_tokens_can_be_guided_and_chosen_by() -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, CLASSES)
    )
    settings = tsq.QuantConfig(bits=3, group_size=4, damping="auto", guidance=2)
    data = [torch.randn(count, WIDTH) for count in (4, 1, 1, 4, 1) * 8]
    report = tsq.quantize(model, settings, data, loss=loss).tsq_report
    assert [entry.tokens for entry in report.layers] == [88, 88]


def test_layers_that_need_no_statistics_are_not_guided() -> None:
    settings = tsq.QuantConfig(bits=3, group_size=4, method="rtn", guidance=2)
    assert tsq.quantize(net(), settings).tsq_report.layers[0].status == "quantized"


def test_a_call_that_was_not_seen_has_no_weights() -> None:
    weights = found(net())
    assert weights.of("0", 0, 1) is None
    assert weights.of("0", 9, 0) is None
    assert weights.of("elsewhere", 0, 0) is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda model, batch: model(batch), "shape"),
        (lambda model, batch: model(batch).sum().detach(), "without gradient"),
        (lambda model, batch: 1.0, "a float"),
    ],
    ids=["no scalar", "detached", "no tensor"],
)
def test_a_loss_that_cannot_be_used_is_refused(bad: object, reason: str) -> None:
    model = net()
    with pytest.raises(CalibrationError, match=reason):
        token_weights(model, {"0": Watched(model[0], 2)}, batches(), bad)  # type: ignore[arg-type]


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match="has none; put labels into the batches, or give loss="
    ):
        model_loss(net(), batches()[0], lambda model, batch: model(batch))


def test_groups_divide_the_rows() -> None:
    assert [groups_of(rows, 4) for rows in (576, 192, 9, 7, 2)] == [4, 4, 3, 1, 2]


# ---- the sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "one pass"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_weighted_sums_equal_those_of_scaled_inputs(
    blocks: int, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsq_layers.observer._CHUNK_ELEMENTS", 50)
    generator = torch.Generator().manual_seed(2)
    x, reference, weights = (
        torch.randn(4, 10, n, generator=generator).double() for n in (WIDTH, WIDTH, blocks)
    )
    mask, weights = torch.rand(4, 10, generator=generator) > 0.3, weights.abs()
    observer = HessianObserver(WIDTH, blocks=blocks, dtype=torch.float64)
    observer.observe(x, reference if paired else None, mask, weights)
    statistics = observer.statistics()
    assert int(statistics.count) == int(mask.sum())
    for block in range(blocks):
        w, left = weights[..., block][mask], x[mask]
        expected = torch.einsum("t,ti,tj->ij", w, left, left)
        hessian, deviation = (
            None if sums is None else sums.view(blocks, WIDTH, WIDTH)[block]
            for sums in (statistics.hessian, statistics.deviation)
        )
        assert_close(hessian, expected)
        assert (deviation is None) != paired
        if deviation is not None:
            assert_close(deviation, torch.einsum("t,ti,tj->ij", w, left - reference[mask], left))


def test_weights_of_another_number_of_tokens_are_refused() -> None:
    with pytest.raises(CalibrationError, match="one for each token and block, 10×3"):
        HessianObserver(WIDTH, blocks=3).observe(torch.randn(10, WIDTH), weights=torch.ones(9, 3))


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "quantease", "cdquant", "lnq", "two-stage"])
def test_every_method_runs_guided(method: str) -> None:
    torch.manual_seed(0)
    given = [torch.randn(64, 32) @ torch.randn(32, 32) for _ in range(6)]
    start = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, CLASSES))
    results = []
    for groups in (0, 2):
        config = tsq.QuantConfig(bits=2, group_size=16, method=method, guidance=groups)
        results.append(tsq.quantize(copy.deepcopy(start), config, given, loss=loss)[0].weight)
    assert not torch.equal(*results)


def test_rows_are_solved_under_the_statistics_of_their_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole chain, against statistics made by hand; deviation off, so that both passes are not needed."""
    seen = {}
    from tsq_layers.calibration import solving

    original = solving.TwoStageGroupQuantizer

    def spy(weight: Tensor, statistics: object, config: object, *, name: str) -> object:
        seen[name] = statistics
        return original(weight, statistics, config, name=name)  # type: ignore[arg-type]

    monkeypatch.setattr(solving, "TwoStageGroupQuantizer", spy)
    model = net(torch.float32)
    expected = by_hand(net(), 0, 2)
    config = tsq.QuantConfig(bits=4, group_size=4, guidance=2, deviation="none")
    tsq.quantize(model, config, [batch.float() for batch in batches()], loss=loss)
    weights = torch.cat(tempered(expected))
    x = torch.cat(batches()).reshape(-1, WIDTH)
    for group in range(2):
        hessian = torch.einsum("t,ti,tj->ij", weights[:, group], x, x)
        assert_close(seen["0"].hessian[group].double(), hessian, rtol=1e-4, atol=1e-4)
    assert int(seen["0"].count) == len(x)


def test_guidance_without_a_calibration_is_refused() -> None:
    model = tsq.prepare(net(torch.float32), tsq.QuantConfig(guidance=2, group_size=4))
    model(batches(1, torch.float32)[0])
    with pytest.raises(tsq.errors.StateError, match="guidance needs calibrate"):
        tsq.convert(model)


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) ** 3).logsumexp(-1).mean()


@pytest.mark.parametrize("sizes", [[12, 228], [120, 120], [1, 1, 238]], ids=str)
def test_a_token_weighs_alike_in_long_and_short_batches(sizes: list[int]) -> None:
    model = net()
    tokens = torch.randn(
        240, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    layers = {"0": Watched(model[0], 2)}
    whole = token_weights(model, layers, [tokens], mean_loss).of("0", 0, 0)
    found = token_weights(model, layers, tokens.split(sizes), mean_loss)
    parts = torch.cat([found.of("0", batch, 0) for batch in range(len(sizes))])
    assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_the_weights_of_the_other_tokens() -> None:
    model = net()
    tokens = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    padded = torch.cat([tokens, torch.zeros(180, WIDTH, dtype=torch.float64)])

    def loss_of_first(model: nn.Module, batch: Tensor) -> Tensor:
        return mean_loss(model, batch[:60]) + 0 * model(batch).sum()

    layers = {"0": Watched(model[0], 2), "2": Watched(model[2], 2)}
    plain, other = (
        token_weights(model, layers, [batch], loss_of_first) for batch in (tokens, padded)
    )
    for name in layers:
        assert_close(other.of(name, 0, 1)[:60], plain.of(name, 0, 1)[:60], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_with_its_batch(value: float) -> None:
    model = net()

    def wrong(model: nn.Module, batch: Tensor) -> Tensor:
        return loss(model, batch) * (value if batch.mean() == batches()[1].mean() else 1)

    with pytest.raises(
        CalibrationError, match=f"the loss of batch 1 is {value}; leave that batch out"
    ):
        token_weights(model, {"0": Watched(model[0], 2)}, batches(), wrong)


def test_an_experts_tokens_weigh_alike_however_many_of_a_batch_go_to_it() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.expert = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, batch: tuple[Tensor, int]) -> Tensor:
            x, routed = batch
            h = self.first(x)
            return torch.cat([self.expert(h[:routed]), h[routed:]])

    def mean(model: nn.Module, batch: tuple[Tensor, int]) -> Tensor:
        return model(batch).square().mean()

    tokens = torch.ones(100, WIDTH)
    model = Routed()
    found = token_weights(
        model,
        {"first": Watched(model.first, 1), "expert": Watched(model.expert, 1)},
        [(tokens, 4), (tokens, 40)],
        mean,
    )
    few, many = (found.of("expert", batch, 0) for batch in (0, 1))
    assert_close(few.mean(), many.mean(), rtol=1e-3, atol=0)
