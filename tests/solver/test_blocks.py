"""Rows and the metrics of their blocks: every operation equals a loop over blocks."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.solver import blocks

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [(1, 4, 5), (3, 4, 5), (5, 1, 5), (4, 3, 1), (5, 5, 5)]
SIZED = pytest.mark.parametrize(
    ("B", "n", "K"), SIZES, ids=[f"B={B}-n={n}-K={K}" for B, n, K in SIZES]
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(B: int, K: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(K, generator=generator) for _ in range(B)])


def by_block(rows: Tensor, B: int) -> list[Tensor]:
    n = len(rows) // B
    return [rows[b * n : (b + 1) * n] for b in range(B)]


def looped_product(rows: Tensor, metrics: Tensor) -> Tensor:
    return torch.cat(
        [part @ metric for part, metric in zip(by_block(rows, len(metrics)), metrics, strict=True)]
    )


@SIZED
def test_product_takes_every_row_to_the_metric_of_its_block(B: int, n: int, K: int) -> None:
    rows, metrics = normal(B * n, K), normal(B, K, K, seed=1)
    assert_close(blocks.product(rows, metrics), looped_product(rows, metrics), **CLOSE)
    assert_close(blocks.product(rows, metrics[0]), rows @ metrics[0], **CLOSE)


def test_product_of_slices_equals_that_of_copies() -> None:
    rows, metrics = normal(12, 9), normal(3, 9, 9, seed=1)
    found = blocks.product(rows[:, 2:6], metrics[:, 2:6, :7])
    assert_close(found, looped_product(rows[:, 2:6].clone(), metrics[:, 2:6, :7].clone()), **CLOSE)


@pytest.mark.parametrize(
    "corrupt",
    [lambda M: M.roll(1, 0), lambda M: M.mT, lambda M: M[:1].expand_as(M)],
    ids=["rolled", "turned", "first"],
)
def test_product_differs_when_the_metrics_are_corrupted(corrupt) -> None:
    rows, metrics = normal(12, 5), normal(3, 5, 5, seed=1)
    with pytest.raises(AssertionError):
        assert_close(blocks.product(rows, metrics), looped_product(rows, corrupt(metrics)), **CLOSE)


@SIZED
def test_scaled_takes_every_row_to_the_number_of_its_block(B: int, n: int, K: int) -> None:
    rows, factors = normal(B * n, K), normal(B, seed=1)
    expected = torch.cat([f * part for part, f in zip(by_block(rows, B), factors, strict=True)])
    assert torch.equal(blocks.scaled(rows, factors), expected)
    assert torch.equal(blocks.scaled(rows, factors[0]), rows * factors[0])
    if B > 1:
        assert not torch.equal(blocks.scaled(rows, factors.roll(1)), expected)


@SIZED
def test_rows_and_columns_are_taken_by_the_order_of_their_block(B: int, n: int, K: int) -> None:
    values, order = normal(B, K, K), orders(B, K)
    rows = torch.stack([value[chosen] for value, chosen in zip(values, order, strict=True)])
    columns = torch.stack([value[:, chosen] for value, chosen in zip(values, order, strict=True)])
    assert torch.equal(blocks.take_rows(values, order), rows)
    assert torch.equal(blocks.take_columns(values, order), columns)
    assert torch.equal(blocks.take_rows(values[0], order[0]), rows[0])
    assert torch.equal(blocks.take_columns(values[0], order[0]), columns[0])
    if K > 1:
        assert not torch.equal(blocks.take_rows(values, order.flip(1)), rows)
        assert not torch.equal(blocks.take_columns(values, order.flip(1)), columns)


def test_rows_may_be_taken_more_than_once() -> None:
    values, chosen = normal(2, 3, 4), torch.tensor([[0, 0, 2, 1, 1], [2, 2, 2, 0, 1]])
    expected = torch.stack([value[index] for value, index in zip(values, chosen, strict=True)])
    assert torch.equal(blocks.take_rows(values, chosen), expected)


@SIZED
def test_original_order_undoes_the_permutation_of_each_block(B: int, n: int, K: int) -> None:
    rows, order = normal(B * n, K), orders(B, K)
    permuted = torch.cat(
        [part[:, chosen] for part, chosen in zip(by_block(rows, B), order, strict=True)]
    )
    assert torch.equal(blocks.in_original_order(permuted, order), rows)
    assert torch.equal(blocks.in_original_order(rows[:, order[0]], order[0]), rows)
    if B > 1 and K > 1:
        assert not torch.equal(blocks.in_original_order(permuted, order.roll(1, 0)), rows)


@pytest.mark.parametrize("elements", [1, 5, 12, 25, 60, 10**6], ids=lambda e: f"most={e}")
@SIZED
def test_chunks_are_all_rows_in_order_each_with_its_metric(
    B: int, n: int, K: int, elements: int
) -> None:
    rows, metrics = normal(B * n, K), torch.arange(B)
    pieces = list(blocks.chunks(rows, metrics, elements))
    assert torch.equal(torch.cat([part for part, _ in pieces]), rows)
    found = [metric.repeat_interleave(len(part) // len(metric)) for part, metric in pieces]
    assert torch.equal(torch.cat(found), metrics.repeat_interleave(n))
    assert all(part.numel() <= max(elements, K) for part, _ in pieces)
    assert all(len(metric) == 1 or len(part) == n * len(metric) for part, metric in pieces)


def test_chunks_of_no_rows_are_one_empty_piece() -> None:
    ((part, metric),) = blocks.chunks(torch.ones(0, 5), torch.ones(1, 5, 5), 100)
    assert part.shape == (0, 5)
    assert metric.shape == (1, 5, 5)
