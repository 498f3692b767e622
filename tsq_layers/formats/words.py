"""Words of foreign files to codes: the inverse of :mod:`tsq_layers.formats.bitstream`, and an older layout.

Shapes: R rows, C codes a row, W words a row.
"""

import torch
from torch import Tensor

from tsq_layers.errors import LayerError
from tsq_layers.formats.bitstream import WORD_BITS, word_count

__all__ = ["WORD_BITS", "padded_word_count", "unpack", "unpack_padded", "word_count"]


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes of a dense stream: code i of a row is the bits i·b … i·b + b − 1 of it, the lowest first.

    Args:
        words: int32 (R, W), W = ceil(C·b/32).
        bits: width of a code, 1 to 8.
        columns: C.

    Returns:
        uint8 (R, C).

    Raises:
        LayerError: words of another dtype or number.

    Example:
        >>> from tsq_layers.formats.bitstream import pack
        >>> codes = torch.arange(20, dtype=torch.uint8).unsqueeze(0) % 8
        >>> torch.equal(unpack(pack(codes, bits=3), bits=3, columns=20), codes)
        True
    """
    _check(words, word_count(columns, bits), f"{columns} codes of {bits} bits")
    starts_C = torch.arange(columns, device=words.device) * bits
    first_C, shift_C = starts_C // WORD_BITS, starts_C % WORD_BITS
    wide = words.to(torch.int64) & 0xFFFFFFFF
    low_RC = wide[:, first_C] >> shift_C
    # A code that reaches into the next word; where it does not, the shift moves that word's bits beyond the mask.
    next_C = (first_C + 1).clamp(max=words.shape[1] - 1)
    high_RC = wide[:, next_C] << (WORD_BITS - shift_C)
    return ((low_RC | high_RC) & ((1 << bits) - 1)).to(torch.uint8)


def unpack_padded(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes of words that hold floor(32/b) codes each and waste the bits that are left.

    Args:
        words: int32 (R, W), W = ceil(C / floor(32/b)).
        bits: width of a code, 1 to 8.
        columns: C.

    Returns:
        uint8 (R, C).

    Raises:
        LayerError: words of another dtype or number.

    Example:
        >>> unpack_padded(torch.tensor([[0b010_001, 0b111]], dtype=torch.int32), bits=3, columns=11)[0].tolist()
        [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 7]
    """
    _check(
        words,
        padded_word_count(columns, bits),
        f"{columns} codes of {bits} bits in words of their own",
    )
    shifts = torch.arange(WORD_BITS // bits, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1).narrow(1, 0, columns).to(torch.uint8)


def padded_word_count(columns: int, bits: int) -> int:
    """Words of a row of ``columns`` codes, floor(32/b) in each."""
    return -(-columns // (WORD_BITS // bits))


def _check(words: Tensor, count: int, what: str) -> None:
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != count:
        raise LayerError(
            f"words are {words.dtype} of shape {tuple(words.shape)}; {what} are int32 (R, {count})"
        )
