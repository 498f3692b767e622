"""The dense bit stream: golden words, and every width against a slow reader."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.exports import stream

from tsq_layers.errors import LayerError
from tsq_layers.formats import bitstream

GOLDEN = {  # of the codes i mod 2^b, i = 0 … 31
    2: ["e4e4e4e4"] * 2,
    3: ["88fac688", "c688fac6", "fac688fa"],
    4: ["76543210", "fedcba98"] * 2,
    8: [f"{4 * i + 3:02x}{4 * i + 2:02x}{4 * i + 1:02x}{4 * i:02x}" for i in range(8)],
}
SYMMETRIC = {
    2: ["aaaaaaaa"] * 2,
    3: ["24924924", "49249249", "92492492"],
    4: ["88888888"] * 4,
    8: ["80808080"] * 8,
}
SYMMETRIC_V1 = {
    2: ["55555555"] * 2,
    3: ["db6db6db", "b6db6db6", "6db6db6d"],
    4: ["77777777"] * 4,
    8: ["7f7f7f7f"] * 8,
}


def hexadecimal(words):
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.tolist()]


@pytest.mark.parametrize("bits", GOLDEN)
def test_words_are_the_golden_ones(bits):
    codes = (torch.arange(32) % 2**bits).to(torch.uint8).unsqueeze(0)
    assert hexadecimal(bitstream.pack(codes, bits)[0]) == GOLDEN[bits]


@pytest.mark.parametrize("bits", SYMMETRIC)
@pytest.mark.parametrize(
    ("less", "golden"), [(0, SYMMETRIC), (1, SYMMETRIC_V1)], ids=["version 2", "version 1"]
)
def test_zero_words_of_a_symmetric_grid_are_the_golden_ones(bits, less, golden):
    zeros = torch.full((1, 32), 2 ** (bits - 1) - less, dtype=torch.uint8)
    assert hexadecimal(bitstream.pack(zeros, bits)[0]) == golden[bits]


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 4), st.integers(0, 2**32))
def test_slow_reader_finds_the_codes(bits, columns, rows, seed):
    codes = torch.randint(
        2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    words = bitstream.pack(codes, bits)
    assert (
        words.shape
        == (rows, bitstream.word_count(columns, bits))
        == (rows, -(-columns * bits // 32))
    )
    assert [stream(row, bits, columns) for row in words.tolist()] == codes.tolist()


def test_slow_reader_sees_one_wrong_bit():
    codes = torch.randint(8, (1, 64), dtype=torch.uint8)
    words = bitstream.pack(codes, 3)
    words[0, 2] ^= 1 << 17
    assert stream(words[0].tolist(), 3, 64) != codes[0].tolist()


def test_unused_bits_are_zero():
    words = bitstream.pack(torch.full((1, 3), 7, dtype=torch.uint8), 3)
    assert hexadecimal(words[0]) == ["000001ff"]


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 3), 4, "codes are torch.float32"),
        (torch.zeros(3, dtype=torch.uint8), 4, r"shape \(3,\)"),
        (torch.zeros(1, 3, dtype=torch.uint8), 9, "bits=9: give 1 to 8"),
    ],
    ids=["dtype", "rank", "bits"],
)
def test_bad_codes_are_refused(codes, bits, message):
    with pytest.raises(LayerError, match=message):
        bitstream.pack(codes, bits)
