"""A model whose tensors have no values for a while."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class StandIns:
    """Tensors without values in the place of others, which share memory with one another as these do.

    Args:
        fake: of the stand-ins.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}

    def put(self, model: nn.Module) -> None:
        """Replace all parameters and buffers of a model.

        Inside of :func:`tsq_layers.passes.pass_state.restored` only.

        Buffers of integers or truth values that have values are copied: a model may read them, and write to them.
        What TorchScript has compiled keeps its tensors, which are not in dictionaries of Python.
        """
        for module in model.modules():
            if not isinstance(module._parameters, dict):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = self._parameter(parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.of(buffer)

    def of_all(self, values: Any) -> Any:
        """Nested values such as a batch, with every tensor among them replaced."""
        return pytree.tree_map_only(Tensor, self.of, values)

    def of(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor; a copy of integers with values, and special kinds of tensors themselves."""
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
            return tensor
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, self._made(tensor)
        return self._known[id(tensor)][1]

    def _parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if type(parameter) is not nn.Parameter:
            return parameter
        if id(parameter) not in self._known:
            stand_in = nn.Parameter(self._made(parameter), requires_grad=parameter.requires_grad)
            self._known[id(parameter)] = parameter, stand_in
        fake_parameter = self._known[id(parameter)][1]
        assert isinstance(fake_parameter, nn.Parameter)
        return fake_parameter

    def _made(self, tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta):
            return tensor.detach().clone()
        with self._fake, torch.no_grad():
            memory = self._whole(tensor)
            return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _whole(self, tensor: Tensor) -> Tensor:
        """A stand-in for the whole memory that a tensor is a part of; meta tensors are taken to be for the CPU."""
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.dtype
        if key not in self._memory:
            device = "cpu" if tensor.is_meta else tensor.device
            count = math.ceil(storage.nbytes() / tensor.element_size())
            self._memory[key] = torch.empty(count, dtype=tensor.dtype, device=device)
        return self._memory[key]
