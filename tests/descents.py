"""Problems for the descents on the integers: what they are given, in float64, and a strategy that draws them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.coded import Coded

EXACT = 1e-12  # of the signal: what sums of some ten terms in float64 leave


class Case(Coded):
    """What every descent starts from; as a tuple, the first arguments of every oracle."""

    __slots__ = ()

    @property
    def H(self) -> Tensor:
        """(K, K), with blocks (B, K, K)."""
        return self.hessian

    @property
    def g(self) -> int:
        return self.group_size

    def block(self, b: int) -> "Case":
        """The rows of a block, with its H."""
        rows = slice(
            b * (len(self.codes) // len(self.H)), (b + 1) * (len(self.codes) // len(self.H))
        )
        tensors = (
            self.codes[rows],
            self.target[rows],
            self.H[b],
            self.scales[rows],
            self.zeros[rows],
        )
        return Case(*tensors, self.bits, self.g)

    def rows(self, index: Tensor) -> "Case":
        tensors = (
            self.codes[index],
            self.target[index],
            self.H,
            self.scales[index],
            self.zeros[index],
        )
        return Case(*tensors, self.bits, self.g)

    def loss(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Of each row, float64 (N,)."""
        found = grid.dequantize(
            codes, self.scales if scales is None else scales, self.zeros, self.g, torch.float64
        )
        return squared(found - self.target.double(), self.H.double())

    def slack(self) -> Tensor:
        """What rounding may add to a loss, (N,)."""
        start = grid.dequantize(self.codes, self.scales, self.zeros, self.g, torch.float64)
        return EXACT * (
            squared(self.target.double(), self.H.double()) + squared(start, self.H.double()) + 1e-30
        )


def squared(D: Tensor, H: Tensor) -> Tensor:
    metrics = (
        H.expand(len(D), *H.shape) if H.dim() == 2 else H.repeat_interleave(len(D) // len(H), 0)
    )
    return torch.einsum("ri,rij,rj->r", D, metrics, D)


def case(
    N: int = 3,
    K: int = 14,
    g: int = 4,
    bits: int = 2,
    symmetric: bool = False,
    B: int | None = None,
    seed: int = 0,
    dead: tuple[int, ...] = (),
    start: str = "nearest",
) -> Case:
    """Correlated inputs, clipped grids, and the nearest, random or lowest codes to start with."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = normal(B or 1, 2 * K, K) @ (
        torch.eye(K, dtype=torch.float64) + normal(B or 1, K, K) / K**0.5
    )
    X[..., list(dead)] = 0
    H = X.mT @ X / (2 * K)
    H.diagonal(dim1=1, dim2=2).add_(0.01 * H.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    W = normal(N, K)
    scales, zeros = grid.minmax(0.8 * W, bits, g, symmetric)
    codes = {
        "nearest": grid.quantize(W, scales, zeros, bits, g),
        "random": torch.randint(0, 2**bits, (N, K), generator=generator).to(torch.uint8),
        "lowest": torch.zeros(N, K, dtype=torch.uint8),
    }[start]
    return Case(codes, W, H if B else H[0], scales, zeros, bits, g)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any width, group size, number of blocks and of dead columns."""
    B, n, K = draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return case(
        N=n * (B or 1),
        K=K,
        g=draw(st.integers(1, K + 1)),
        bits=draw(st.integers(1, 8)),
        symmetric=draw(st.booleans()),
        B=B,
        seed=draw(st.integers(0, 2**16)),
        dead=tuple(draw(st.lists(st.integers(0, K - 1), max_size=3))),
        start=draw(st.sampled_from(["nearest", "random", "lowest"])),
    )
