"""The observer: sums over tokens, however they arrive, and what does not count."""

import copy
from collections.abc import Iterator

import pytest
import torch
from oracles import objective as oracle
from torch import Tensor, nn
from torch.testing import assert_close

from tsq_layers import observer as module
from tsq_layers.errors import CalibrationError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.observer import HessianObserver

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
TOKENS, WIDTH = 60, 7


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def observed(*calls: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> LayerStatistics:
    """Statistics of an observer that was given these (x[, reference[, mask]])."""
    observer = HessianObserver(calls[0][0].shape[-1], dtype=dtype)
    for call in calls:
        observer.observe(*call)
    return observer.statistics()


def sum_error(x: Tensor, y: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bound of the error of Σ x yᵀ in ``dtype``: T·u·Σ|x||y|ᵀ for any order of summation, u the unit roundoff."""
    y = x if y is None else y
    return (len(x) + 2) * torch.finfo(dtype).eps / 2 * (x.abs().double().T @ y.abs().double())


def assert_same(a: LayerStatistics, b: LayerStatistics) -> None:
    """Equal up to the order of summation in float64."""
    assert int(a.count) == int(b.count)
    assert_close(a.hessian, b.hessian, **DOUBLE)
    assert (a.deviation is None) == (b.deviation is None)
    if a.deviation is not None:
        assert_close(a.deviation, b.deviation, **DOUBLE)


# ---- the sums --------------------------------------------------------------------------------------------------------


def test_statistics_equal_the_oracle() -> None:
    x, reference = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=1)
    statistics = observed((x, reference))
    H, R = oracle.statistics(x, reference)
    assert_close(statistics.hessian / statistics.count, H, **DOUBLE)
    assert_close(statistics.deviation / statistics.count, R, **DOUBLE)


@pytest.mark.parametrize("corrupt", [lambda R: R.T, lambda R: -R], ids=["transposed", "negated"])
def test_deviation_differs_from_the_oracle_when_it_is_corrupted(corrupt) -> None:
    x, reference = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=1)
    statistics = observed((x, reference))
    with pytest.raises(AssertionError):
        assert_close(
            statistics.deviation / TOKENS, corrupt(oracle.statistics(x, reference)[1]), **DOUBLE
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_different_length_equal_all_at_once(dtype: torch.dtype) -> None:
    x, reference = normal(TOKENS, WIDTH).to(dtype), normal(TOKENS, WIDTH, seed=1).to(dtype)
    parts = [1, 9, 50]
    batches = observed(*zip(x.split(parts), reference.split(parts), strict=True), dtype=dtype)
    once = observed((x, reference), dtype=dtype)
    assert batches.hessian.dtype == dtype
    assert int(batches.count) == TOKENS
    assert ((batches.hessian - once.hessian).abs() <= 2 * sum_error(x, dtype=dtype)).all()
    # The differences x − x̃ are rounded before the product, alike in both.
    assert (
        (batches.deviation - once.deviation).abs() <= 2 * sum_error(x - reference, x, dtype=dtype)
    ).all()


@pytest.mark.parametrize("width", [383, 384, 385, 800], ids=lambda width: f"K={width}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_give_the_whole_symmetric_matrix(dtype: torch.dtype, width: int) -> None:
    x = normal(20, width).to(dtype)
    hessian = observed((x,), dtype=dtype).hessian
    assert torch.equal(hessian, hessian.T)
    assert ((hessian - x.double().T @ x.double()).abs() <= sum_error(x, dtype=dtype)).all()


@pytest.mark.parametrize("panel", [1, 3, 7, 100])
def test_panel_width_does_not_matter(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(TOKENS, WIDTH)
    expected = observed((x,))
    monkeypatch.setattr(module, "_PANEL", panel)
    assert_same(observed((x,)), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_inputs_of_any_float_dtype_are_summed_as_they_are(dtype: torch.dtype) -> None:
    x, reference = normal(TOKENS, WIDTH).to(dtype), normal(TOKENS, WIDTH, seed=1).to(dtype)
    assert_same(observed((x, reference)), observed((x.double(), reference.double())))


def test_any_leading_shape_is_tokens() -> None:
    x, reference = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=1)
    shape = (3, 4, 5, WIDTH)
    assert_same(observed((x.reshape(shape), reference.reshape(shape))), observed((x, reference)))
    assert_same(observed((x[0], reference[0])), observed((x[:1], reference[:1])))


def test_strided_inputs_are_allowed() -> None:
    x = normal(WIDTH, TOKENS).T
    assert_same(observed((x,)), observed((x.contiguous(),)))


def test_no_tokens_add_nothing() -> None:
    x = normal(TOKENS, WIDTH)
    assert_same(observed((x,), (x[:0],)), observed((x,)))


def test_statistics_of_two_observers_add() -> None:
    x, reference = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=1)
    first, second = observed((x[:13], reference[:13])), observed((x[13:], reference[13:]))
    assert_same(first + second, observed((x, reference)))


def test_inputs_are_not_modified() -> None:
    x, reference = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=1)
    mask = torch.arange(TOKENS) < 40
    kept = [tensor.clone() for tensor in (x, reference, mask)]
    observed((x, reference, mask))
    assert all(torch.equal(a, b) for a, b in zip((x, reference, mask), kept, strict=True))


def test_statistics_do_not_change_with_later_inputs() -> None:
    observer = HessianObserver(WIDTH, dtype=torch.float64)
    x, reference = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=1)
    observer.observe(x, reference)
    before = observer.statistics()
    kept = copy.deepcopy(before)
    observer.observe(x, reference)
    assert_same(before, kept)


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0.0, 3.0, float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mask_equals_removing_the_tokens(kind: torch.dtype, padding: float) -> None:
    x, reference = normal(4, 15, WIDTH), normal(4, 15, WIDTH, seed=1)
    mask = torch.arange(15) < torch.tensor([15, 3, 8, 0]).unsqueeze(1)
    expected = observed((x[mask], reference[mask]))
    x[~mask], reference[~mask] = padding, -padding
    assert_same(observed((x, reference, mask.to(kind))), expected)


@pytest.mark.parametrize("where", ["x", "reference"])
def test_nan_in_the_padding_of_one_stream_does_not_count(where: str) -> None:
    x, reference = normal(15, WIDTH), normal(15, WIDTH, seed=1)
    mask = torch.arange(15) < 9
    expected = observed((x[:9], reference[:9]))
    {"x": x, "reference": reference}[where][9:] = float("nan")
    assert_same(observed((x, reference, mask)), expected)


def test_mask_without_reference_equals_removing_the_tokens() -> None:
    x, mask = normal(15, WIDTH), torch.arange(15) % 3 != 0
    assert_same(observed((x, None, mask)), observed((x[mask],)))


def test_every_mask_value_but_zero_counts_once() -> None:
    x = normal(4, WIDTH)
    assert_same(observed((x, None, torch.tensor([1, 0, 2, -1]))), observed((x[[0, 2, 3]],)))


def test_nan_outside_of_the_padding_stays_visible() -> None:
    x = normal(4, WIDTH)
    x[1] = float("nan")
    assert observed((x, None, torch.tensor([1, 1, 0, 0]))).hessian.isnan().all()


# ---- blocks ----------------------------------------------------------------------------------------------------------

BLOCKS = 3


def block_inputs(
    blocks: int = BLOCKS, width: int = WIDTH, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of both streams (T, B, K), and a mask (T,)."""
    mask = torch.arange(tokens) % 4 != 1
    return normal(tokens, blocks, width), normal(tokens, blocks, width, seed=1), mask


def observed_blocks(
    *calls: tuple[Tensor | None, ...], dtype: torch.dtype = torch.float64
) -> LayerStatistics:
    """Statistics of an observer with blocks that was given these (x[, reference[, mask]])."""
    observer = HessianObserver(calls[0][0].shape[-1], blocks=calls[0][0].shape[-2], dtype=dtype)
    for call in calls:
        observer.observe(*call)
    return observer.statistics()


def assert_equals_block_oracle(
    found: LayerStatistics, x: Tensor, reference: Tensor, mask: Tensor
) -> None:
    H, R, count = oracle.block_sums(x, reference, mask)
    assert int(found.count) == count
    assert_close(found.hessian, H, **DOUBLE)
    assert_close(found.deviation, R, **DOUBLE)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all-tokens"])
@pytest.mark.parametrize(("blocks", "width"), [(3, 7), (7, 7), (40, 1), (2, 30)], ids=str)
def test_blocks_equal_the_oracle(blocks: int, width: int, masked: bool) -> None:
    x, reference, mask = block_inputs(blocks, width)
    mask = mask if masked else torch.ones_like(mask)
    found = observed_blocks((x, reference, mask if masked else None))
    assert found.blocks == blocks
    assert found.hessian.shape == (blocks, width, width)
    assert_equals_block_oracle(found, x, reference, mask)


CORRUPTED = {
    "blocks rolled": lambda x, reference, mask: (x.roll(1, 1), reference.roll(1, 1), mask),
    "columns rolled": lambda x, reference, mask: (x.roll(1, 2), reference.roll(1, 2), mask),
    "mask ignored": lambda x, reference, mask: (x, reference, torch.ones_like(mask)),
    "mask rolled": lambda x, reference, mask: (x, reference, mask.roll(1)),
    "streams exchanged": lambda x, reference, mask: (reference, x, mask),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_blocks_differ_from_the_oracle_when_its_input_is_corrupted(corrupt) -> None:
    x, reference, mask = block_inputs()
    found = observed_blocks((x, reference, mask))
    with pytest.raises(AssertionError):
        assert_equals_block_oracle(found, *corrupt(x, reference, mask))


def test_blocks_equal_one_observer_each() -> None:
    x, reference, mask = block_inputs()
    found = observed_blocks((x, reference, mask))
    for b in range(BLOCKS):
        alone = observed((x[:, b], reference[:, b], mask))
        assert_same(LayerStatistics(found.hessian[b], found.count, found.deviation[b]), alone)


def test_one_block_is_no_block() -> None:
    x = normal(TOKENS, WIDTH)
    observer = HessianObserver(WIDTH, blocks=1, dtype=torch.float64)
    observer.observe(x)
    assert torch.equal(observer.statistics().hessian, observed((x,)).hessian)


@pytest.mark.parametrize("shape", [(TOKENS,), (4, 15), (3, 4, 5), (1, 60), (60, 1)], ids=str)
@pytest.mark.parametrize("elements", [1, 30, 100, 10**6], ids=lambda e: f"chunk={e}")
def test_pieces_and_leading_shape_do_not_change_the_sums_of_blocks(
    elements: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, reference, mask = block_inputs()
    expected = observed_blocks((x, reference, mask))
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    shaped = [values.reshape(*shape, *values.shape[1:]) for values in (x, reference, mask)]
    assert_same(observed_blocks(tuple(shaped)), expected)
    assert_same(observed_blocks((shaped[0], shaped[1], mask)), expected)  # the mask may be flat
    assert_same(observed_blocks((shaped[0],)), observed_blocks((x,)))


def test_pieces_bound_what_is_rearranged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, tokens = [], HessianObserver._tokens

    def spy(self: HessianObserver, x: Tensor, padding: Tensor | None) -> Tensor:
        sizes.append(x.numel())
        return tokens(self, x, padding)

    monkeypatch.setattr(HessianObserver, "_tokens", spy)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100)
    x, reference, mask = block_inputs()
    observed_blocks(
        (x.reshape(4, 15, BLOCKS, WIDTH), reference.reshape(4, 15, BLOCKS, WIDTH), mask)
    )
    assert max(sizes) <= 100
    assert sum(sizes) == 2 * x.numel()


def test_a_single_token_of_blocks_may_lack_a_leading_shape() -> None:
    x, reference, _ = block_inputs()
    assert_same(observed_blocks((x[0], reference[0])), observed_blocks((x[:1], reference[:1])))


def test_no_tokens_add_nothing_to_blocks() -> None:
    x = block_inputs()[0]
    assert_same(observed_blocks((x,), (x[:0],)), observed_blocks((x,)))


def test_blocks_may_be_views_as_unfolding_gives_them() -> None:
    x = normal(4, BLOCKS * WIDTH, 15)  # images, patches as columns
    view = x.unflatten(1, (BLOCKS, WIDTH)).movedim(-1, 1)
    assert not view.is_contiguous()
    assert_same(observed_blocks((view,)), observed_blocks((view.contiguous(),)))


@pytest.mark.parametrize("padding", [0.0, float("nan"), float("inf")], ids=str)
def test_padding_of_blocks_does_not_count_whatever_it_is(padding: float) -> None:
    x, reference, mask = block_inputs()
    expected = observed_blocks((x[mask], reference[mask]))
    x[~mask], reference[~mask] = padding, -padding
    assert_same(observed_blocks((x, reference, mask)), expected)


@pytest.mark.parametrize("width", [384, 385, 500], ids=lambda width: f"K={width}")
def test_panels_give_the_whole_symmetric_matrix_of_every_block(width: int) -> None:
    x = normal(20, 2, width).float()
    hessian = observed_blocks((x,), dtype=torch.float32).hessian
    assert torch.equal(hessian, hessian.mT)
    for b in range(2):
        exact = x[:, b].double().T @ x[:, b].double()
        assert ((hessian[b] - exact).abs() <= sum_error(x[:, b])).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_blocks_of_any_float_dtype_are_summed_as_they_are(dtype: torch.dtype) -> None:
    x, reference = (values.to(dtype) for values in block_inputs()[:2])
    assert_same(observed_blocks((x, reference)), observed_blocks((x.double(), reference.double())))


def test_inputs_of_blocks_are_not_modified() -> None:
    tensors = block_inputs()
    kept = [tensor.clone() for tensor in tensors]
    observed_blocks(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "unpaired"])
def test_state_dict_round_trip_with_blocks(paired: bool) -> None:
    x, reference, _ = block_inputs()
    call = (x, reference) if paired else (x,)
    observer, fresh = (HessianObserver(WIDTH, blocks=BLOCKS, dtype=torch.float64) for _ in range(2))
    observer.observe(*call)
    fresh.load_state_dict(observer.state_dict())
    assert_same(fresh.statistics(), observer.statistics())
    fresh.observe(*call)
    assert_same(fresh.statistics(), observer.statistics() + observer.statistics())


@pytest.mark.parametrize("blocks", [1, 2], ids=lambda blocks: f"into-{blocks}")
def test_state_dict_with_other_blocks_is_refused(blocks: int) -> None:
    observer = HessianObserver(WIDTH, blocks=BLOCKS)
    observer.observe(block_inputs()[0])
    with pytest.raises(RuntimeError, match="size mismatch for hessian"):
        HessianObserver(WIDTH, blocks=blocks).load_state_dict(observer.state_dict())


def test_repr_names_blocks() -> None:
    assert (
        repr(HessianObserver(9, blocks=32))
        == "HessianObserver(columns=9, blocks=32, dtype=torch.float32)"
    )


# ---- as a module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "unpaired"])
def test_state_dict_round_trip_into_a_fresh_observer(paired: bool) -> None:
    x = normal(TOKENS, WIDTH)
    call = (x, normal(TOKENS, WIDTH, seed=1)) if paired else (x,)
    observer = HessianObserver(WIDTH, dtype=torch.float64)
    observer.observe(*call)
    fresh = HessianObserver(WIDTH, dtype=torch.float64)
    fresh.load_state_dict(observer.state_dict())
    assert_same(fresh.statistics(), observer.statistics())
    fresh.observe(*call)
    assert_same(fresh.statistics(), observer.statistics() + observer.statistics())
    assert int(observer.statistics().count) == TOKENS


def test_state_dict_round_trip_inside_a_model() -> None:
    model = nn.ModuleDict({"observer": HessianObserver(WIDTH), "layer": nn.Linear(WIDTH, 2)})
    model["observer"].observe(normal(TOKENS, WIDTH))
    fresh = nn.ModuleDict({"observer": HessianObserver(WIDTH), "layer": nn.Linear(WIDTH, 2)})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(
        fresh["observer"].statistics().hessian, model["observer"].statistics().hessian
    )


def test_state_dict_of_an_empty_observer_is_empty() -> None:
    empty = HessianObserver(WIDTH)
    assert empty.state_dict() == {}
    HessianObserver(WIDTH).load_state_dict(empty.state_dict())


def test_state_dict_with_deviation_is_refused_by_an_observer_in_use_without() -> None:
    paired, unpaired = HessianObserver(WIDTH), HessianObserver(WIDTH)
    paired.observe(normal(4, WIDTH), normal(4, WIDTH))
    unpaired.observe(normal(4, WIDTH))
    with pytest.raises(RuntimeError, match="deviation"):
        unpaired.load_state_dict(paired.state_dict())
    with pytest.raises(RuntimeError, match="deviation"):
        paired.load_state_dict(unpaired.state_dict())


def test_reset_forgets_everything() -> None:
    observer = HessianObserver(WIDTH, dtype=torch.float64)
    observer.observe(normal(9, WIDTH), normal(9, WIDTH))
    observer.reset()
    with pytest.raises(CalibrationError, match="saw no input"):
        observer.statistics()
    x = normal(TOKENS, WIDTH, seed=3)
    observer.observe(x)  # also: without a reference now
    assert_same(observer.statistics(), observed((x,)))


def test_forward_pre_hook_sees_the_inputs_and_changes_nothing() -> None:
    layer, x = nn.Linear(WIDTH, 3, dtype=torch.float64), normal(2, 5, WIDTH)
    plain = layer(x)
    observer = HessianObserver(WIDTH, dtype=torch.float64)
    handle = layer.register_forward_pre_hook(observer)
    assert torch.equal(layer(x), plain)
    handle.remove()
    layer(x)
    assert_same(observer.statistics(), observed((x,)))


def test_forward_pre_hook_sees_an_input_that_is_given_by_name() -> None:
    layer, x = nn.Linear(WIDTH, 3), torch.ones(2, WIDTH)
    observer = HessianObserver(WIDTH)
    handle = layer.register_forward_pre_hook(observer)
    with pytest.raises(CalibrationError, match="with_kwargs=True"):
        layer(input=x)
    handle.remove()
    layer.register_forward_pre_hook(observer, with_kwargs=True)
    layer(input=x)
    assert int(observer.statistics().count) == 2


def test_inputs_that_require_grad_leave_no_graph() -> None:
    statistics = observed((normal(4, WIDTH).requires_grad_(),))
    assert not statistics.hessian.requires_grad


def test_inference_mode_in_one_call_does_not_spoil_the_next() -> None:
    x = normal(TOKENS, WIDTH)
    observer = HessianObserver(WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        observer.observe(x[:20], x[:20])
    observer.observe(x[20:40], x[20:40])
    with torch.inference_mode():
        observer.observe(x[40:], x[40:])
    assert_same(observer.statistics(), observed((x, x)))


def test_repr_names_width_and_dtype() -> None:
    assert repr(HessianObserver(WIDTH)) == "HessianObserver(columns=7, dtype=torch.float32)"


# ---- precision -------------------------------------------------------------------------------------------------------

SWITCHES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def precision_restored() -> Iterator[None]:
    """Give back the global precision, which these tests change."""
    kept = [switch.fp32_precision for switch in SWITCHES]
    yield
    for switch, precision in zip(SWITCHES, kept, strict=True):
        switch.fp32_precision = precision


def precisions() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.mark.usefixtures("precision_restored")
@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_global_precision_is_full_while_observing_and_restored(
    allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision(allowed)
    before, during = precisions(), []
    addmm_ = Tensor.addmm_

    def spy(self: Tensor, *args: Tensor) -> Tensor:
        during.append(precisions())
        return addmm_(self, *args)

    monkeypatch.setattr(Tensor, "addmm_", spy)
    observed((normal(9, WIDTH), normal(9, WIDTH)), dtype=torch.float32)
    assert during == [["ieee", "ieee"]] * 2  # H and R
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == allowed


@pytest.mark.usefixtures("precision_restored")
def test_global_precision_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")

    def fail(self: Tensor, *args: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Tensor, "addmm_", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        observed((normal(9, WIDTH),))
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("precision_restored")
def test_global_precision_may_be_set_by_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = (
        "tf32"  # makes torch.get_float32_matmul_precision() raise
    )
    observed((normal(9, WIDTH),))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_lower_the_precision(autocast: torch.dtype) -> None:
    x, reference = (
        normal(TOKENS, WIDTH, dtype=torch.float32),
        normal(TOKENS, WIDTH, seed=1, dtype=torch.float32),
    )
    expected = observed((x, reference), dtype=torch.float32)
    with torch.autocast("cpu", dtype=autocast):
        found = observed((x, reference), dtype=torch.float32)
    assert torch.equal(found.hessian, expected.hessian)
    assert torch.equal(found.deviation, expected.deviation)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_dtype_of_the_sums_is_checked(dtype: torch.dtype) -> None:
    with pytest.raises(
        CalibrationError, match=rf"observer dtype {dtype}: give torch.float32 or torch.float64"
    ):
        HessianObserver(WIDTH, dtype=dtype)


@pytest.mark.parametrize("blocks", [0, -1])
def test_number_of_blocks_is_checked(blocks: int) -> None:
    with pytest.raises(
        CalibrationError, match=rf"observer of {blocks} blocks: give a positive number"
    ):
        HessianObserver(WIDTH, blocks=blocks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            (torch.ones(4, 7),), r"shape \(4, 7\); give floating point \(…, 3, 7\)", id="no-blocks"
        ),
        pytest.param(
            (torch.ones(4, 7, 3),),
            r"shape \(4, 7, 3\); give floating point \(…, 3, 7\)",
            id="turned",
        ),
        pytest.param(
            (torch.ones(7),), r"shape \(7,\); give floating point \(…, 3, 7\)", id="vector"
        ),
        pytest.param(
            (torch.ones(4, 3, 7), torch.ones(4, 1, 7)),
            r"\(4, 3, 7\) and its reference \(4, 1, 7\)",
            id="reference",
        ),
        pytest.param(
            (torch.ones(4, 3, 7), None, torch.ones(4, 3)),
            r"\(4, 3, 7\) and its mask \(4, 3\)",
            id="mask-by-block",
        ),
    ],
)
def test_shapes_of_blocks_are_checked(call: tuple[Tensor, ...], message: str) -> None:
    observer = HessianObserver(WIDTH, blocks=BLOCKS)
    with pytest.raises(CalibrationError, match=message):
        observer.observe(*call)
    assert observer.hessian is None  # nothing was added


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(CalibrationError, match="saw no input; run data through the layer first"):
        HessianObserver(WIDTH).statistics()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            (torch.ones(4, 6),),
            r"given torch.float32 of shape \(4, 6\); give floating point \(…, 7\)",
            id="width",
        ),
        pytest.param(
            (torch.ones(4, 7).long(),), r"given torch.int64 of shape \(4, 7\)", id="integers"
        ),
        pytest.param(
            (torch.ones(4, 7), torch.ones(5, 7)),
            r"shape \(4, 7\) and its reference \(5, 7\)",
            id="reference",
        ),
        pytest.param(
            (torch.ones(4, 7), None, torch.ones(5)),
            r"shape \(4, 7\) and its mask \(5,\)",
            id="mask",
        ),
    ],
)
@pytest.mark.parametrize("blocks", [None, 3], ids=["plain", "weighted"])
def test_shapes_are_checked(call: tuple[Tensor, ...], message: str, blocks: int | None) -> None:
    observer = HessianObserver(WIDTH, blocks=blocks or 1)
    with pytest.raises(CalibrationError, match=message):
        observer.observe(*call, weights=None if blocks is None else torch.ones(4, blocks))
    assert observer.hessian is None  # nothing was added


@pytest.mark.parametrize("weights", [None, torch.ones(4, 1)], ids=["plain", "weighted"])
@pytest.mark.parametrize("paired_first", [True, False], ids=["paired-first", "unpaired-first"])
def test_mixing_calls_with_and_without_reference_is_refused(
    paired_first: bool, weights: Tensor | None
) -> None:
    calls = [
        {"x": torch.ones(4, WIDTH), "reference": torch.ones(4, WIDTH)},
        {"x": torch.ones(4, WIDTH)},
    ]
    first, second = calls if paired_first else calls[::-1]
    observer = HessianObserver(WIDTH)
    observer.observe(**first, weights=weights)
    with pytest.raises(CalibrationError, match="with and without a reference were mixed"):
        observer.observe(**second, weights=weights)
    assert int(observer.count) == 4
