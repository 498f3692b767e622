"""Read the packed layers of a directory, from ``tsq.json`` or the ``quantization_config`` of ``config.json``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tsq_layers.errors import CheckpointError, ConfigError
from tsq_layers.runtime.spec import LayerSpec

METHOD = "tsq"
"""What ``quant_method`` says in ``config.json``, and what ``--quantization`` takes."""


def layer_specs(values: Mapping[str, Any]) -> dict[str, LayerSpec] | None:
    """The packed layers by their dotted names; ``None`` if it does not say: ``tsq.json`` of the directory does.

    Args:
        values: the content of ``tsq.json``, with a specification for each name, or a ``quantization_config``, with
            a list of specifications that each have ``"names"``.

    Raises:
        CheckpointError: a layer with unknown, missing or ill-typed keys.

    Example:
        >>> spec = {"in_features": 64, "out_features": 8, "bits": 3, "group_size": 32, "symmetric": False,
        ...     "bias": False, "scale_dtype": "float16", "dtype": "float32"}
        >>> layer_specs({"layers": {"fc": spec}}) == layer_specs({"layers": [{**spec, "names": ["fc"]}]})
        True
        >>> layer_specs({"quant_method": "tsq"})
    """
    layers = values.get("layers")
    if layers is None:
        return None
    if isinstance(layers, Mapping):
        return {name: LayerSpec.from_dict(spec, name) for name, spec in layers.items()}
    if not isinstance(layers, list) or not all(
        isinstance(group, Mapping) and "names" in group for group in layers
    ):
        raise CheckpointError(
            "'layers' names no layers: the description is damaged; save the model again"
        )
    return {
        name: LayerSpec.from_dict(
            {key: value for key, value in group.items() if key != "names"}, name
        )
        for group in layers
        for name in group["names"]
    }


def foreign_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of tensors that stand in the file for other loaders only, and hold nothing.

    Example:
        >>> foreign_keys({"placeholders": ["fc.weight"]}), foreign_keys({})
        (('fc.weight',), ())
    """
    return tuple(values.get("placeholders", ()))


def parts_of(
    prefix: str, fused: Mapping[str, Sequence[str]], layers: Mapping[str, LayerSpec]
) -> list[str]:
    """The names in the file of what vLLM runs as the layer ``prefix``: several, where it fuses them.

    Args:
        prefix: vLLM's name, ``"model.layers.0.self_attn.qkv_proj"``.
        fused: last part of such a name → last parts of the names in the file (``packed_modules_mapping``).
        layers: of the file. A layer that the file holds as vLLM runs it is not taken apart.

    Example:
        >>> parts_of("model.0.qkv_proj", {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, {})
        ['model.0.q_proj', 'model.0.k_proj', 'model.0.v_proj']
    """
    root, dot, last = prefix.rpartition(".")
    if prefix in layers or last not in fused:
        return [prefix]
    return [root + dot + part for part in fused[last]]


def check_within(prefix: str, layers: Mapping[str, LayerSpec]) -> None:
    """Refuse packed layers inside a module that vLLM runs as a whole, with kernels of its own: experts.

    Raises:
        ConfigError: the first of them.
    """
    inside = [name for name in layers if name.startswith(f"{prefix}.")]
    if inside:
        raise ConfigError(
            f"layer {inside[0]!r} is quantised, but vLLM runs {prefix!r} as one: quantise with "
            f"skip=({prefix.rpartition('.')[2] + '.*'!r},)"
        )


def check_unclaimed(layers: Iterable[str], claimed: Iterable[str]) -> None:
    """Refuse packed layers that vLLM has not built as linear layers: embeddings, convolutions and the like.

    Raises:
        ConfigError: the first of them.

    Example:
        >>> check_unclaimed(["wte"], [])
        Traceback (most recent call last):
        tsq_layers.errors.ConfigError: layer 'wte' is quantised, but is no linear layer in vLLM's model: only \
linear layers are served packed; quantise with embeddings=False, or skip=('wte',)
    """
    names = set(claimed)
    for name in layers:
        if name not in names:
            pattern = re.sub(r"\b\d+\b", "*", name)
            raise ConfigError(
                f"layer {name!r} is quantised, but is no linear layer in vLLM's model: only linear "
                "layers are served packed; "
                f"quantise with embeddings=False, or skip=({pattern!r},)"
            )
