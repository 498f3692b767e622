"""Embeddings: looked-up rows are those of the dequantised table, and only these are dequantised."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsq_layers.config import QuantConfig
from tsq_layers.errors import LayerError
from tsq_layers.layers.embedding import EMBEDDING, QuantEmbedding
from tsq_layers.numerics import grid
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.runtime import kernels
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.parts import Parts
from tsq_layers.solver import TwoStageGroupQuantizer

ROWS, COLUMNS = 20, 40

ids_shapes = pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)


class Scaled(nn.Embedding):
    def __init__(self, rows: int, columns: int, scale: float = 3.0) -> None:
        super().__init__(rows, columns, padding_idx=0)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Positional(nn.Embedding):
    def __init__(self, rows: int, columns: int) -> None:
        self.offset = 2
        super().__init__(rows, columns)

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        positions = torch.arange(past, past + ids.shape[-1], device=self.weight.device)
        return super().forward(positions + self.offset)


class Sliced(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[3 : 3 + ids.shape[-1]]


class Functional(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).flip(-1)


class AlsoOutput(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(super().forward(ids))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


CLASSES = (nn.Embedding, Scaled, Positional, Sliced, Functional, AlsoOutput)
classes = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def rounded(
    values: Tensor, bits: int = 4, group_size: int = 16, *, symmetric: bool = False
) -> QuantizedWeight:
    scales, zeros = grid.minmax(values, bits, group_size, symmetric)
    scales = grid.storable(scales, torch.float16)
    codes = grid.quantize(values, scales, zeros, bits, group_size)
    return QuantizedWeight(codes, scales.half(), zeros.to(torch.uint8), bits, group_size, symmetric)


def pair(kind: Any = nn.Embedding, **grids: Any) -> tuple[Any, Any]:
    """The replacement, and the float layer with the same values in its table."""
    torch.manual_seed(0)
    module = kind(ROWS, COLUMNS)
    weight = rounded(EMBEDDING.weight(module), **grids)
    replacement = EMBEDDING.replacement(module, QuantLinear.from_quantized(weight))
    with torch.no_grad():
        module.weight.copy_(weight.dequantize())
    return replacement, module


def ids_of(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each dequantisation."""
    counts: list[int] = []
    original = kernels.dequantize

    def count(parts: Parts, *args: Any) -> Tensor:
        counts.append(parts.words.shape[0])
        return original(parts, *args)

    monkeypatch.setattr(kernels, "dequantize", count)
    return counts


# --- lookup ------------------------------------------------------------------------------------


