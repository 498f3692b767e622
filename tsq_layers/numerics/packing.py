"""Codes ↔ int32 words: any width from 1 to 8, no bit wasted but for the end of a row.

A width that divides 32 is one *plane*; the others are split into planes of 4, 2 and 1 bits
(3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1), the first holding the lowest bits of the code. The planes of
a row lie one after another along dim 1 of one buffer.

A plane of p bits has F = 32/p fields in a word and P = ceil(K/F) words in a row. Field j of a word
is its bits p·j … p·j + p − 1, and **field j of word i holds column j·P + i**: a row is cut into F
segments of P columns, and a word takes one column from each, ``"n (j i) -> n j i"``. Neighbouring
words therefore hold neighbouring columns of the same segment, so the lanes of a vector (the threads
of a warp) that take neighbouring words need neighbouring inputs, share their scale, and shift by the
same constant; and each word is loaded once, whichever field is read. Codes packed consecutively
along the row have none of this and run 10 to 40 times slower.

The segments are of columns, not of groups, because that is exact for every K: K = 576 in groups of
64 has 9 groups, which interleaving whole groups would fill up to 16.

Shapes: N rows, K columns, W words a row, F fields a word, P words a row of one plane.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from tsq_layers.errors import LayerError

WORD_BITS = 32
_PLANE_BITS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


class Plane(NamedTuple):
    """Some bits of every code of a row, and where they lie.

    Args:
        bits: p, bits of a field: 1, 2, 4 or 8.
        shift: place of these bits in the code: ``code = Σ field << shift`` over the planes.
        fields: F = 32 / p, fields of a word.
        words: P = ceil(K / F), words of a row; also the columns of a segment.
        start: first word of the plane in the row.
    """

    bits: int
    shift: int
    fields: int
    words: int
    start: int

    @property
    def mask(self) -> int:
        """The bits of a field, at the bottom of a word."""
        return (1 << self.bits) - 1

    def segment(self, field: int, columns: int) -> tuple[int, int]:
        """First column and number of columns in ``field`` of the plane's words; fewer at a row's end."""
        first = min(field * self.words, columns)
        return first, min(self.words, columns - first)


def planes(columns: int, bits: int) -> tuple[Plane, ...]:
    """How a row of ``columns`` codes of ``bits`` bits is laid out.

    Raises:
        LayerError: ``bits`` is not 1 to 8, or ``columns`` is negative.

    Example:
        >>> planes(64, 3)
        (Plane(bits=2, shift=0, fields=16, words=4, start=0), Plane(bits=1, shift=2, fields=32, words=2, start=4))
    """
    if bits not in _PLANE_BITS:
        raise LayerError(f"bits={bits}: give 1 to 8")
    if columns < 0:
        raise LayerError(f"columns={columns}: give the width of a row")
    result: list[Plane] = []
    shift = start = 0
    for plane_bits in _PLANE_BITS[bits]:
        fields = WORD_BITS // plane_bits
        words = -(-columns // fields)
        result.append(Plane(plane_bits, shift, fields, words, start))
        shift, start = shift + plane_bits, start + words
    return tuple(result)


def word_count(columns: int, bits: int) -> int:
    """W, the words of a row: at most 31 bits more than ``columns · bits`` for each plane.

    Example:
        >>> word_count(4096, 3), word_count(5, 4)
        (384, 1)
    """
    last = planes(columns, bits)[-1]
    return last.start + last.words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to words, exactly and without reading a value on the host.

    Args:
        codes: uint8 (N, K), each in 0 … 2^bits − 1; higher bits are not stored.
        bits: width of a code, 1 to 8.

    Returns:
        int32 (N, W) on the same device, W = :func:`word_count`; unused fields are 0.

    Raises:
        LayerError: codes of another dtype or rank, or ``bits`` out of range.

    Example:
        >>> words = pack(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8), bits=4)
        >>> [f"{word:08x}" for word in words[0].tolist()]
        ['00054321']
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise LayerError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}; give uint8 (N, K)"
        )
    rows, columns = codes.shape
    words_NW = torch.zeros(rows, word_count(columns, bits), dtype=torch.int32, device=codes.device)
    for plane in planes(columns, bits):
        for field in range(plane.fields):
            first, length = plane.segment(field, columns)
            part = (codes.narrow(1, first, length) >> plane.shift) & plane.mask
            # The top field reaches the sign bit: shifts of int32 are of the bits, so that is exact.
            words_NW.narrow(1, plane.start, length).bitwise_or_(
                part.to(torch.int32) << (plane.bits * field)
            )
    return words_NW


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        words: int32 (N, W).
        bits: width of a code, 1 to 8.
        columns: K.

    Returns:
        uint8 (N, K) on the same device.

    Raises:
        LayerError: words of another dtype or width than K codes of ``bits`` bits have.

    Example:
        >>> codes = torch.tensor([[7, 0, 5]], dtype=torch.uint8)
        >>> unpack(pack(codes, bits=3), bits=3, columns=3)
        tensor([[7, 0, 5]], dtype=torch.uint8)
    """
    check_words(words, bits, columns)
    parts = [_unpack_plane(words, plane, columns) for plane in planes(columns, bits)]
    return parts[0] if len(parts) == 1 else reduce(torch.bitwise_or, parts)


def check_words(words: Tensor, bits: int, columns: int) -> None:
    """Refuse what :func:`pack` does not make of K codes of ``bits`` bits."""
    expected = word_count(columns, bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
        raise LayerError(
            f"words are {words.dtype} of shape {tuple(words.shape)}; {columns} codes of {bits} bits need int32 (N, {expected})"
        )


def _unpack_plane(words_NW: Tensor, plane: Plane, columns: int) -> Tensor:
    """The plane's bits of every code, at their place in the code, uint8 (N, K)."""
    # Whole words are shifted by bytes only, bytes by fields: without a compiler a word for each code would be 4 bytes of it.
    device = words_NW.device
    words_N1P = words_NW.narrow(1, plane.start, plane.words).unsqueeze(1)
    byte_41 = torch.arange(0, WORD_BITS, 8, dtype=torch.int32, device=device).unsqueeze(1)
    field_f1 = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=device).unsqueeze(1)
    bytes_N41P = (words_N1P >> byte_41).to(torch.uint8).unsqueeze(2)
    fields_N4fP = (bytes_N41P >> field_f1).bitwise_and_(plane.mask)
    return fields_N4fP.flatten(1).narrow(1, 0, columns) << plane.shift


def field_of(words: Tensor, plane: Plane, field: int) -> Tensor:
    """One field of each word, at its place in the code: int32 of the same shape."""
    # A negative word shifts ones in from the left; the mask removes them.
    low = (words >> (plane.bits * field) if field else words) & plane.mask
    return low << plane.shift if plane.shift else low
