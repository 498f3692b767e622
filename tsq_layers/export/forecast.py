"""What an export of a float model will hold once it is quantised: its packed layers, without values."""

import warnings

from torch import nn

from tsq_layers.config import QuantConfig
from tsq_layers.export.contents import Layer
from tsq_layers.layers import composite_of, kind_of
from tsq_layers.preparation import inspect


def planned_layers(model: nn.Module, config: QuantConfig) -> list[Layer]:
    """Every layer of a float model that ``config`` quantises, as :func:`.contents.layers_of` will find it.

    Raises:
        StateError, ConfigError, LayerError: as ``prepare`` says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prepare gives them
        preparation = inspect(model, config)
    layers = []
    for target in preparation.targets.values():
        matrix = target.empty_matrix("meta")
        for name in (target.name, *target.tied):
            module = preparation.modules[name]
            kind = kind_of(module)
            assert kind is not None
            layers.append(Layer(name, kind.twin(module, matrix), matrix, _composite_around(model, name) or kind.name))
    return layers


def _composite_around(model: nn.Module, name: str) -> str | None:
    """The composite that a layer will be a part of."""
    module = model
    for part in name.split("."):
        composite = composite_of(module)
        if composite is not None:
            return composite.name
        module = module.get_submodule(part)
    return None
