"""Packed layers as blocks of GGUF: 32 entries of a row with one float16 scale, ``weight = scale · (code − 2^(b−1))``.

A group of several blocks repeats its scale. Shapes: N rows, K columns, G groups a row, B = K / 32 blocks a row.
"""

import torch
from torch import Tensor

from tsq_layers.formats.gguf.file import Q4_0, Q5_0, Q8_0, BlockType
from tsq_layers.numerics.packing import unpack
from tsq_layers.runtime.linear import QuantLinear

BLOCK = 32
TYPES: dict[int, BlockType] = {4: Q4_0, 5: Q5_0, 8: Q8_0}
"""By the width of a code."""


def blocks(layer: QuantLinear) -> Tensor:
    """The blocks of a symmetric layer of 4, 5 or 8 bits whose groups are multiples of 32 columns.

    Args:
        layer: its scales must be exact in float16.

    Returns:
        uint8 (N, B, bytes of a block), on the CPU.

    Example:
        >>> blocks(QuantLinear(64, 8, bits=5, group_size=32, symmetric=True)).shape
        torch.Size([8, 2, 22])
    """
    return pack(
        unpack(layer.words, layer.bits, layer.in_features).cpu(),
        layer.scales.cpu(),
        layer.bits,
        layer.group_size,
    )


def pack(codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes uint8 (N, K) and scales (N, G) as blocks, uint8 (N, B, bytes)."""
    rows, columns = codes.shape
    codes_NB32 = codes.view(rows, columns // BLOCK, BLOCK)
    group_of_block = torch.arange(columns // BLOCK) * BLOCK // group_size
    scales_NB1 = scales.to(torch.float16).index_select(1, group_of_block).unsqueeze(-1)
    parts = [scales_NB1.view(torch.uint8), *_PARTS[bits](codes_NB32)]
    return torch.cat(parts, dim=-1)


def _four(codes_NB32: Tensor) -> list[Tensor]:
    """Byte j holds the low four bits of entry j, and above them those of entry j + 16."""
    first, second = (codes_NB32 & 15).split(BLOCK // 2, dim=-1)
    return [first | second << 4]


def _five(codes_NB32: Tensor) -> list[Tensor]:
    """The highest bits of all entries, that of entry 0 lowest; then the others as for four bits."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    high_NB48 = (codes_NB32 >> 4).view(*codes_NB32.shape[:2], 4, 8)
    return [(high_NB48 * weights).sum(-1, dtype=torch.uint8), *_four(codes_NB32)]


def _eight(codes_NB32: Tensor) -> list[Tensor]:
    """Signed: the highest bit of ``code − 128`` in two's complement is the opposite of the code's."""
    return [codes_NB32 ^ 128]


_PARTS = {4: _four, 5: _five, 8: _eight}
