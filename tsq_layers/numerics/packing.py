"""Pack codes of 1 to 8 bits into int32 words, and unpack them.

No bit is unused, except at the end of a row.

A code whose width divides 32 is one *plane*; other codes are split into planes of 4, 2 and 1 bits
(3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1), the first of which holds the lowest bits of the code. The
planes of a row lie one after another along dim 1 of one buffer.

A plane of p bits has F = 32/p fields in a word and P = ceil(K/F) words in a row. Field j of a word
is its bits p·j … p·j + p − 1, and **field j of word i holds column j·P + i**: a row is cut into F
segments of P columns, and a word takes one column of each, ``"n (j i) -> n j i"``. Neighbouring
words therefore hold neighbouring columns of the same segment. The lanes of a vector (the threads of
a warp) that load neighbouring words need neighbouring inputs, share a scale, and shift by the same
constant; and each word is loaded once for all its fields. If codes were packed consecutively along
the row, none of this would hold, and kernels would run 10 to 40 times slower.

Segments are counted in columns, not in groups, because that fits every K: K = 576 in groups of 64
has 9 groups, which segments of whole groups would fill up to 16.

Shapes: N rows, K columns, W words of a row, F fields of a word, P words of a row of one plane.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tsq_layers.errors import LayerError

WORD_BITS = 32
_PLANE_BITS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


class Plane(NamedTuple):
    """The same bits of every code of a row, and their place in the words and in the codes.

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
        """A word whose lowest p bits are 1."""
        return (1 << self.bits) - 1

    def segment(self, field: int, columns: int) -> tuple[int, int]:
        """Return the first column that ``field`` of the plane's words holds, and the number of its columns.

        The last segments of a row may be short or empty.
        """
        first = min(field * self.words, columns)
        return first, min(self.words, columns - first)


def planes(columns: int, bits: int) -> tuple[Plane, ...]:
    """Return the planes of a row of ``columns`` codes of ``bits`` bits, in the order of the buffer.

    Raises:
        LayerError: ``bits`` is not 1 to 8, or ``columns`` is negative.

    Example:
        >>> for plane in planes(64, 3):
        ...     print(plane)
        Plane(bits=2, shift=0, fields=16, words=4, start=0)
        Plane(bits=1, shift=2, fields=32, words=2, start=4)
    """
    if bits not in _PLANE_BITS:
        raise LayerError(f"bits={bits}: give 1 to 8")
    if columns < 0:
        raise LayerError(f"columns={columns}: give the width of a row")
    result: list[Plane] = []
    shift = 0
    start = 0
    for plane_bits in _PLANE_BITS[bits]:
        fields = WORD_BITS // plane_bits
        words = -(-columns // fields)
        result.append(Plane(plane_bits, shift, fields, words, start))
        shift += plane_bits
        start += words
    return tuple(result)


def word_count(columns: int, bits: int) -> int:
    """Return W, the number of words of a row.

    Each plane takes at most 31 bits more than its codes need.

    Example:
        >>> word_count(4096, 3), word_count(5, 4)
        (384, 1)
    """
    last = planes(columns, bits)[-1]
    return last.start + last.words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into words, without copying a value to the host.

    Args:
        codes: uint8 (N, K), each in 0 … 2^bits − 1; higher bits are dropped.
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
            # The top field reaches the sign bit. Shifts of int32 move bits, so that is exact.
            fields = part.to(torch.int32) << (plane.bits * field)
            words_NW.narrow(1, plane.start, length).bitwise_or_(fields)
    return words_NW


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack words into codes; the inverse of :func:`pack`.

    Args:
        words: int32 (N, W).
        bits: width of a code, 1 to 8.
        columns: K.

    Returns:
        uint8 (N, K) on the same device.

    Raises:
        LayerError: the dtype or the width of the words is not that of K codes of ``bits`` bits.

    Example:
        >>> codes = torch.tensor([[7, 0, 5]], dtype=torch.uint8)
        >>> unpack(pack(codes, bits=3), bits=3, columns=3)
        tensor([[7, 0, 5]], dtype=torch.uint8)
    """
    check_words(words, bits, columns)
    parts = [_unpack_plane(words, plane, columns) for plane in planes(columns, bits)]
    codes = parts[0]
    for part in parts[1:]:
        codes = torch.bitwise_or(codes, part)
    return codes


def check_words(words: Tensor, bits: int, columns: int) -> None:
    """Refuse words that do not look like the result of :func:`pack` for K codes of ``bits`` bits.

    Raises:
        LayerError: their dtype is not int32, or their shape not (N, W).
    """
    width = word_count(columns, bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != width:
        raise LayerError(
            f"words are {words.dtype} of shape {tuple(words.shape)}; "
            f"{columns} codes of {bits} bits need int32 (N, {width})"
        )


def _unpack_plane(words_NW: Tensor, plane: Plane, columns: int) -> Tensor:
    """Return the plane's bits of every code, at their place in the code, uint8 (N, K)."""
    # Words are first split into bytes, and bytes into fields. Shifting whole words for every code
    # would take 4 bytes a code where no compiler fuses the operations.
    device = words_NW.device
    words_N1P = words_NW.narrow(1, plane.start, plane.words).unsqueeze(1)
    byte_41 = torch.arange(0, WORD_BITS, 8, dtype=torch.int32, device=device).unsqueeze(1)
    field_f1 = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=device).unsqueeze(1)
    bytes_N41P = (words_N1P >> byte_41).to(torch.uint8).unsqueeze(2)
    fields_N4fP = (bytes_N41P >> field_f1).bitwise_and_(plane.mask)
    return fields_N4fP.flatten(1).narrow(1, 0, columns) << plane.shift


def field_of(words: Tensor, plane: Plane, field: int) -> Tensor:
    """Return one field of each word, at its place in the code, int32 of the same shape."""
    # A shift by 0 is left out: without a compiler it would be an operation of its own.
    word = words
    if field:
        word = words >> (plane.bits * field)
    # A negative word shifts ones in from the left; the mask removes them.
    bits = word & plane.mask
    if plane.shift:
        return bits << plane.shift
    return bits
