"""Codes ↔ the dense bit stream of GPTQ and compressed-tensors files: no bit wasted, no bit moved.

Code i of a row occupies the bits i·b … i·b + b − 1 of the row, the lowest bit first, and bit j of a
row is bit j mod 32 of word ⌊j/32⌋. So 32 codes of b bits are b words, and where b does not divide 32
a code may lie in two words. (Packed for running, codes lie elsewhere: see :mod:`tsq_layers.numerics.packing`.)

Shapes: R rows, C codes a row, W = ceil(C·b/32) words a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.errors import LayerError

WORD_BITS = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to words, along dim 1.

    Args:
        codes: uint8 (R, C), each in 0 … 2^bits − 1.
        bits: width of a code, 1 to 8.

    Returns:
        int32 (R, W); the bits behind the last code are 0.

    Raises:
        LayerError: codes of another dtype or rank, or ``bits`` out of range.

    Example:
        >>> words = pack(torch.arange(32, dtype=torch.uint8).unsqueeze(0) % 8, bits=3)
        >>> [f"{word & 0xffffffff:08x}" for word in words[0].tolist()]
        ['88fac688', 'c688fac6', 'fac688fa']
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise LayerError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}; give uint8 (R, C)"
        )
    if not 1 <= bits <= 8:
        raise LayerError(f"bits={bits}: give 1 to 8")
    rows, columns = codes.shape
    blocks_RB32 = F.pad(codes, (0, -columns % WORD_BITS)).view(rows, -1, WORD_BITS)
    words_RBb = torch.zeros(
        rows, blocks_RB32.shape[1], bits, dtype=torch.int32, device=codes.device
    )
    for i in range(WORD_BITS):
        word, offset = divmod(i * bits, WORD_BITS)
        code_RB = blocks_RB32.select(2, i).to(torch.int32)
        # The topmost code of a word reaches its sign bit: shifts of int32 are of the bits, so that is exact.
        words_RBb.select(2, word).bitwise_or_(code_RB << offset)
        if offset + bits > WORD_BITS:
            words_RBb.select(2, word + 1).bitwise_or_(code_RB >> (WORD_BITS - offset))
    return words_RBb.flatten(1).narrow(1, 0, word_count(columns, bits)).contiguous()


def word_count(columns: int, bits: int) -> int:
    """W, the words of a row of ``columns`` codes.

    Example:
        >>> word_count(64, 3), word_count(33, 3)
        (6, 4)
    """
    return -(-columns * bits // WORD_BITS)
