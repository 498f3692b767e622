"""Another basis of a layer's input, in which weights are easier to round: the layer stays the same function.

With an invertible T, W x = (W T⁻¹)(T x). In the new basis

    x' = T x        W' = W T⁻¹        H' = T H Tᵀ        R' = T R Tᵀ

so that no new calibration is needed. Here T = B S D⁻¹, each part optional:

D, a diagonal ("channel scaling", AWQ, arXiv 2306.00978, section 3.2): columns of large inputs get larger
weights, which the grids of a group serve better.

B S, a rotation (QuaRot, arXiv 2404.00456, section 3): S holds signs, B is block-diagonal of Hadamard
matrices in Sylvester's order, divided by √b to be orthonormal. It mixes columns, so that no single
weight or input stands out. What is left of K behind the last whole block is rotated in blocks of
smaller powers of two: any K is exact.

A Hadamard matrix is multiplied by as a dense matrix of at most 128 columns, larger ones as Kronecker
products of those: adding and subtracting halves in turn is 4 to 8 times slower on a CPU, and more
launches on a GPU.

Shapes: K columns, b columns of a block.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tsq_layers.errors import LayerError

_LARGEST = 128  # columns of a Hadamard matrix that is multiplied by as it is


@dataclass(frozen=True, eq=False)
class Basis:
    """T = B S D⁻¹ of K columns.

    Args:
        rotation: b, the largest block of B, a power of two; ``None`` if there is no rotation.
        signs: the diagonal of S, int8 (K,), each −1 or 1; ``None`` if there is no rotation.
        scaling: the diagonal of D, float32 (K,), each positive and finite; ``None`` if there is none.

    Raises:
        LayerError: neither part is there, or shapes or dtypes do not fit together.

    Example:
        >>> basis = Basis.rotated(24, 16)
        >>> x, weight = torch.randn(5, 24), torch.randn(3, 24)
        >>> torch.allclose(basis.apply(x) @ basis.change(weight).T, x @ weight.T, atol=1e-5)
        True
    """

    rotation: int | None = None
    signs: Tensor | None = None
    scaling: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.rotation is None) != (self.signs is None) or (
            self.signs is None and self.scaling is None
        ):
            raise LayerError("a basis needs rotation and signs, or scaling, or all three")
        if self.rotation is not None and (self.rotation < 1 or self.rotation & (self.rotation - 1)):
            raise LayerError(f"rotation={self.rotation}: give a power of two")
        for name, values, dtype in (
            ("signs", self.signs, torch.int8),
            ("scaling", self.scaling, torch.float32),
        ):
            if values is not None and (
                values.dtype != dtype or values.dim() != 1 or len(values) != self.columns
            ):
                raise LayerError(
                    f"{name} are {values.dtype} of shape {tuple(values.shape)}; give {dtype} (K,)"
                )

    @classmethod
    def rotated(cls, columns: int, block: int | None, device: torch.device | None = None) -> Self:
        """A rotation of ``columns`` columns by blocks of at most ``block``, with the signs that belong to it."""
        return cls(block, fixed_signs(columns, device))

    @property
    def columns(self) -> int:
        """K."""
        values = self.signs if self.signs is not None else self.scaling
        assert values is not None
        return values.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Inputs in the new basis, T x: (…, K) → (…, K), see :func:`apply`."""
        return apply(x, self.rotation, self.signs, self.scaling)

    def undo(self, x: Tensor) -> Tensor:
        """Inputs in the old basis, T⁻¹ x'; inverse of :meth:`apply`."""
        return _times(rotate(_wide(x), self.rotation), self.signs, self.scaling).to(x.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """A weight for inputs in the new basis, W T⁻¹: (N, K) → (N, K)."""
        return rotate(_times(_wide(weight), self.signs, self.scaling), self.rotation).to(
            weight.dtype
        )

    def restore(self, weight: Tensor) -> Tensor:
        """The weight W' T for inputs in the old basis; inverse of :meth:`change`."""
        return restore(weight, self.rotation, self.signs, self.scaling)

    def change_metric(self, sums: Tensor) -> Tensor:
        """Sums over tokens of products of two inputs, in the new basis: T H Tᵀ, (…, K, K) → (…, K, K)."""
        return self.apply(self.apply(sums).mT).mT

    def to(self, device: torch.device | str) -> "Basis":
        """The same on another device."""
        return Basis(
            self.rotation,
            *(None if v is None else v.to(device) for v in (self.signs, self.scaling)),
        )


def apply(x: Tensor, rotation: int | None, signs: Tensor | None, scaling: Tensor | None) -> Tensor:
    """T x for rows x (…, K), in at least float32 and rounded once to the dtype of ``x``; differentiable.

    Args:
        x: floating point.
        rotation: as in :class:`Basis`, as the others.

    Example:
        >>> apply(torch.tensor([2.0, 4.0]), None, None, torch.tensor([2.0, 1.0]))
        tensor([1., 4.])
    """
    values = _wide(x)
    values = values if scaling is None else values / scaling
    values = values if signs is None else values * signs
    return rotate(values, rotation).to(x.dtype)


def restore(
    weight: Tensor, rotation: int | None, signs: Tensor | None, scaling: Tensor | None
) -> Tensor:
    """W' T for a weight (N, K) in the new basis, in at least float32 and rounded once; see :class:`Basis`."""
    values = rotate(_wide(weight), rotation)
    values = values if signs is None else values * signs
    values = values if scaling is None else values / scaling
    return values.to(weight.dtype)


def rotate(values: Tensor, block: int | None) -> Tensor:
    """Multiply rows (…, K) by B, which is symmetric and its own inverse; ``None`` leaves them as they are.

    Example:
        >>> rotate(torch.tensor([1.0, 1.0, 5.0]), 2)
        tensor([1.4142, 0.0000, 5.0000])
    """
    if block is None:
        return values
    parts, start = [], 0
    with _no_autocast(values):
        for width, size in _spans(values.shape[-1], block):
            part = values.narrow(-1, start, width)
            parts.append(part if size == 1 else _walsh(part, size) * (1 / math.sqrt(size)))
            start += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def fixed_signs(columns: int, device: torch.device | None = None) -> Tensor:
    """Signs ±1 that look random and are the same in every process and on every device, int8 (K,).

    A rotated layer stores them: K bytes, and the file does not depend on how they were made.

    Example:
        >>> fixed_signs(6)
        tensor([ 1,  1, -1,  1, -1,  1], dtype=torch.int8)
    """
    mixed = (
        torch.arange(1, columns + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    )  # products wrap
    mixed = (mixed ^ (mixed >> 32)) * 0x2545F4914F6CDD1D
    return (1 - 2 * ((mixed >> 40) & 1)).to(torch.int8)


def _times(values: Tensor, signs: Tensor | None, scaling: Tensor | None) -> Tensor:
    values = values if signs is None else values * signs
    return values if scaling is None else values * scaling


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _spans(columns: int, block: int) -> Iterator[tuple[int, int]]:
    """Columns side by side, and the size of the blocks they are rotated in."""
    whole = columns - columns % block
    if whole:
        yield whole, block
    size = block // 2
    while size:
        if columns & size:
            yield size, size
        size //= 2


def _walsh(values: Tensor, size: int) -> Tensor:
    """Rows (…, n·size) times the Hadamard matrices of ``size`` columns, which hold only ±1.

    H_ab = H_a ⊗ H_b: a block as a matrix X of a rows becomes H_a X H_b.
    """
    inner = min(size, _LARGEST)
    split = values.unflatten(-1, (values.shape[-1] // inner, inner)) @ _hadamard(inner, values)
    if size > inner:
        outer = size // inner
        turned = split.unflatten(-2, (split.shape[-2] // outer, outer)).mT
        split = _walsh(turned, outer).mT.flatten(-3, -2)
    rotated: Tensor = split.flatten(-2)
    return rotated


_known: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's matrix, (−1)^(number of bits that i and j share); kept for tensors that have values."""
    plain = (
        type(like) in (Tensor, torch.nn.Parameter)
        and not like.is_meta
        and not is_in_torch_dispatch_mode()
    )
    if torch.compiler.is_compiling() or not plain or torch._C._are_functorch_transforms_active():
        return _sylvester(size, like.dtype, like.device)
    key = size, like.dtype, like.device
    if key not in _known:
        with torch.inference_mode(False), torch.no_grad():  # it may be saved for a gradient later
            _known[key] = _sylvester(size, like.dtype, like.device)
    return _known[key]


def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    shared = index.unsqueeze(1) & index
    for shift in (4, 2, 1):
        shared = shared ^ (shared >> shift)
    return (1 - 2 * (shared & 1)).to(dtype)


def _no_autocast(values: Tensor) -> AbstractContextManager[object]:
    kind = values.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
