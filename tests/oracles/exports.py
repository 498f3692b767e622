"""Slow readers of the formats of other engines, written from their descriptions, on Python integers.

They share no code with the library, nor with those engines.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def stream(words: Sequence[int], bits: int, count: int) -> list[int]:
    """The codes of a dense bit stream: code i occupies the bits i·b … i·b + b − 1, counted from the
    lowest of word 0.
    """
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(whole >> (i * bits)) & ((1 << bits) - 1) for i in range(count)]


def gptq_weight(tensors: Mapping[str, Tensor], name: str, bits: int, version: int) -> Tensor:
    """float64 (N, K) of a layer in a GPTQ file: scale · (code − zero); version 1 stores zero − 1."""
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    scales, groups = tensors[f"{name}.scales"].double(), tensors[f"{name}.g_idx"].tolist()
    columns, rows = len(groups), qweight.shape[1]
    zeros = [stream(line, bits, rows) for line in qzeros.tolist()]
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for n in range(rows):
        codes = stream(qweight[:, n].tolist(), bits, columns)
        for k, (code, g) in enumerate(zip(codes, groups, strict=True)):
            zero = zeros[g][n] + (1 if version == 1 else 0)
            weight[n, k] = scales[g, n] * (code - zero)
    return weight


def compressed_weight(
    tensors: Mapping[str, Tensor], name: str, bits: int, group_size: int | None
) -> Tensor:
    """float64 (N, K) of a layer in a compressed-tensors file: scale · (signed code − signed zero)."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scales, half = tensors[f"{name}.weight_scale"].double(), 2 ** (bits - 1)
    packed_zeros = tensors.get(f"{name}.weight_zero_point")
    groups = scales.shape[1]
    zeros = [[0] * groups for _ in range(rows)]
    if packed_zeros is not None:
        by_group = [stream(packed_zeros[:, g].tolist(), bits, rows) for g in range(groups)]
        zeros = [[by_group[g][n] - half for g in range(groups)] for n in range(rows)]
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for n in range(rows):
        codes = stream(tensors[f"{name}.weight_packed"][n].tolist(), bits, columns)
        for k, code in enumerate(codes):
            g = k // (group_size or columns)
            weight[n, k] = scales[n, g] * (code - half - zeros[n][g])
    return weight


def gguf_row(content: bytes, bits: int) -> list[float]:
    """A row of blocks Q4_0, Q5_0 or Q8_0, of 18, 22 or 34 bytes: a float16 scale, then 32 codes."""
    size = {4: 18, 5: 22, 8: 34}[bits]
    row: list[float] = []
    for start in range(0, len(content), size):
        block = content[start : start + size]
        scale = float(torch.tensor(list(block[:2]), dtype=torch.uint8).view(torch.float16))
        if bits == 8:
            row += [scale * (byte - 256 if byte > 127 else byte) for byte in block[2:]]
            continue
        high = int.from_bytes(block[2:6], "little") if bits == 5 else 0
        nibbles = block[-16:]
        low = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
        row += [
            scale * ((code | (high >> j & 1) << 4) - 2 ** (bits - 1)) for j, code in enumerate(low)
        ]
    return row
