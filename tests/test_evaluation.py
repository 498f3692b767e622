"""`perplexity` against a computation by hand in float64, and the meaning of windows."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tsq_layers.errors import ConfigError, LayerError
from tsq_layers.evaluation import perplexity

VOCABULARY = 61


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))


class Bigram(nn.Module):
    """Logits depend on the token before only; returned bare, not in an object."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class Fixed(nn.Module):
    """Returns whatever it was given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, ids: Tensor) -> object:
        return self.output


def by_hand(model: nn.Module, windows: list[Tensor]) -> float:
    """exp of the mean of −log softmax, token by token, in float64."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(window.unsqueeze(0)).logits[0].double()
        for position in range(1, len(window)):
            row = logits[position - 1]
            losses.append(
                math.log(sum(math.exp(value) for value in row.tolist()))
                - float(row[window[position]])
            )
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_perplexity_is_that_of_a_computation_by_hand(
    model: LlamaForCausalLM, tokens: Tensor, batch_size: int
) -> None:
    model = model.double().eval()
    expected = by_hand(model, [tokens[:16], tokens[16:32], tokens[32:48], tokens[48:]])
    # float32 logits: relative error of a loss about 1e-7 times the size of the logits, below 100
    assert perplexity(model, tokens, window=16, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-5
    )


def test_no_cache_is_made(model: LlamaForCausalLM, tokens: Tensor) -> None:
    caches = []
    handle = model.register_forward_hook(
        lambda _, args, output: caches.append(output.past_key_values)
    )
    perplexity(model, tokens, window=16)
    handle.remove()
    assert caches == [None] * 4
    assert model.config.use_cache


def test_perplexity_by_hand_differs_for_other_tokens(
    model: LlamaForCausalLM, tokens: Tensor
) -> None:
    model = model.double().eval()
    changed = tokens.clone()
    changed[20] = (changed[20] + 1) % VOCABULARY
    assert perplexity(model, tokens, window=16) != pytest.approx(
        by_hand(model, list(changed.split(16))), rel=1e-4
    )


def test_single_token_left_over_is_dropped(model: LlamaForCausalLM, tokens: Tensor) -> None:
    assert perplexity(model, tokens[:33], window=16) == perplexity(model, tokens[:32], window=16)


def test_shorter_last_window_counts_with_its_tokens(
    model: LlamaForCausalLM, tokens: Tensor
) -> None:
    both = math.log(perplexity(model, tokens[:22], window=16)) * (15 + 5)
    parts = (
        math.log(perplexity(model, tokens[:16], window=16)) * 15
        + math.log(perplexity(model, tokens[16:22], window=16)) * 5
    )
    assert both == pytest.approx(parts, rel=1e-6)


def test_window_larger_than_the_text_is_the_whole_text(
    model: LlamaForCausalLM, tokens: Tensor
) -> None:
    assert perplexity(model, tokens, window=1024) == perplexity(model, tokens, window=50)


def test_windows_do_not_see_one_another(tokens: Tensor) -> None:
    """For a bigram model only the pairs that straddle two windows are left out."""
    model = Bigram()
    pairs = [i for i in range(1, 48) if i % 16]
    losses = [
        float(nn.functional.cross_entropy(model.table.detach()[tokens[i - 1]], tokens[i]))
        for i in pairs
    ]
    assert perplexity(model, tokens[:48], window=16) == pytest.approx(
        math.exp(sum(losses) / len(losses)), rel=1e-6
    )


def test_two_dimensional_and_narrow_tokens_are_taken(
    model: LlamaForCausalLM, tokens: Tensor
) -> None:
    expected = perplexity(model, tokens, window=16)
    assert perplexity(model, tokens.unsqueeze(0), window=16) == expected
    assert perplexity(model, tokens.to(torch.int32), window=16) == expected


def test_slices_of_rows_give_the_same_loss(
    model: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity(model, tokens, window=16)
    module = importlib.import_module("tsq_layers.evaluation")
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 3 * VOCABULARY + 1)
    assert perplexity(model, tokens, window=16) == expected


def test_half_precision_logits_are_read_in_float32(tokens: Tensor) -> None:
    model = Bigram().to(torch.bfloat16)
    assert perplexity(model, tokens) == perplexity(model.float(), tokens)


def test_training_flag_of_every_module_is_restored(model: LlamaForCausalLM, tokens: Tensor) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    perplexity(model, tokens)
    assert [part.training for part in model.modules()] == before
    with pytest.raises(LayerError):
        perplexity(Fixed(None).train(), tokens)


def test_no_gradient_is_recorded(tokens: Tensor) -> None:
    seen = []

    class Spy(Bigram):
        def forward(self, ids: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled() or self.training)
            return super().forward(ids)

    perplexity(Spy(), tokens)
    assert seen == [False]


def test_progress_bar_is_shown_when_asked_for_only(
    tokens: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    perplexity(Bigram(), tokens)
    assert capsys.readouterr() == ("", "")
    perplexity(Bigram(), tokens, progress=True)
    assert "perplexity" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"^{count} tokens: perplexity needs at least 2"):
        perplexity(Bigram(), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(4), torch.zeros(4, dtype=torch.bool), [1, 2, 3]],
    ids=["float", "bool", "list"],
)
def test_tokens_of_another_type_are_refused(tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match="give an int64 tensor of token ids"):
        perplexity(Bigram(), tokens)


def test_tokens_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens have shape \(2, 4\); give \(T,\) or \(1, T\)"):
        perplexity(Bigram(), torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "value"), [("window", 1), ("window", 2.0), ("batch_size", 0), ("batch_size", True)]
)
def test_impossible_window_or_batch_is_refused(tokens: Tensor, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={value}: give an integer of at least"):
        perplexity(Bigram(), tokens, **{name: value})


def test_nan_is_named(tokens: Tensor) -> None:
    model = Bigram()
    model.table.data[int(tokens[20])] = math.nan
    with pytest.raises(LayerError, match="the loss is NaN in windows of 16 tokens after"):
        perplexity(model, tokens, window=16)


@pytest.mark.parametrize(
    "output",
    [None, torch.zeros(1, 3, 5), SimpleNamespace(logits=torch.zeros(50, 5))],
    ids=["none", "short", "flat"],
)
def test_model_without_logits_is_refused(tokens: Tensor, output: object) -> None:
    with pytest.raises(
        LayerError, match=r"perplexity needs logits of shape \(B, T, V\) with B, T = \(1, 50\)"
    ):
        perplexity(Fixed(output), tokens)


def test_overflowing_perplexity_is_infinite() -> None:
    model = Bigram()
    model.table.data = 1e6 * torch.eye(VOCABULARY)
    assert perplexity(model, torch.arange(20)) == math.inf
