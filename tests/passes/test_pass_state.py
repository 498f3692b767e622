"""What a forward changes beside its own variables, while several passes are under way: every model
is solved as if they came one by one.
"""

import copy
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tsq_layers as tsq
from tsq_layers.passes.pass_state import PassState

CONFIG = tsq.QuantConfig(bits=3, group_size=8)
pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")


class Net(nn.Module):
    """Two layers, and what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.kept: dict[str, Tensor] = {}
        self.register_buffer("memory", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) - x)


class OnSelf(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.skip = x
        h = torch.relu(self.a(x))
        return self.b(h - self.skip)


class InDictionary(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.kept["skip"] = x
        h = torch.relu(self.a(x))
        return self.b(h - self.kept.pop("skip"))


class Rebound(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(x)
        h = torch.relu(self.a(x))
        self.features.append(h)
        y = self.b(self.features[1] - self.features[0])
        assert len(self.features) == 2
        self.features = []
        return y


class InBuffer(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.memory.copy_(x.mean(0))
        h = torch.relu(self.a(x))
        return self.b(h - x + self.memory - x.mean(0))


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(5).div_(10)
        return super().forward(x)


def made(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind().eval()


def batches(scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        scale * torch.randn(rows, 16, generator=generator) + shift for rows in (64, 32, 128, 32)
    ]


def weights(model: nn.Module, data: list[Tensor], **options: object) -> list[Tensor]:
    tsq.quantize(model, CONFIG, data, **options)
    return [model.a.dequantize(torch.float32), model.b.dequantize(torch.float32)]


@pytest.mark.parametrize("kind", [OnSelf, InDictionary, Rebound, InBuffer])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_attributes_are_those_of_the_pass(kind: type[Net], offload: str | None) -> None:
    model = made(kind)
    expected = weights(made(Net), batches())
    found = weights(model, batches(), offload=offload)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not hasattr(model, "skip")
    assert model.kept == {}


def test_inputs_that_are_changed_in_place_are_given_unchanged_to_every_pass() -> None:
    given = batches(10.0, 5.0)
    before = copy.deepcopy(given)
    scaled = [(x - 5) / 10 for x in given]
    expected = weights(made(Net), scaled)
    found = weights(made(InPlace), given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


def test_both_streams_draw_the_same_random_numbers() -> None:
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.b(F.dropout(h, 0.5, training=True) + 0.1 * random.random())

    torch.manual_seed(7)
    state, of_python = torch.get_rng_state(), random.getstate()
    found = [weights(made(Random), batches(), paired=paired)[1] for paired in (True, False)]
    model = made(Random)
    errors = [float((weight - model.b.weight).detach().norm()) for weight in found]
    assert errors[0] < 1.5 * errors[1]  # 3 to 5 times as large if the deviation had the noise in it
    assert torch.equal(*(weights(made(Random), batches())[1] for _ in range(2)))
    torch.set_rng_state(state)
    made(Random)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    weights(made(Random), batches())
    assert torch.equal(torch.get_rng_state(), expected)
    assert random.getstate() == of_python


def test_settings_of_torch_are_as_before() -> None:
    class Careful(Net):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                assert not torch.backends.cuda.flash_sdp_enabled()
                h = torch.relu(self.a(x))
                assert not torch.backends.cuda.flash_sdp_enabled()
                return self.b(h)

    seen = []

    def mask(_batch: object, _name: str, x: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return torch.ones(x.shape[:-1])

    weights(made(Careful), batches(), padding_mask=mask)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert all(seen)


def test_a_pass_that_raises_leaves_nothing() -> None:
    class Failing(OnSelf):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                self.skip = self.a(x)
                if len(x) == 128:
                    raise RuntimeError("too long")
                return self.b(self.skip)

    model = made(Failing)
    with pytest.raises(RuntimeError, match="too long"):
        weights(model, batches())
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not hasattr(model, "skip")


def test_what_no_pass_changes_costs_nothing() -> None:
    model = made(Net)
    state = PassState(model)
    with state.first():
        model(batches()[0])
    assert (state._attributes, state._containers, state._tensors, state._uses_random) == (
        [],
        [],
        [],
        False,
    )


def test_what_draws_the_batches_goes_on_with_its_random_numbers() -> None:
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0 * torch.rand_like(x))

    def drawn(given: list[Tensor]) -> Iterator[Tensor]:
        for _ in range(4):
            given.append(torch.randn(64, 16))
            yield given[-1]

    torch.manual_seed(5)
    plain: list[Tensor] = []
    for _ in drawn(plain):
        pass
    following = torch.rand(3)
    model, given = made(Random), []
    torch.manual_seed(5)
    tsq.quantize(model, CONFIG, drawn(given))
    assert all(torch.equal(one, other) for one, other in zip(given, plain, strict=True))
    assert torch.equal(torch.rand(3), following)


def test_a_parameter_that_is_made_in_the_first_pass_is_made_once() -> None:
    class Built(Net):
        built = 0

        def forward(self, x: Tensor) -> Tensor:
            if not self.built:
                self.scale = nn.Parameter(torch.rand(16))
                self.built += 1
            return super().forward(x * self.scale)

    model = made(Built)
    tsq.prepare(model, CONFIG)
    tsq.calibrate(model, batches())
    scale = model.scale
    model(batches()[0])
    assert model.scale is scale
    assert model.built == 1


def test_precision_may_be_set_for_each_backend() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        weights(made(Net), batches())
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_the_first_pass_looks_at_few_modules() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(50)))
    state, looked = PassState(model), []
    note = state._note
    state._note = lambda before: (looked.append(before), note(before))  # type: ignore[method-assign]
    with state.first():
        for block in range(50):
            state.note_changes(f"{block}.0")
    assert len(looked) == 50 * 2 + len(list(model.modules()))
