"""GPTQ checkpoints: what GPTQModel, transformers and vLLM load.

For a layer of N rows, K columns, G groups and b bits the file holds

* ``qweight``, int32 (K·b/32, N): the codes, a dense stream down each column;
* ``qzeros``, int32 (G, N·b/32): the zero points, a dense stream along each row;
* ``scales``, float16 (G, N), and ``g_idx``, int32 (K,): the group of each column;

so that ``weight[n, k] = scales[g, n] · (code − zero)``. Version 1 stores zero − 1 (kernels add 1),
version 2 (``"checkpoint_format": "gptq_v2"``) the zero point itself. In version 1 a zero point of 0
would wrap to 2^b − 1, and the 1 that kernels add to a whole word then carries into the next row's.

Who serves what is in :data:`tsq_layers.formats.engines.SERVICES`: transformers (with gptqmodel and optimum) and
GPTQModel serve 2, 3, 4 and 8 bits, symmetric and asymmetric; of version 1 GPTQModel serves
symmetric layers only. vLLM on a CPU serves version 1 with 4 bits, symmetric.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.config.versions import library_versions
from tsq_layers.errors import ExportError
from tsq_layers.formats import bitstream
from tsq_layers.formats.contents import Contents, Layer
from tsq_layers.formats.floats import Stored
from tsq_layers.formats.limits import Limits, check, described
from tsq_layers.numerics.packing import unpack
from tsq_layers.runtime.kernels import zero_points
from tsq_layers.runtime.linear import QuantLinear

LIMITS = Limits(
    format_name="gptq",
    bits=(2, 3, 4, 8),
    columns=32,
    groups=(32, 64, 128, 256, 512, 1024),
    rows=32,
    scale_dtype=torch.float16,
)


def takes(layer: Layer) -> bool:
    """Loaders put packed layers into the numbered blocks of a model, nowhere else: not at its output."""
    in_a_block = any(part.isdecimal() for part in layer.name.split("."))
    return layer.kind in ("Linear", "Conv1D") and in_a_block


def check_contents(contents: Contents, version: int) -> None:
    """Refuse what the format cannot hold.

    Raises:
        ExportError: a layer's width or grids; layers that differ; zero points of 0 in version 1.
    """
    check(contents.held, LIMITS)
    first_name, first = _first_grouped(contents)
    for name, layer in contents.held.items():
        if layer.bits != first.bits or not _is_grouped_by(layer, _group_size(first)):
            raise ExportError(
                f"layer {first_name!r} has {described(first)} and {name!r} has {described(layer)}, "
                "and a gptq file holds one "
                "width and one group size: the nearest is a configuration without overrides, or "
                "format='compressed-tensors'"
            )
        planned = layer.words.is_meta  # then it has no zero points yet
        if (
            version == 1
            and not layer.symmetric
            and not planned
            and bool((_zeros(layer) == 0).any())
        ):
            raise ExportError(
                f"layer {name!r} has zero points of 0, which version 1 of gptq stores as −1: "
                "the nearest is format='gptq' (version 2), or QuantConfig(symmetric=True)"
            )
    _block_list(contents)


def tensors(contents: Contents, version: int) -> list[Stored]:
    """The packed tensors of every held layer."""
    found = []
    for name, layer in contents.held.items():
        rows, columns, bits = layer.out_features, layer.in_features, layer.bits
        groups = layer.scales.shape[1]
        words = (bitstream.word_count(columns, bits), rows)
        zero_words = (groups, bitstream.word_count(rows, bits))
        found += [
            Stored(f"{name}.qweight", torch.int32, words, _qweight(layer)),
            Stored(f"{name}.qzeros", torch.int32, zero_words, _qzeros(layer, version)),
            Stored(f"{name}.scales", torch.float16, (groups, rows), _scales(layer)),
            Stored(f"{name}.g_idx", torch.int32, (columns,), _group_of_column(layer)),
        ]
        found += [] if layer.bias is None else [Stored.of(f"{name}.bias", layer.bias)]
    return found


def description(contents: Contents, version: int) -> dict[str, Any]:
    """The ``quantization_config``."""
    _, first = _first_grouped(contents)
    values: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": first.bits,
        "group_size": _group_size(first) or -1,
        "sym": all(layer.symmetric for layer in contents.held.values()),
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": _block_list(contents),
        "meta": {"quantizer": [f"tsq_layers:{library_versions()['tsq_layers']}"]},
    }
    return values | _exceptions(contents)


def _exceptions(contents: Contents) -> dict[str, Any]:
    """Linear layers in the blocks that stay float: each loader has a key of its own that says which."""
    prefix = f"{_block_list(contents)}."
    left = [name for name in contents.unquantised if name.startswith(prefix)]
    if not left:
        return {}
    return {
        "modules_in_block_to_quantize": [list(contents.held)],  # transformers and vLLM
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in left},  # GPTQModel and vLLM
    }


def _block_list(contents: Contents) -> str:
    """The name of the list of blocks that all packed layers are in."""
    lists = {_list_around(contents.model, name): name for name in contents.held}
    if len(lists) > 1 or None in lists:
        named = " and ".join(map(repr, lists.values()))
        raise ExportError(
            f"layers {named} are in no or in different lists of blocks, and loaders of gptq files "
            "quantise one list of blocks: "
            "the nearest is format='compressed-tensors', or skip the layers of the other lists"
        )
    return str(next(iter(lists)))


def _list_around(model: nn.Module, name: str) -> str | None:
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[:end])
    return None


def _first_grouped(contents: Contents) -> tuple[str, QuantLinear]:
    """The first layer with several groups a row, whose group size is that of the file; or else the first layer."""
    layers = list(contents.held.items())
    return next(
        ((name, layer) for name, layer in layers if _group_size(layer) is not None), layers[0]
    )


def _group_size(layer: QuantLinear) -> int | None:
    """Columns of a group; ``None`` if a row is one group."""
    return layer.group_size if layer.group_size < layer.in_features else None


def _is_grouped_by(layer: QuantLinear, size: int | None) -> bool:
    """Return whether a layer has the groups that a loader expects who knows only its width and ``size``."""
    if size is None or size >= layer.in_features:
        return _group_size(layer) is None
    return layer.group_size == size


def _zeros(layer: QuantLinear) -> Tensor:
    return zero_points(layer.scales, layer.zero_words, layer.bits)


def _qweight(layer: QuantLinear) -> Callable[[], Tensor]:
    return lambda: bitstream.pack(unpack(layer.words, layer.bits, layer.in_features), layer.bits).T


def _qzeros(layer: QuantLinear, version: int) -> Callable[[], Tensor]:
    return lambda: bitstream.pack((_zeros(layer) - (2 - version)).T.contiguous(), layer.bits)


def _scales(layer: QuantLinear) -> Callable[[], Tensor]:
    return lambda: layer.scales.to(torch.float16).T


def _group_of_column(layer: QuantLinear) -> Callable[[], Tensor]:
    return lambda: torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
