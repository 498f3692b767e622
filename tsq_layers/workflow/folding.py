"""Fold the column scales of quantised layers into the normalisation before them: nothing is left to do at run time."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tsq_layers.config.patterns import matches
from tsq_layers.errors import ConfigError, LayerError
from tsq_layers.layers import packed
from tsq_layers.runtime.linear import QuantLinear

_READERS = "every layer that reads the norm's output must be named, and no other"


def fold_scaling(model: nn.Module, norms: Mapping[str, str]) -> nn.Module:
    """Divide the weight and bias of normalisations by the column scales of the layers that read them.

    The layers then have no scales of their own. What the model computes stays the same, up to rounding in
    the dtype of the norm. That holds only if the named layers are all that read the output of the norm,
    which this function cannot see; ``channel_scaling`` gives layers with one input one vector of scales,
    if their configurations are equal.

    Args:
        model: with quantised layers; changed in place.
        norms: pattern of quantised layers (as in :class:`~tsq_layers.QuantConfig`) → full name of the norm
            that they read: a module whose output is proportional to its ``weight`` (K,), plus its
            ``bias`` if it has one. Patterns with one norm belong together.

    Returns:
        the same model.

    Raises:
        ConfigError: a pattern that matches no quantised layer, or a name that is no module.
        LayerError: layers without scales or with different ones, or a module that is no such norm. Nothing
            is changed then.

    Example:
        >>> import tsq_layers as tsq
        >>> model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
        >>> config = tsq.QuantConfig(group_size=8, channel_scaling=True)
        >>> model = tsq.quantize(model, config, [torch.randn(300, 16)])
        >>> x = torch.randn(4, 16)
        >>> before = model(x)
        >>> _ = fold_scaling(model, {"1": "0"})
        >>> torch.allclose(model(x), before, atol=1e-5), model[1].basis
        (True, None)
    """
    readers = _readers(model, norms)
    scales = {name: _common_scaling(name, layers) for name, layers in readers.items()}
    for name, scaling in scales.items():
        _check_norm(name, model.get_submodule(name), scaling)
    for name, layers in readers.items():
        _divide(model.get_submodule(name), scales[name])
        for layer in layers.values():
            layer.drop_scaling()
    return model


def _readers(model: nn.Module, norms: Mapping[str, str]) -> dict[str, dict[str, QuantLinear]]:
    """Name of a norm → the layers that are said to read it, by name."""
    layers = {name: matrix for name, _, matrix in packed(model)}
    modules = dict(model.named_modules(remove_duplicate=False))
    layers_by_norm: dict[str, dict[str, QuantLinear]] = {}
    for pattern, norm in norms.items():
        matching = {name: layer for name, layer in layers.items() if matches(pattern, name)}
        if not matching:
            raise ConfigError(
                f"pattern {pattern!r} matches none of the {len(layers)} quantised layers; correct it"
            )
        if norm not in modules:
            raise ConfigError(
                f"{norm!r} is no module of this {type(model).__name__}; give the full name of a norm"
            )
        layers_by_norm.setdefault(norm, {}).update(matching)
    return layers_by_norm


def _common_scaling(norm: str, layers: Mapping[str, QuantLinear]) -> Tensor:
    first, scaling = "", None
    for name, layer in layers.items():
        own = layer.parts.scaling
        if own is None:
            raise LayerError(
                f"{name!r} has no column scales to fold into {norm!r}; quantise it with channel_scaling=True, or leave "
                f"it out if it does not read that norm: {_READERS}"
            )
        if scaling is not None and not (
            own.shape == scaling.shape and torch.equal(own.to(scaling.device), scaling)
        ):
            raise LayerError(
                f"{first!r} and {name!r} have different column scales, so that {norm!r} cannot hold those of both: "
                f"{_READERS}, and they need one input and one configuration"
            )
        first, scaling = first or name, own
    assert scaling is not None
    return scaling


def _check_norm(name: str, norm: nn.Module, scaling: Tensor) -> None:
    """See that a norm's output is divided if its weight and bias are, by trying it on some numbers."""
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    shapes = [tuple(values.shape) for values in (weight, bias) if values is not None]
    if weight is None or set(shapes) != {tuple(scaling.shape)} or not weight.is_floating_point():
        raise LayerError(
            f"{name!r} is a {type(norm).__name__} with parameters of shapes {shapes}; scales can be folded into a norm "
            f"with a weight of shape {tuple(scaling.shape)}, and a bias of that shape if it has one"
        )
    weights_before, training = (
        {key: value.data for key, value in norm._parameters.items() if value is not None},
        norm.training,
    )
    steps = torch.arange(4 * len(scaling), device=weight.device).view(4, -1)
    probe = torch.sin(steps.to(torch.float32) * 12.9898).to(weight.dtype)
    norm.eval()
    try:
        with torch.no_grad():
            scaled_output = norm(probe).to(torch.float32) / scaling.to(weight.device)
            _divide(norm, scaling)
            output = norm(probe).to(torch.float32)
    finally:
        for key, value in weights_before.items():
            norm._parameters[key].data = value  # type: ignore[union-attr]
        norm.train(training)
    tolerance = 8 * torch.finfo(weight.dtype).eps * scaled_output.abs().amax(0)
    if not bool(
        (
            (output - scaled_output).abs().amax(0) <= tolerance + torch.finfo(torch.float32).tiny
        ).all()
    ):
        raise LayerError(
            f"the output of {name!r}, a {type(norm).__name__}, is not proportional to its weight, "
            "so that scales cannot "
            "be folded into it; leave it out, and the layers scale their inputs themselves"
        )


def _divide(norm: nn.Module, scaling: Tensor) -> None:
    for values in norm._parameters.values():
        if values is not None:
            values.data = (values.detach().to(torch.float32) / scaling.to(values.device)).to(
                values.dtype
            )
