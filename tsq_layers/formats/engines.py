"""Name the engines that serve each kind of file, as measured.

Measured with transformers 5.23 (gptqmodel 7.7, optimum 2.3, compressed-tensors 0.19), GPTQModel
7.7, vLLM 0.32 on a CPU, and
llama.cpp as of cyllama 0.2.18.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from tsq_layers.errors import ExportError, ExportWarning
from tsq_layers.formats.limits import described
from tsq_layers.runtime.linear import QuantLinear


@dataclass(frozen=True, kw_only=True)
class Service:
    """The files of a format that an engine serves.

    Args:
        symmetric: widths of symmetric layers.
        asymmetric: widths of asymmetric layers.
        how: what is needed, or what can be done about the rest.
    """

    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...] = ()
    how: str = ""


_GPTQ = (2, 3, 4, 8)
SERVICES: Mapping[str, Mapping[str, Service]] = {
    "transformers": {
        "gptq": Service(symmetric=_GPTQ, asymmetric=_GPTQ),
        "gptq-v1": Service(symmetric=_GPTQ, asymmetric=_GPTQ),
        "compressed-tensors": Service(
            symmetric=(2, 3, 4, 5, 8),
            how=(
                "from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True)) "
                "loads asymmetric layers"
            ),
        ),
        "gguf": Service(symmetric=(4, 5, 8)),
    },
    "gptqmodel": {
        "gptq": Service(symmetric=_GPTQ, asymmetric=_GPTQ),
        "gptq-v1": Service(symmetric=_GPTQ, how="format='gptq' is served"),
    },
    "vllm": {
        "gptq-v1": Service(
            symmetric=(4,), how="format='compressed-tensors' is served with 4 bits, asymmetric too"
        ),
        "compressed-tensors": Service(symmetric=(4,), asymmetric=(4,)),
    },
    "llama.cpp": {"gguf": Service(symmetric=(4, 5, 8))},
}
"""Engine → format → what it serves."""


def check_engine(engine: str) -> None:
    """Refuse an engine of which nothing is known.

    Raises:
        ExportError: its name, and those that are known.
    """
    if engine not in SERVICES:
        raise ExportError(
            f"engine={engine!r}: give one of {', '.join(map(repr, SERVICES))}, or None"
        )


def warn_unserved(engine: str, format_name: str, layers: Mapping[str, QuantLinear]) -> None:
    """Say so if an engine cannot serve what is going to be written.

    Warns:
        ExportWarning: the first layer that it cannot serve, and what it serves.
    """
    reason = unserved(engine, format_name, layers)
    if reason is not None:
        warnings.warn(reason, ExportWarning, stacklevel=4)


def unserved(engine: str, format_name: str, layers: Mapping[str, QuantLinear]) -> str | None:
    """Return why an engine cannot serve a file; ``None`` if it can.

    Example:
        >>> layer = QuantLinear(64, 32, bits=3, group_size=32, symmetric=True)
        >>> unserved("vllm", "gptq-v1", {"up": layer})  # doctest: +NORMALIZE_WHITESPACE
        "vllm cannot serve layer 'up' with 3 bits, symmetric, groups of 32: of gptq-v1 files it
        serves 4 bits symmetric; format='compressed-tensors' is served with 4 bits, asymmetric too"
    """
    known = SERVICES[engine]
    if format_name not in known:
        return f"{engine} does not serve {format_name} files: it serves {', '.join(known)}"
    service = known[format_name]
    for name, layer in layers.items():
        if layer.bits not in (service.symmetric if layer.symmetric else service.asymmetric):
            how = f"; {service.how}" if service.how else ""
            return (
                f"{engine} cannot serve layer {name!r} with {described(layer)}: of {format_name} files "
                f"it serves {_served(service)}{how}"
            )
    return None


def _served(service: Service) -> str:
    parts = [
        f"{', '.join(map(str, bits))} bits {symmetry}"
        for bits, symmetry in ((service.symmetric, "symmetric"), (service.asymmetric, "asymmetric"))
        if bits
    ]
    return " and ".join(parts)
