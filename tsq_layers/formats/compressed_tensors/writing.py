"""compressed-tensors checkpoints, "pack-quantized": what transformers and vLLM load.

For a layer of N rows, K columns, G groups and b bits the file holds

* ``weight_packed``, int32 (N, ceil(K·b/32)): the codes, a dense stream along each row;
* ``weight_scale`` (N, G), and ``weight_shape``, int64: N and K;
* ``weight_zero_point``, int32 (ceil(N·b/32), G), of asymmetric layers only: a dense stream down each column;

so that ``weight[n, k] = weight_scale[n, g] · (code − zero)``. (Readers take 2^(b−1) off both, which
cancels.) Files of 3, 5, 6 and 7 bits need a reader of
June 2026 or later: earlier ones wasted the bits at
the end of each word. The metadata of the files names the packer.

Who serves what is in :data:`tsq_layers.formats.engines.SERVICES`: transformers serves symmetric layers, and
asymmetric ones if they are loaded with ``CompressedTensorsConfig(dequantize=True)``; vLLM on a CPU serves 4 bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tsq_layers.formats import bitstream
from tsq_layers.formats.contents import Contents, Layer
from tsq_layers.formats.floats import Stored
from tsq_layers.formats.limits import Limits, check, is_exact
from tsq_layers.numerics.packing import unpack
from tsq_layers.runtime.kernels import zero_points
from tsq_layers.runtime.linear import QuantLinear

LIMITS = Limits(format_name="compressed-tensors", bits=(1, 2, 3, 4, 5, 6, 7, 8))
_Scheme = tuple[int, int | None, bool]  # bits, group size, symmetric


def takes(layer: Layer) -> bool:
    """Loaders look for layers of the class ``Linear``."""
    return layer.kind == "Linear"


def check_contents(contents: Contents) -> None:
    """Refuse what the format cannot hold.

    Raises:
        ExportError: a layer's width or grids.
    """
    check(contents.held, LIMITS)


def tensors(contents: Contents) -> list[Stored]:
    """The packed tensors of every held layer."""
    found = []
    for name, layer in contents.held.items():
        rows, columns, bits = layer.out_features, layer.in_features, layer.bits
        groups, dtype = layer.scales.shape[1], scale_dtype(layer)
        words = (rows, bitstream.word_count(columns, bits))
        found += [
            Stored(f"{name}.weight_packed", torch.int32, words, _packed(layer)),
            Stored(f"{name}.weight_scale", dtype, (rows, groups), _scales(layer, dtype)),
            Stored(f"{name}.weight_shape", torch.int64, (2,), _shape(layer)),
        ]
        if not layer.symmetric:
            zero_words = (bitstream.word_count(rows, bits), groups)
            found.append(
                Stored(f"{name}.weight_zero_point", torch.int32, zero_words, _zero_points(layer))
            )
        found += [] if layer.bias is None else [Stored.of(f"{name}.bias", layer.bias)]
    return found


def description(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config``: one group of layers for each width, group size and symmetry."""
    schemes: dict[_Scheme, list[str]] = {}
    for name, layer in contents.held.items():
        schemes.setdefault(_scheme(layer), []).append(name)
    alone = len(schemes) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if alone else names,
            "weights": _arguments(scheme),
            "format": "pack-quantized",
        }
        for i, (scheme, names) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(contents.unquantised),
    }


def scale_dtype(layer: QuantLinear) -> torch.dtype:
    """In which the scales are written: that of the model, in which loaders keep them, unless it would round them."""
    return layer.dtype if is_exact(layer.scales, layer.dtype) else layer.scale_dtype


def _scheme(layer: QuantLinear) -> _Scheme:
    return (
        layer.bits,
        layer.group_size if layer.group_size < layer.in_features else None,
        layer.symmetric,
    )


def _arguments(scheme: _Scheme) -> dict[str, Any]:
    bits, group_size, symmetric = scheme
    grouped = (
        {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    )
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **grouped}


def _packed(layer: QuantLinear) -> Callable[[], Tensor]:
    return lambda: bitstream.pack(unpack(layer.words, layer.bits, layer.in_features), layer.bits)


def _scales(layer: QuantLinear, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: layer.scales.to(dtype)


def _shape(layer: QuantLinear) -> Callable[[], Tensor]:
    return lambda: torch.tensor([layer.out_features, layer.in_features], dtype=torch.int64)


def _zero_points(layer: QuantLinear) -> Callable[[], Tensor]:
    def zero_words() -> Tensor:
        zeros_NG = zero_points(layer.scales, layer.zero_words, layer.bits)
        return bitstream.pack(zeros_NG.T.contiguous(), layer.bits).T

    return zero_words
