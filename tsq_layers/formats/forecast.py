"""Build the contents of an export of a float model before it is quantised, without values."""

import warnings

from torch import nn

from tsq_layers.calibration.preparation import inspect
from tsq_layers.config import QuantConfig
from tsq_layers.formats.contents import Layer, composite_around
from tsq_layers.layers import composite_of, kind_of


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
            inside = composite_around(model, name, _composite)
            layers.append(
                Layer(name, kind.replacement(module, matrix), matrix, inside or kind.name)
            )
    return layers


def _composite(module: nn.Module) -> str | None:
    composite = composite_of(module)
    return None if composite is None else composite.name
