"""What is chosen on held-out tokens: deviation strength and damping."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tsq_layers as tsq
from tsq_layers.config import QuantConfig
from tsq_layers.errors import ConfigError, FewTokensWarning
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.observer import Call, HessianObserver
from tsq_layers.solver import problem as objective
from tsq_layers.solver import selection

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{FewTokensWarning.__module__}.{FewTokensWarning.__name__}"
)
K, N = 12, 10


def tokens(count: int, seed: int, shift: float) -> tuple[Tensor, Tensor]:
    """Inputs of the two streams: the quantised one is off by a part that x̃ predicts, and noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=torch.Generator().manual_seed(99))
    reference = torch.randn(count, K, generator=generator) @ mixing
    return reference * (1 - shift) + 0.1 * torch.randn(count, K, generator=generator), reference


def statistics(x: Tensor, reference: Tensor) -> LayerStatistics:
    observer = HessianObserver(K)
    observer.observe(x, reference)
    return observer.statistics()


def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("fitted_tokens", [14, 40, 400])
def test_strength_is_the_best_of_the_list_by_brute_force(fitted_tokens: int) -> None:
    fitted, (x, reference) = statistics(*tokens(fitted_tokens, 1, 0.2)), tokens(100, 2, 0.2)
    config = QuantConfig(bits=3, group_size=4, deviation_strength="auto")
    chosen = selection.settle(config, weight(), fitted, statistics(x, reference))
    errors = {}
    for strength in selection.STRENGTHS:
        problem = objective.build(weight(), fitted, config.changed(deviation_strength=strength))
        errors[strength] = (
            (x @ problem.refine_target.T - reference @ weight().T).square().mean().item()
        )
    assert chosen.options.deviation_strength == min(errors, key=errors.__getitem__)


def test_damping_of_the_deviation_is_the_best_of_the_list_by_brute_force() -> None:
    fitted, (x, reference) = statistics(*tokens(16, 1, 0.2)), tokens(100, 2, 0.2)
    config = QuantConfig(bits=3, group_size=4, deviation_strength=1.0, deviation_damping="auto")
    chosen = selection.settle(config, weight(), fitted, statistics(x, reference))
    errors = {}
    for damping in selection.DEVIATION_DAMPINGS:
        problem = objective.build(weight(), fitted, config.changed(deviation_damping=damping))
        errors[damping] = (
            (x @ problem.refine_target.T - reference @ weight().T).square().mean().item()
        )
    assert chosen.options.deviation_damping == min(errors, key=errors.__getitem__)
    assert chosen.options.deviation_strength == 1.0


def test_damping_of_the_deviation_regresses_the_wanted_outputs_by_hand() -> None:
    x, reference = (values.double() for values in tokens(40, 1, 0.2))
    given = statistics(x.float(), reference.float())
    config = QuantConfig(bits=3, group_size=4, deviation_strength=1.0, deviation_damping=0.3)
    w, ridge = weight().double(), 0.3 * (x**2).mean()
    grams = x.T @ x / len(x) + ridge * torch.eye(K)
    expected = torch.linalg.solve(grams, (x.T @ (reference @ w.T) / len(x) + ridge * w.T)).T
    assert_close(
        objective.build(weight(), given, config).refine_target.double(),
        expected,
        rtol=1e-3,
        atol=1e-3,
    )


