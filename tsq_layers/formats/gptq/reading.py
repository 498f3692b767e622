"""GPTQ checkpoints, of GPTQModel, AutoGPTQ and others: versions 1 and 2.

What a file holds is at the head of :mod:`tsq_layers.formats.gptq.writing`. Width, rows, columns and
groups of a layer follow from the
shapes of its tensors, so that files with layers of several widths are read too.

A zero point of 0 is stored as −1 in version 1. GPTQModel takes 1 off whole words of 2-, 4- and 8-bit fields, and the
borrow goes on into the next field; its files are read by adding 1 to whole words, which undoes that. In the files of
others (and in those of 3 bits) each field is by itself, modulo 2^b.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tsq_layers.errors import CheckpointError
from tsq_layers.formats.bitstream import pack
from tsq_layers.formats.files import TensorFiles
from tsq_layers.formats.packed import PackedLayer, check_order, group_size_of, refuse, weight_of
from tsq_layers.formats.words import WORD_BITS, unpack
from tsq_layers.numerics.weight import QuantizedWeight

BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 2}


def layers(files: TensorFiles, config: Mapping[str, Any]) -> list[PackedLayer]:
    """The packed layers of a checkpoint.

    Args:
        files: its tensors.
        config: its ``quantization_config``.

    Raises:
        CheckpointError: a version that is not known.
    """
    form = config.get("checkpoint_format")
    if form not in _VERSIONS:
        raise CheckpointError(
            f"checkpoint_format={form!r} is not known: files of 'gptq' and 'gptq_v2' are read; save it as one of these"
        )
    pack_dtype = config.get("pack_dtype") or "int32"
    if pack_dtype != "int32":
        raise CheckpointError(
            f"pack_dtype={pack_dtype!r} is not known: words of 'int32' are read; save it with these"
        )
    names = sorted(key.removesuffix(".qweight") for key in files.keys if key.endswith(".qweight"))
    found = []
    for name in names:
        keys = frozenset(f"{name}.{part}" for part in _PARTS) & files.keys
        found.append(PackedLayer(name, keys, lambda name=name: _read(files, config, name)))  # type: ignore[misc]
    return found


def _read(files: TensorFiles, config: Mapping[str, Any], name: str) -> QuantizedWeight:
    qweight, scales = files.take(f"{name}.qweight"), files.take(f"{name}.scales")
    order = files.take(f"{name}.g_idx") if f"{name}.g_idx" in files.keys else None
    rows, groups = qweight.shape[1], scales.shape[0]
    bits, columns = _width(name, qweight, order, config)
    size = group_size_of(name, columns, groups, _group_size(name, config))
    cure = (
        "quantise it with desc_act=False, which GPTQModel does without loss by act_group_aware=True"
    )
    check_order(name, order, size, cure)
    if tuple(scales.shape) != (groups, rows):
        refuse(
            name, f"its scales are of shape {tuple(scales.shape)}, {(groups, rows)} was expected"
        )
    codes = unpack(qweight.T.contiguous(), bits, columns)
    zeros = _zeros(files.take(f"{name}.qzeros"), bits, rows, config)
    return weight_of(codes, scales.T, zeros.T, bits, size)


def _width(
    name: str, qweight: Tensor, order: Tensor | None, config: Mapping[str, Any]
) -> tuple[int, int]:
    """Bits and columns; the columns of ``g_idx`` tell both, where there is one."""
    bits = _override(name, config).get("bits", config.get("bits"))
    if order is not None:
        bits = qweight.shape[0] * WORD_BITS / order.numel()
    if bits not in BITS:
        refuse(name, f"{bits} bits are not known in this format, {', '.join(map(str, BITS))} are")
    return int(bits), qweight.shape[0] * WORD_BITS // int(bits)


def _group_size(name: str, config: Mapping[str, Any]) -> int | None:
    size: int | None = _override(name, config).get("group_size", config.get("group_size"))
    return size


def _override(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of one layer in GPTQModel's ``dynamic``."""
    for pattern, changes in (config.get("dynamic") or {}).items():
        if isinstance(changes, Mapping) and re.match(pattern.removeprefix("+:"), name):
            return changes
    return {}


def _zeros(words: Tensor, bits: int, rows: int, config: Mapping[str, Any]) -> Tensor:
    """Zero points, uint8 (G, N)."""
    if _VERSIONS[config.get("checkpoint_format")] == 2:
        return unpack(words, bits, rows)
    if bits != 3 and _is_gptqmodel(config):
        ones = pack(torch.ones(1, WORD_BITS // bits, dtype=torch.uint8), bits)
        return unpack(words + ones, bits, rows)
    return (unpack(words, bits, rows) + 1) & ((1 << bits) - 1)


def _is_gptqmodel(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta") or {}
    makers = meta.get("quantizer", ()) if isinstance(meta, Mapping) else ()
    makers = [makers] if isinstance(makers, str) else makers
    return any(str(maker).lower().startswith("gptqmodel") for maker in makers)
