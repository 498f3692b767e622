"""Define :class:`Basis`, a basis of a layer's inputs in which its weight is easier to round.

With an invertible matrix T, W x = (W T⁻¹)(T x): the layer remains the same function. In the new basis

    x' = T x        W' = W T⁻¹        H' = T H Tᵀ        R' = T R Tᵀ

so no new calibration is needed. T = B S D⁻¹ here, and each part is optional:

* D is a diagonal matrix ("channel scaling" of AWQ, arXiv 2306.00978, section 3.2). Columns of large
  inputs get larger weights, which the grid of their group represents more exactly.
* B S is a rotation (QuaRot, arXiv 2404.00456, section 3). S is a diagonal matrix of signs, and B is
  block-diagonal with Hadamard matrices in Sylvester's order, divided by √b to be orthonormal. It mixes
  columns, so that no single weight or input is an outlier. The K mod b columns behind the last whole
  block are rotated in blocks of smaller powers of two, so every K is allowed.

A Hadamard matrix of at most 128 columns is multiplied by as a dense matrix, a larger one as a
Kronecker product of two smaller ones. The fast Walsh-Hadamard transform, which adds and subtracts
halves in turn, is 4 to 8 times slower on a CPU and needs more launches on a GPU.

Shapes: N rows (output features), K columns (input features), b columns of a block. A leading "…" stands
for any axes over tokens.
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

_LARGEST = 128  # columns of the largest Hadamard matrix that is multiplied by as a dense matrix


@dataclass(frozen=True, eq=False)
class Basis:
    """The matrix T = B S D⁻¹ of K columns.

    Args:
        rotation: b, the size of the blocks of B, a power of two; ``None`` if there is no rotation.
        signs: the diagonal of S, int8 (K,), each −1 or 1; ``None`` if there is no rotation.
        scaling: the diagonal of D, float32 (K,), each positive and finite; ``None`` if D is the identity.

    Raises:
        LayerError: no part is given, or shapes or dtypes do not fit together.

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
        has_rotation = self.rotation is not None
        has_signs = self.signs is not None
        if has_rotation != has_signs or (not has_signs and self.scaling is None):
            raise LayerError("a basis needs rotation and signs, or scaling, or all three")
        if self.rotation is not None and not _is_power_of_two(self.rotation):
            raise LayerError(f"rotation={self.rotation}: give a power of two")
        self._check("signs", self.signs, torch.int8)
        self._check("scaling", self.scaling, torch.float32)

    def _check(self, name: str, values: Tensor | None, dtype: torch.dtype) -> None:
        if values is None:
            return
        if values.dtype != dtype or values.dim() != 1 or len(values) != self.columns:
            raise LayerError(
                f"{name} are {values.dtype} of shape {tuple(values.shape)}; give {dtype} (K,)"
            )

    @classmethod
    def rotated(cls, columns: int, block: int | None, device: torch.device | None = None) -> Self:
        """Return the rotation of ``columns`` columns in blocks of ``block``, with the signs of :func:`fixed_signs`."""
        return cls(block, fixed_signs(columns, device))

    @property
    def columns(self) -> int:
        """K, the number of input features."""
        values = self.signs if self.signs is not None else self.scaling
        assert values is not None
        return values.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Return inputs in the new basis, T x: (…, K) → (…, K); see :func:`apply`."""
        return apply(x, self.rotation, self.signs, self.scaling)

    def undo(self, x: Tensor) -> Tensor:
        """Return inputs in the old basis, T⁻¹ x': (…, K) → (…, K); the inverse of :meth:`apply`."""
        values = rotate(_at_least_float32(x), self.rotation)
        values = _multiply(values, self.signs, self.scaling)
        return values.to(x.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """Return the weight for inputs in the new basis, W T⁻¹: (N, K) → (N, K)."""
        values = _multiply(_at_least_float32(weight), self.signs, self.scaling)
        values = rotate(values, self.rotation)
        return values.to(weight.dtype)

    def restore(self, weight: Tensor) -> Tensor:
        """Return the weight for inputs in the old basis, W' T: (N, K) → (N, K); the inverse of :meth:`change`."""
        return restore(weight, self.rotation, self.signs, self.scaling)

    def change_metric(self, sums: Tensor) -> Tensor:
        """Return sums of products of two inputs, such as H, in the new basis: T H Tᵀ, (…, K, K) → (…, K, K)."""
        return self.apply(self.apply(sums).mT).mT

    def to(self, device: torch.device | str) -> "Basis":
        """Return the same basis on another device."""
        signs = None if self.signs is None else self.signs.to(device)
        scaling = None if self.scaling is None else self.scaling.to(device)
        return Basis(self.rotation, signs, scaling)


def apply(x: Tensor, rotation: int | None, signs: Tensor | None, scaling: Tensor | None) -> Tensor:
    """Return T x for rows x; differentiable.

    It is computed in float32 (float64 if ``x`` is) and rounded once.

    Args:
        x: floating point (…, K).
        rotation: as in :class:`Basis`.
        signs: as in :class:`Basis`.
        scaling: as in :class:`Basis`.

    Returns:
        (…, K) in the dtype of ``x``.

    Example:
        >>> apply(torch.tensor([2.0, 4.0]), None, None, torch.tensor([2.0, 1.0]))
        tensor([1., 4.])
    """
    values = _at_least_float32(x)
    if scaling is not None:
        values = values / scaling
    if signs is not None:
        values = values * signs
    return rotate(values, rotation).to(x.dtype)


def restore(
    weight: Tensor, rotation: int | None, signs: Tensor | None, scaling: Tensor | None
) -> Tensor:
    """Return the weight for inputs in the old basis, W' T, in the dtype of ``weight``.

    It is computed in float32 (float64 if ``weight`` is) and rounded once.

    Args:
        weight: W', floating point (N, K).
        rotation: as in :class:`Basis`.
        signs: as in :class:`Basis`.
        scaling: as in :class:`Basis`.
    """
    values = rotate(_at_least_float32(weight), rotation)
    if signs is not None:
        values = values * signs
    if scaling is not None:
        values = values / scaling
    return values.to(weight.dtype)


def rotate(values: Tensor, block: int | None) -> Tensor:
    """Multiply rows (…, K) by B, which is symmetric and its own inverse.

    Args:
        values: float32 or float64 (…, K).
        block: b, a power of two; ``None`` returns the rows unchanged.

    Example:
        >>> rotate(torch.tensor([1.0, 1.0, 5.0]), 2)
        tensor([1.4142, 0.0000, 5.0000])
    """
    if block is None:
        return values
    parts = []
    start = 0
    with _no_autocast(values):
        for width, size in _spans(values.shape[-1], block):
            part = values.narrow(-1, start, width)
            if size > 1:
                part = _walsh(part, size) * (1 / math.sqrt(size))
            parts.append(part)
            start += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def fixed_signs(columns: int, device: torch.device | None = None) -> Tensor:
    """Return signs ±1 that look random and are the same in every process and on every device, int8 (K,).

    A rotated layer stores its signs, which takes K bytes, so files do not depend on this function.

    Example:
        >>> fixed_signs(6)
        tensor([ 1,  1, -1,  1, -1,  1], dtype=torch.int8)
    """
    # A multiplicative hash of the column's number; products of int64 wrap.
    hashes = torch.arange(1, columns + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    hashes = (hashes ^ (hashes >> 32)) * 0x2545F4914F6CDD1D
    bits = (hashes >> 40) & 1
    return (1 - 2 * bits).to(torch.int8)


def _is_power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


def _multiply(values: Tensor, signs: Tensor | None, scaling: Tensor | None) -> Tensor:
    """Multiply rows (…, K) by the signs and the scaling, as far as there are any."""
    if signs is not None:
        values = values * signs
    if scaling is not None:
        values = values * scaling
    return values


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _spans(columns: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield the spans of columns that are rotated in blocks of one size: (number of columns, size of block)."""
    remainder = columns % block
    if columns > remainder:
        yield columns - remainder, block
    size = block // 2
    while size:
        if columns & size:
            yield size, size
        size //= 2


def _walsh(values: Tensor, size: int) -> Tensor:
    """Multiply rows (…, n·size) by n Hadamard matrices of ``size`` columns with entries ±1.

    H_ab = H_a ⊗ H_b: a block of a·b columns, as a matrix X of a rows, becomes H_a X H_b.
    """
    inner = min(size, _LARGEST)
    rows = values.unflatten(-1, (values.shape[-1] // inner, inner)) @ _hadamard(inner, values)
    if size > inner:
        outer = size // inner
        transposed = rows.unflatten(-2, (rows.shape[-2] // outer, outer)).mT
        rows = _walsh(transposed, outer).mT.flatten(-3, -2)
    product: Tensor = rows.flatten(-2)
    return product


_matrices: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _hadamard(size: int, like: Tensor) -> Tensor:
    """Return Sylvester's matrix (size, size) in the dtype and on the device of a tensor.

    Entry (i, j) is (−1)^(number of bits that i and j share). Matrices are cached, except where a
    cached one would be a fake tensor, a traced constant, or a tensor of a transform that has ended.
    """
    is_plain = type(like) in (Tensor, torch.nn.Parameter) and not like.is_meta
    if (
        not is_plain
        or torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
    ):
        return _sylvester(size, like.dtype, like.device)
    key = size, like.dtype, like.device
    if key not in _matrices:
        # Not an inference tensor: a later call may save the matrix for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            _matrices[key] = _sylvester(size, like.dtype, like.device)
    return _matrices[key]


def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    # The parity of the bits that row and column share; sizes are at most 128, so 7 bits are folded.
    parity = index.unsqueeze(1) & index
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).to(dtype)


def _no_autocast(values: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of a tensor: products must not be rounded to 16 bits."""
    device = values.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