@ids_shapes
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_are_those_of_the_table(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    replacement, module = pair()
    ids = ids_of(*shape, dtype=dtype)
    assert torch.equal(replacement(ids), module(ids))
    assert torch.equal(replacement.weight, module.weight)
    for other in (torch.bfloat16, torch.float64):
        replacement.to(other)
        assert replacement(ids).dtype == replacement.weight.dtype == other
        assert torch.equal(replacement(ids), replacement.weight[ids])


def test_one_changed_code_is_noticed() -> None:
    replacement, module = pair()
    replacement.matrix.words[7, 0] ^= 1
    assert not torch.equal(replacement(torch.tensor([7])), module(torch.tensor([7])))
    assert torch.equal(replacement(torch.tensor([6, 8])), module(torch.tensor([6, 8])))


def test_only_the_rows_asked_for_are_dequantised(dequantised: list[int]) -> None:
    replacement, _ = pair()
    replacement(ids_of(2, 3))
    assert dequantised == [6]
    assert replacement.weight.shape == (ROWS, COLUMNS)
    assert dequantised == [6, ROWS]


def test_ids_outside_of_the_table_and_of_other_types_are_refused() -> None:
    replacement, _ = pair()
    for wrong in (ROWS, -1):
        with pytest.raises((IndexError, RuntimeError), match="index out of range|out of bounds"):
            replacement(torch.tensor([wrong]))
    with pytest.raises(
        LayerError, match=r"ids are torch.float32; give int32 or int64, numbers of rows in 0 … 19"
    ):
        replacement(torch.zeros(3))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_zeros_stays_exactly_zero(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(ROWS, COLUMNS, padding_idx=3)
    weight = rounded(EMBEDDING.weight(module), bits, symmetric=symmetric)
    replacement: Any = EMBEDDING.replacement(module, QuantLinear.from_quantized(weight))
    assert replacement.padding_idx == 3
    assert not replacement(torch.tensor([3])).any()
    assert replacement(torch.tensor([2, 4])).any(-1).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", ["rtn", "gptq", "two-stage"])
def test_no_method_moves_a_row_of_zeros(method: Any, bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(ROWS, COLUMNS, padding_idx=3)
    config = QuantConfig(bits=bits, group_size=16, method=method, symmetric=symmetric)
    identity = LayerStatistics(
        torch.eye(COLUMNS), torch.tensor(COLUMNS), torch.zeros(COLUMNS, COLUMNS)
    )
    statistics = identity if config.needs_calibration else None
    weight = TwoStageGroupQuantizer(EMBEDDING.weight(module), statistics, config).run().weight
    replacement = EMBEDDING.replacement(module, QuantLinear.from_quantized(weight))
    assert not replacement(torch.tensor([3])).any()
    assert replacement(torch.tensor([2, 4])).any(-1).all()


def test_padding_that_is_not_zero_is_a_row_like_others() -> None:
    module = nn.Embedding.from_pretrained(torch.randn(ROWS, COLUMNS), padding_idx=3)
    replacement: Any = EMBEDDING.replacement(
        module, QuantLinear.from_quantized(rounded(EMBEDDING.weight(module), 8))
    )
    torch.testing.assert_close(
        replacement(torch.tensor([3])), module(torch.tensor([3])), rtol=0, atol=0.05
    )


# --- subclasses --------------------------------------------------------------------------------


@classes
def test_subclasses_compute_around_the_lookup_what_they_did(kind: Any) -> None:
    replacement, module = pair(kind)
    ids = ids_of(2, 3)
    assert torch.equal(replacement(ids), module(ids))
    assert isinstance(replacement, kind)
    assert isinstance(replacement, QuantEmbedding)
    assert repr(replacement).startswith(f"Quant{kind.__name__}(\n  20, 40")
    assert list(replacement.state_dict()) == [
        "matrix.words",
        "matrix.scale_bits",
        "matrix.zero_words",
    ]
    replacement.to(torch.bfloat16)
    assert replacement(ids).dtype == torch.bfloat16
    if kind is Positional:
        assert torch.equal(replacement(ids, past=4), module.bfloat16()(ids, past=4))


@pytest.mark.parametrize("kind", [Scaled, Positional], ids=lambda kind: kind.__name__)
def test_a_subclass_may_ask_for_dtype_and_device_at_no_cost(
    kind: Any, dequantised: list[int]
) -> None:
    replacement, _ = pair(kind)
    replacement(ids_of(1, 3))
    assert dequantised == [3]
    weight = replacement.weight
    assert (weight.shape, weight.dtype, weight.device.type) == (
        (ROWS, COLUMNS),
        torch.float32,
        "cpu",
    )
    assert dequantised == [3]
    assert torch.equal(weight, replacement.matrix.weight)
    assert dequantised == [3, ROWS, ROWS]


def test_gradients_pass_through_a_subclass_that_multiplies_by_its_table() -> None:
    replacement, module = pair(AlsoOutput)
    x, again = (torch.ones(2, COLUMNS, requires_grad=True) for _ in range(2))
    replacement.logits(x).square().sum().backward()
    module.logits(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_hooks_and_replaced_forwards_of_the_float_layer_stay_with_it() -> None:
    module: Any = Scaled(ROWS, COLUMNS)
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    module.forward = lambda ids: ids
    replacement: Any = EMBEDDING.replacement(
        module.eval(), QuantLinear.from_quantized(rounded(EMBEDDING.weight(module)))
    )
    assert replacement(ids_of(2)).shape == (2, COLUMNS)
    assert calls == []
    assert not replacement.training
    assert module.weight.shape == (ROWS, COLUMNS)


def test_embeddings_that_are_more_than_a_table_are_not_matched() -> None:
    with_parameter, with_layer = nn.Embedding(ROWS, COLUMNS), nn.Embedding(ROWS, COLUMNS)
    with_parameter.register_parameter("gain", nn.Parameter(torch.ones(())))
    with_layer.add_module("norm", nn.LayerNorm(COLUMNS))
    others = (
        nn.Embedding(ROWS, COLUMNS, max_norm=1.0),
        with_parameter,
        with_layer,
        nn.EmbeddingBag(ROWS, COLUMNS),
    )
    assert all(EMBEDDING.matches(kind(ROWS, COLUMNS)) for kind in CLASSES)
    assert not any(EMBEDDING.matches(other) for other in (*others, nn.Linear(4, 4), pair()[0]))
    assert EMBEDDING.inputs is None


# --- tied weights ------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = embed, head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled], ids=lambda kind: kind.__name__)
def test_a_table_may_be_that_of_the_output_layer(kind: Any, bias: bool) -> None:
    embed, _ = pair(kind)
    head = QuantLinear.from_quantized(
        embed.matrix.quantized_weight(), torch.randn(ROWS) if bias else None
    )
    model = Tied(EMBEDDING.replacement(kind(ROWS, COLUMNS), head), head)
    ids = ids_of(2, 3)
    torch.testing.assert_close(model(ids), F.linear(embed(ids), embed.weight, head.bias))
    assert set(model.state_dict()) == {
        f"{at}.{key}" for at in ("embed.matrix", "head") for key in head.state_dict()
    }
    copied: Any = copy.deepcopy(model)
    assert copied.embed.matrix is copied.head
    assert copied.head is not head
    fresh_head = QuantLinear(COLUMNS, ROWS, bits=4, group_size=16, bias=bias)
    fresh = Tied(EMBEDDING.replacement(kind(ROWS, COLUMNS), fresh_head), fresh_head)
    fresh.load_state_dict(model.state_dict())
    for other in (copied, fresh):
        assert torch.equal(other(ids), model(ids))
        other.head.words.zero_()
        assert torch.equal(other.embed.weight, other.head.weight)
        assert not torch.equal(other(ids), model(ids))


# --- what a module must survive ----------------------------------------------------------------


@classes
def test_copies_are_equal_and_independent(kind: Any) -> None:
    replacement, _ = pair(kind)
    ids = ids_of(2, 3)
    expected = replacement(ids)
    for other in (
        copy.deepcopy(replacement),
        copy.copy(replacement),
        pickle.loads(pickle.dumps(replacement)),
    ):
        assert type(other) is type(replacement)
        assert torch.equal(other(ids), expected)
    other = copy.deepcopy(replacement)
    other.matrix.words.zero_()
    assert torch.equal(replacement(ids), expected)


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled], ids=lambda kind: kind.__name__)
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph(kind: Any) -> None:
    replacement, _ = pair(kind)
    compiled = torch.compile(replacement, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 5):
        assert torch.equal(compiled(ids_of(2, length)), replacement(ids_of(2, length)))


@classes
def test_export_runs_for_any_length(kind: Any) -> None:
    replacement, _ = pair(kind)
    length = torch.export.Dim("length", min=2, max=12)
    program = torch.export.export(replacement, (ids_of(1, 4),), dynamic_shapes=({1: length},))
    assert torch.equal(program.module()(ids_of(1, 7)), replacement(ids_of(1, 7)))


@pytest.mark.parametrize(
    "kind", [nn.Embedding, Positional, AlsoOutput], ids=lambda kind: kind.__name__
)
def test_nothing_leaves_the_device_and_nothing_is_read(kind: Any) -> None:
    module = kind(ROWS, COLUMNS)
    with FakeTensorMode(), torch.no_grad():
        matrix = QuantLinear(
            COLUMNS, ROWS, bits=3, group_size=16, bias=False, device="cuda", dtype=torch.bfloat16
        )
        replacement: Any = EMBEDDING.replacement(module, matrix)
        y = replacement(torch.zeros(2, 3, dtype=torch.int64, device="cuda"))
        for result in (y, replacement.weight):
            assert result.device.type == "cuda"
            assert result.dtype == torch.bfloat16


def test_meta_and_functional_transforms() -> None:
    replacement, module = pair()
    ids = ids_of(4, 3)
    assert torch.equal(torch.func.vmap(replacement)(ids), module(ids))
    meta = copy.deepcopy(replacement).to("meta")
    assert meta(ids.to("meta")).shape == (4, 3, COLUMNS)