def test_error_is_the_output_error_but_for_a_constant() -> None:
    x, reference = tokens(50, 3, 0.1)
    differences = [
        torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    ]
    found = [
        selection.error(difference, weight(), statistics(x, reference))
        for difference in differences
    ]
    exact = [
        (x @ (weight() + difference).T - reference @ weight().T).square().sum(1).mean()
        for difference in differences
    ]
    assert_close(found[0] - found[1], exact[0] - exact[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_damping_is_the_best_of_the_list_by_brute_force(seed: int) -> None:
    config = QuantConfig(bits=3, group_size=4, damping="auto", deviation="none")
    fitted, (x, reference) = statistics(*tokens(30, seed, 0)), tokens(500, 100 + seed, 0)
    chosen = selection.settle(config, weight(), fitted, statistics(x, reference))
    errors = {}
    for damping in selection.DAMPINGS:
        plain = config.changed(damping=damping, refine="none", scale_dtype="float32")
        found = (
            tsq.TwoStageGroupQuantizer(weight(), fitted, plain)
            .run()
            .weight.dequantize(torch.float32)
        )
        errors[damping] = (x @ found.T - reference @ weight().T).square().mean().item()
    assert errors[chosen.options.damping] <= min(errors.values()) * (1 + 1e-4)  # type: ignore[index]


@pytest.mark.parametrize(
    "other", [None, LayerStatistics(torch.zeros(K, K), torch.zeros(()))], ids=["none", "empty"]
)
def test_without_other_tokens_the_defaults_are_taken(other: LayerStatistics | None) -> None:
    config = QuantConfig(damping="auto", deviation_strength="auto", group_size=4)
    settled = selection.settle(config, weight(), statistics(*tokens(50, 1, 0)), other)
    assert settled == QuantConfig(group_size=4)


def test_a_settled_configuration_is_returned_as_it_is() -> None:
    config = QuantConfig(group_size=4)
    assert selection.settle(config, weight(), statistics(*tokens(50, 1, 0)), None) is config


def test_the_quantizer_alone_cannot_choose() -> None:
    with pytest.raises(ConfigError, match=r"calibrate\(\) chooses what is 'auto'"):
        tsq.TwoStageGroupQuantizer(
            weight(), statistics(*tokens(50, 1, 0)), QuantConfig(damping="auto", group_size=4)
        )


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("parts", list(itertools.product((True, False), repeat=3)), ids=str)
def test_the_parts_of_a_call_add_up_to_it(blocks: int, parts: tuple[bool, ...]) -> None:
    paired, masked, weighted = parts
    shape = (3, 7, K) if blocks == 1 or weighted else (3, 7, blocks, K)
    x = torch.randn(shape, dtype=torch.float64)
    call = Call(
        x,
        torch.randn_like(x) if paired else None,
        torch.rand(3, 7) > 0.4 if masked else None,
        torch.rand(3, 7, blocks) if weighted else None,
    )
    observers = [HessianObserver(K, blocks=blocks, dtype=torch.float64) for _ in range(3)]
    first, last = call.split(4, dims=x.dim() - 2)
    assert (first.x.shape[0], last.x.shape[0]) == (17, 4)
    for part, observer in zip((call, first, last), observers, strict=True):
        part.add_to(observer)
    whole, most, rest = (observer.statistics() for observer in observers)
    both = most + rest
    assert int(both.count) == int(whole.count)
    assert_close(both.hessian, whole.hessian)
    if paired:
        assert_close(both.deviation, whole.deviation)


def test_calibration_chooses_for_each_layer_and_reports_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 24), nn.ReLU(), nn.Linear(24, K), nn.Tanh(), nn.Linear(K, 4))
    data = [torch.randn(64, K) for _ in range(5)]
    config = QuantConfig(bits=2, group_size=4, deviation_strength="auto", damping="auto")
    report = tsq.quantize(model, config, data).tsq_report
    assert [layer.tokens for layer in report.layers] == [
        320
    ] * 3  # those that were held out are fitted in the end
    assert all(layer.deviation_strength in selection.STRENGTHS for layer in report.layers)
    assert all(layer.damping in selection.DAMPINGS for layer in report.layers)
    assert report.layers[0].deviation_strength == 0.0  # nothing before it: no deviation


def test_small_calls_have_their_part_in_what_is_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = QuantConfig(bits=3, group_size=4, method="gptq", damping="auto")
    chosen_by: list[int] = []

    def settle(
        config: QuantConfig,
        weight: Tensor,
        fitted: LayerStatistics,
        other: LayerStatistics,
        name: str,
    ) -> Any:
        chosen_by.extend((int(fitted.count), int(other.count)))
        return original(config, weight, fitted, other, name)

    original = selection.settle
    monkeypatch.setattr(selection, "settle", settle)
    tsq.quantize(nn.Sequential(nn.Linear(K, N)), settings, list(torch.randn(300, K).split(3)))
    assert chosen_by == [240, 60]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("last", [0, 1, 4])
def test_the_last_tokens_are_those_that_are_not_padding(blocks: int, last: int) -> None:
    x = torch.randn(3, 7, *([blocks, K] if blocks > 1 else [K]), dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 3, 2]).unsqueeze(1)
    most, rest = Call(x, 2 * x, mask).split_masked(torch.tensor(last), most=5, dims=x.dim() - 2)
    plain = Call(x[mask], 2 * x[mask]).split(last, dims=x.dim() - 2)
    for padded, expected in zip((most, rest), plain, strict=True):
        observers = [HessianObserver(K, blocks=blocks, dtype=torch.float64) for _ in range(2)]
        for observer, call in zip(observers, (padded, expected), strict=True):
            call.add_to(observer)
        one, other = (observer.statistics() for observer in observers)
        assert int(one.count) == int(other.count)
        assert_close(one.hessian, other.hessian)
        assert_close(one.deviation, other.deviation)


def test_padding_does_not_change_what_is_chosen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(K, 24), nn.ReLU(), nn.Linear(24, K))

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(1)
    sequences = [torch.randn(1, 200, K) @ torch.randn(K, K) for _ in range(6)]
    padded = [torch.cat([x, torch.full((1, 60, K), 100.0)], dim=1) for x in sequences]
    ones = torch.ones(1, 200, dtype=torch.long)
    calls = [
        [{"x": x, "attention_mask": mask} for x in given]
        for given, mask in (
            (sequences, ones),
            (padded, torch.cat([ones, torch.zeros(1, 60, dtype=torch.long)], dim=1)),
        )
    ]
    config = QuantConfig(
        bits=2, group_size=4, damping="auto", deviation_strength="auto", deviation_damping="auto"
    )
    plain, other = (tsq.quantize(Net(), config, batches).tsq_report.layers for batches in calls)
    for one, two in zip(plain, other, strict=True):
        assert one.tokens == two.tokens == 1200
        assert (one.damping, one.deviation_strength) == (two.damping, two.deviation_strength)
        assert one.deviation_damping == two.deviation_damping
        assert_close(
            torch.tensor(one.losses["refine"]),
            torch.tensor(two.losses["refine"]),
            rtol=1e-2,
            atol=0,
        )
