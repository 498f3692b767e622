"""Packing: identity at every width and ragged size, exact size, and a format that cannot change by accident."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tsq_layers.errors import LayerError
from tsq_layers.numerics import packing

WIDTHS = range(1, 9)

# Codes (k²//3 + 5·row) mod 2^bits of 40 columns k, rows 1 and 2.
GOLDEN = {
    1: (
        "00049249 0006db6d",
        "000b6db6 00092492",
    ),
    2: (
        "01111111 01999999 02666666",
        "06666666 02eeeeee 03bbbbbb",
    ),
    3: (
        "01111111 01999999 02666666 000e38e3 0006db6d",
        "06666666 02eeeeee 03bbbbbb 0001c71c 00092492",
    ),
    4: (
        "d15a06d5 5568ad15 da865556 60a51da8 06d5d60a",
        "26af5b2a aabdf26a 2fdbaaab b5fa62fd 5b2a2b5f",
    ),
    5: (
        "d15a06d5 5568ad15 da865556 60a51da8 06d5d60a 00058358 00037ec8",
        "26af5b2a aabdf26a 2fdbaaab b5fa62fd 5b2a2b5f 00058358 00053cac",
    ),
    6: (
        "d15a06d5 5568ad15 da865556 60a51da8 06d5d60a 03fc7790 0001b790 0256c890",
        "26af5b2a aabdf26a 2fdbaaab b5fa62fd 5b2a2b5f 03fc7790 01018490 029ac8d4",
    ),
    7: (
        "d15a06d5 5568ad15 da865556 60a51da8 06d5d60a 03fc7790 0001b790 0256c890 00093380 0005b380",
        "26af5b2a aabdf26a 2fdbaaab b5fa62fd 5b2a2b5f 03fc7790 01018490 029ac8d4 00093380 0005b1c0",
    ),
    8: (
        "318a2605 45982d05 5aa63506 70b53d08 86c5460a 9dd5500d b5e65a11 cdf86515 e60a711a 001d7d20",
        "368f2b0a 4a9d320a 5fab3a0b 75ba420d 8bca4b0f a2da5512 baeb5f16 d2fd6a1a eb0f761f 05228225",
    ),
}


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def packed_slowly(codes: list[int], bits: int) -> list[int]:
    """The words of one row, bit by bit from the definition."""
    result: list[int] = []
    below = 0
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
        fields = 32 // width
        length = (len(codes) + fields - 1) // fields
        words = [0] * length
        for column, code in enumerate(codes):
            for bit in range(width):
                if code & (1 << (below + bit)):
                    words[column % length] |= 1 << (column // length * width + bit)
        result += [word - 2**32 if word >= 2**31 else word for word in words]
        below += width
    return result


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 3),
    columns=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_unpacking_is_the_inverse_of_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = packing.pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packing.word_count(columns, bits))
    assert torch.equal(packing.unpack(words, bits, columns), codes)


@settings(deadline=None, max_examples=30)
@given(bits=st.integers(1, 8), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_words_are_those_of_the_slow_packer(bits: int, columns: int, seed: int) -> None:
    codes = random_codes(2, columns, bits, seed)
    expected = [packed_slowly(row, bits) for row in codes.tolist()]
    assert packing.pack(codes, bits).tolist() == expected
    codes[0, 0] ^= 1
    assert packing.pack(codes, bits).tolist() != expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_the_golden_ones(bits: int) -> None:
    column = torch.arange(40)
    codes = torch.stack([(column * column // 3 + 5 * row) % 2**bits for row in (1, 2)]).to(
        torch.uint8
    )
    words = [
        " ".join(f"{word & 0xFFFFFFFF:08x}" for word in row)
        for row in packing.pack(codes, bits).tolist()
    ]
    assert words == list(GOLDEN[bits])


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_ones_survive_the_sign_bit(bits: int) -> None:
    codes = torch.full((2, 64), 2**bits - 1, dtype=torch.uint8)
    words = packing.pack(codes, bits)
    assert torch.equal(words, torch.full_like(words, -1))
    assert torch.equal(packing.unpack(words, bits, 64), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_size_is_exact_but_for_the_end_of_a_row(bits: int) -> None:
    for columns in range(1, 200):
        planes = packing.planes(columns, bits)
        assert sum(plane.bits for plane in planes) == bits
        assert (
            columns * bits
            <= 32 * packing.word_count(columns, bits)
            <= columns * bits
            + sum(32 - plane.bits + plane.bits * (plane.words - 1) for plane in planes)
        )
    assert packing.word_count(4096, bits) * 32 == 4096 * bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_its_argument_alone_and_takes_views(bits: int) -> None:
    codes = random_codes(37, 6, bits)
    before = codes.clone()
    assert torch.equal(packing.pack(codes.T, bits), packing.pack(codes.T.contiguous(), bits))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_nothing_leaves_the_device(bits: int) -> None:
    with FakeTensorMode():
        codes = torch.empty(4, 37, dtype=torch.uint8, device="cuda")
        words = packing.pack(codes, bits)
        unpacked = packing.unpack(words, bits, 37)
    assert words.device.type == unpacked.device.type == "cuda"
    assert unpacked.shape == (4, 37)
    assert packing.pack(torch.empty(4, 37, dtype=torch.uint8, device="meta"), bits).is_meta


def test_errors_name_what_was_given() -> None:
    with pytest.raises(LayerError, match=r"bits=9: give 1 to 8"):
        packing.word_count(64, 9)
    with pytest.raises(LayerError, match=r"columns=-1"):
        packing.planes(-1, 4)
    with pytest.raises(LayerError, match=r"codes are torch.int64 of shape \(2, 3\); give uint8"):
        packing.pack(torch.zeros(2, 3, dtype=torch.int64), 4)
    with pytest.raises(
        LayerError,
        match=r"words are torch.int32 of shape \(2, 3\); 64 codes of 4 bits need int32 \(N, 8\)",
    ):
        packing.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 64)
