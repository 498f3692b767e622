"""What solving a layer may cost, counted: factorisations, products with H, operations for each
column, large tensors.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tsq_layers import HessianObserver, LayerStatistics, QuantConfig
from tsq_layers.numerics import grid
from tsq_layers.solver import TwoStageGroupQuantizer, gptq, stage1
from tsq_layers.solver import problem as objective

N, K, GROUP = 192, 512, 64


class Counts(TorchDispatchMode):
    """How often each operation is called, and the entries of the tensors that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        if isinstance(out, Tensor) and not func.is_view and not any(out is given for given in args):
            self.sizes[out.numel()] += "out" not in (kwargs or {})
        return out


def layer(paired: bool = True, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * K, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    deviation = 0.1 * torch.randn(2 * K, K, generator=generator).T @ x if paired else None
    return torch.randn(N, K, generator=generator), LayerStatistics(
        x.T @ x, torch.tensor(len(x)), deviation
    )


def counted(action: Callable[[], object]) -> Counts:
    with torch.no_grad(), Counts() as counts:
        action()
    return counts


def solve(**changes: Any) -> Callable[[], object]:
    weight, statistics = layer(changes.get("deviation") != "none")
    config = QuantConfig(bits=3, group_size=GROUP, **changes)
    return lambda: TwoStageGroupQuantizer(weight, statistics, config).run()


WAYS = {
    "gptq": ({"method": "gptq"}, 1),
    "two-stage": ({}, 1),
    "two-stage, one stream": ({"deviation": "none"}, 1),
    "R with a damping of its own": ({"deviation_damping": 0.1}, 2),
}


@pytest.mark.parametrize(("changes", "factorisations"), WAYS.values(), ids=WAYS)
def test_matrix_is_factorised_once_for_each_damping_and_never_inverted(
    changes: dict, factorisations: int
) -> None:
    calls = counted(solve(**changes)).calls
    of_rows = 1 if changes.get("method") != "gptq" else 0  # the small systems of stage 2
    assert calls["linalg_cholesky_ex"] == factorisations + of_rows
    uses_deviation = changes.get("method") != "gptq" and changes.get("deviation") != "none"
    assert calls["linalg_solve_triangular"] == 2 * uses_deviation
    assert calls["linalg_inv_ex"] == calls["cholesky_inverse"] == 0


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({"method": "gptq"}, 3.8),
        ({"deviation": "none"}, 6.4),
        ({}, 8.4),
        ({"zero_points": "float"}, 8.45),
        ({"deviation": "refine"}, 8.9),
    ],
    ids=["gptq", "two-stage, one stream", "two-stage", "offsets", "two targets"],
)
def test_products_are_a_few_times_rows_by_columns_squared(changes: dict, products: float) -> None:
    # GPTQ 1, and its loss nothing; two losses by half of H, 1.25 to 1.5 with panels of K/2; W R 2.
    # Stage 2: a little more
    # than 1 for its Gram, and 1.5 for (Q − W') H by the factor in panels of K/2; 2 by H, where its target is another.
    action = solve(**changes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        action()
    assert counter.get_total_flops() <= products * N * K**2


def problem() -> tuple[objective.Problem, Tensor, Tensor]:
    weight, statistics = layer()
    found = objective.build(weight, statistics, QuantConfig(group_size=GROUP))
    scales, zeros = grid.minmax(found.grid_target, 3, GROUP, symmetric=False)
    return found, scales, zeros


def test_columns_take_five_operations_each_and_some_for_each_block() -> None:
    found, scales, zeros = problem()
    calls = counted(
        lambda: gptq.assign(found.grid_target, found.factor, found.order, scales, zeros, 3, GROUP)
    ).calls
    views = {
        "select",
        "slice",
        "unbind",
        "view",
        "unsqueeze",
        "transpose",
        "t",
        "_unsafe_view",
        "diagonal",
        "expand",
    }
    computing = sum(
        number for name, number in calls.items() if name not in views | {"alias", "split", "detach"}
    )
    assert calls["addmv_"] <= K
    assert calls["div"] <= K + K // gptq.BLOCK_COLUMNS
    assert computing <= 5 * K + 20 * K // gptq.BLOCK_COLUMNS + 20


def test_gptq_makes_one_copy_of_the_weight_and_one_for_the_time_of_its_permutation() -> None:
    found, scales, zeros = problem()
    counts = counted(
        lambda: gptq.assign(found.grid_target, found.factor, found.order, scales, zeros, 3, GROUP)
    )
    floats = 2  # transposed, then permuted; what is whitened takes the place of the first
    codes = 3  # as they are chosen, in the original order, transposed
    assert counts.sizes[N * K] <= floats + codes + 1  # torch.empty_like of the codes counts too


def test_no_copy_of_the_matrix_is_made_beyond_those_of_its_factorisation() -> None:
    weight, statistics = layer(paired=False)
    counts = counted(lambda: objective.build(weight, statistics, QuantConfig(deviation="none")))
    # The mean, rows and columns in order (2), the factor turned round; Cholesky's own, one of two results, is not seen.
    assert counts.sizes[K * K] <= 4


def test_candidate_grids_make_no_large_tensors() -> None:
    weight, _ = layer()
    metric = torch.rand(K) + 0.5

    def made(count: int) -> int:
        return counted(
            lambda: stage1._fit(
                weight, metric, 3, GROUP, False, stage1.clip_factors(3, count), both_zeros=True
            )
        ).sizes[N * K]

    assert made(12) == made(2)


def test_layers_that_share_an_input_cost_one_observation() -> None:
    x = torch.randn(256, K, dtype=torch.bfloat16)
    observer = HessianObserver(K)
    observer.observe(x, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        observer.observe(x, x)
    panels = 1 + 128 / K  # the upper triangle in panels
    assert counter.get_total_flops() <= 256 * K**2 * (panels + 2)


def test_counts_see_what_they_are_to_see() -> None:
    counts = counted(lambda: torch.linalg.cholesky(torch.eye(7)).clone())
    assert counts.calls["linalg_cholesky_ex"] == 1
    assert counts.sizes[49] >= 2
