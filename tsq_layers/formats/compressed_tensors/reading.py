"""compressed-tensors checkpoints, as llm-compressor writes them: the formats "pack-quantized" and "int-quantized".

What a file holds is at the head of :mod:`tsq_layers.formats.compressed_tensors.writing`. Two older
layouts are read too: words that
waste their last bits where b does not divide 32, and zero points that are not packed. "int-quantized" files hold codes
of up to 8 bits as int8, from −2^(b−1) on.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tsq_layers.errors import CheckpointError
from tsq_layers.formats.files import TensorFiles
from tsq_layers.formats.packed import PackedLayer, check_order, group_size_of, refuse, weight_of
from tsq_layers.formats.words import padded_word_count, unpack, unpack_padded, word_count
from tsq_layers.numerics.weight import QuantizedWeight

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_FORMATS = ("pack-quantized", "int-quantized")


def layers(files: TensorFiles, config: Mapping[str, Any]) -> list[PackedLayer]:
    """The packed layers of a checkpoint.

    Args:
        files: its tensors.
        config: its ``quantization_config``.

    Raises:
        CheckpointError: another format than the two, or quantised inputs.
    """
    groups = config.get("config_groups") or {}
    for group in groups.values():
        form = group.get("format") or config.get("format")
        if form not in _FORMATS:
            raise CheckpointError(
                f"compressed-tensors format {form!r} is not known: {' and '.join(map(repr, _FORMATS))} are read"
            )
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(
                "the checkpoint quantises inputs of layers too, and only weights are read: "
                "quantise it with a scheme of weights alone"
            )
    ends = (".weight_packed", ".weight_scale")
    names = sorted(
        {key.removesuffix(end) for key in files.keys for end in ends if key.endswith(end)}
    )
    found = []
    for name in names:
        parts = _PARTS if f"{name}.weight_packed" in files.keys else (*_PARTS, "weight")
        keys = frozenset(f"{name}.{part}" for part in parts) & files.keys
        found.append(PackedLayer(name, keys, lambda name=name: _read(files, groups, name)))  # type: ignore[misc]
    return found


def _read(files: TensorFiles, groups: Mapping[str, Any], name: str) -> QuantizedWeight:
    scheme = _scheme(name, groups)
    if scheme.get("type", "int") != "int" or not 1 <= int(scheme["num_bits"]) <= 8:
        refuse(
            name,
            f"its weights are {scheme.get('type')}{scheme['num_bits']}, and integers of 1 to 8 bits are read",
        )
    bits, scales = int(scheme["num_bits"]), files.take(f"{name}.weight_scale")
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    codes = _codes(files, name, bits)
    rows, columns = codes.shape
    if scales.shape[0] != rows:
        scales = scales.expand(rows, -1)  # one scale for the whole matrix
    size = group_size_of(name, columns, scales.shape[1], scheme.get("group_size"))
    cure = "quantise it with actorder='static' or 'weight'"
    order = files.take(f"{name}.weight_g_idx") if f"{name}.weight_g_idx" in files.keys else None
    check_order(name, order, size, cure)
    return weight_of(codes, scales, _zeros(files, name, bits, scales), bits, size)


def _scheme(name: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a layer's weights: of the group that names it, or of that for all linear layers."""
    found: Mapping[str, Any] | None = None
    for group in groups.values():
        targets = group.get("targets", ())
        named = any(
            re.match(target[3:], name) if target.startswith("re:") else target == name
            for target in targets
        )
        if named or (
            found is None and any("." not in target and target[0].isupper() for target in targets)
        ):
            found = group.get("weights")
        if named:
            break
    if found is None:
        refuse(name, "no group of its quantization_config names it")
    return found


def _codes(files: TensorFiles, name: str, bits: int) -> Tensor:
    """Codes, uint8 (N, K)."""
    half = 1 << (bits - 1)
    if f"{name}.weight_packed" not in files.keys:
        return (files.take(f"{name}.weight").to(torch.int16) + half).to(torch.uint8)
    rows, columns = files.take(f"{name}.weight_shape").tolist()
    words = files.take(f"{name}.weight_packed")
    if words.shape[0] != rows:
        refuse(name, f"{words.shape[0]} rows of words are no matrix of {rows} rows")
    return _unpacked(name, words, bits, columns)


def _zeros(files: TensorFiles, name: str, bits: int, scales: Tensor) -> Tensor:
    """Zero points, uint8 (N, G); 2^(b−1) where none are stored."""
    half, rows = 1 << (bits - 1), scales.shape[0]
    if f"{name}.weight_zero_point" not in files.keys:
        return torch.full(scales.shape, half, dtype=torch.uint8)
    stored = files.take(f"{name}.weight_zero_point")
    if stored.dtype == torch.int32 and tuple(stored.shape) != tuple(scales.shape):
        return _unpacked(name, stored.T.contiguous(), bits, rows).T
    return (stored.reshape(rows, -1).to(torch.int16) + half).to(torch.uint8)


def _unpacked(name: str, words: Tensor, bits: int, columns: int) -> Tensor:
    if words.shape[1] == word_count(columns, bits):
        return unpack(words, bits, columns)
    if words.shape[1] != padded_word_count(columns, bits):
        refuse(name, f"{words.shape[1]} words are not {columns} codes of {bits} bits")
    return unpack_padded(words, bits, columns)
