"""Assemble the matrices of a layer of vLLM: one, or several beside each other.

vLLM fuses layers that share their input (q, k and v; gate and up). Neighbours of the same form and basis
are stacked, which is exact: rows of packed buffers are rows of the weight. Others (another width, group
size, or full precision) run one by one, and their outputs are put side by side.

In a graph that ``torch.compile`` makes of the whole model a matrix is one opaque operation, as the
best way to run it depends on the number of rows of input, which such a graph leaves open.

Shapes: N outputs, K inputs.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsq_layers.errors import CheckpointError
from tsq_layers.integrations.vllm.sharding import Cut, part, share_of
from tsq_layers.numerics.memory import dtype_name, dtype_of
from tsq_layers.numerics.weight import BufferSpec, WeightFormat
from tsq_layers.runtime import forward as running
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.parts import Parts
from tsq_layers.runtime.spec import LayerSpec


class Share(NamedTuple):
    """The share of a layer that this process runs.

    Args:
        name: of the layer.
        spec: of the share; ``None`` in full precision.
        tensors: its buffers by name.
    """

    name: str
    spec: LayerSpec | None
    tensors: dict[str, Tensor]


class Intake:
    """Takes the buffers of a layer one by one, as they are read, and keeps this process' share of each.

    Args:
        name: of the layer in the file.
        spec: of the whole layer; ``None`` in full precision.
        shape: (N, K) that vLLM expects of the whole layer.
        cut: what this process runs of it.

    Raises:
        CheckpointError: the layer has another shape than vLLM expects.
        ConfigError: it cannot be cut so.

    Example:
        >>> intake = Intake("fc", None, (2, 3), Cut())
        >>> intake.take("weight", torch.ones(2, 3))
        >>> intake.share().tensors["weight"].shape
        torch.Size([2, 3])
    """

    def __init__(self, name: str, spec: LayerSpec | None, shape: tuple[int, int], cut: Cut) -> None:
        self.name, self.spec, self.cut = name, spec, cut
        if spec is not None and (spec.out_features, spec.in_features) != shape:
            raise CheckpointError(
                f"layer {name!r} is {spec.out_features}×{spec.in_features} in the file, and vLLM "
                f"expects {shape[0]}×{shape[1]}: config.json and tsq.json do not belong together"
            )
        self.share_spec = None if spec is None else share_of(name, spec, cut)
        self.expected: Mapping[str, BufferSpec] = {
            "weight": BufferSpec(shape=shape, dtype=torch.float32, axes=("rows", "columns"))
        }
        if spec is not None:
            self.expected = spec.buffers()
        self._tensors: dict[str, Tensor] = {}

    def take(self, key: str, tensor: Tensor) -> None:
        """Keep the share of a buffer.

        Raises:
            CheckpointError: the layer has no such buffer, or of another shape or dtype.
        """
        expected = self.expected.get(key)
        if expected is None:
            raise CheckpointError(
                f"layer {self.name!r} has no {key!r}, it has {', '.join(self.expected)}: tsq.json "
                "and the tensors do not belong together"
            )
        fits = tuple(tensor.shape) == expected.shape and (
            self.spec is None or tensor.dtype == expected.dtype
        )
        if not fits:
            raise CheckpointError(
                f"{self.name}.{key} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, and tsq.json needs "
                f"{dtype_name(expected.dtype)} {list(expected.shape)}: the file is damaged, or not of this model"
            )
        self._tensors[key] = part(key, tensor, self.spec, self.cut)

    def share(self) -> Share:
        """All that was taken.

        Raises:
            CheckpointError: a buffer is missing.
        """
        missing = [key for key in self.expected if key not in self._tensors]
        if missing:
            raise CheckpointError(
                f"the file holds no {self.name}.{missing[0]}: it is incomplete; save the model again"
            )
        return Share(self.name, self.share_spec, self._tensors)


class Matrices(nn.Module):
    """The matrices of one layer of vLLM, which all see the same input.

    Args:
        shares: in the order of their outputs.
        dtype: of weights in full precision.
        device: where to.

    Example:
        >>> packed = QuantLinear(64, 8, bits=3, group_size=32, bias=False)
        >>> both = [Share(name, LayerSpec.of(packed), packed.state_dict()) for name in ("gate", "up")]
        >>> matrices = Matrices(both, torch.float32, torch.device("cpu"))
        >>> len(matrices.parts), matrices(torch.zeros(5, 64)).shape
        (1, torch.Size([5, 16]))
    """

    def __init__(self, shares: Sequence[Share], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_module(share, dtype, device) for share in stacked(shares))
        # Written once: a compiler cannot trace it.
        self._formats = [
            _text_of(part.format) if isinstance(part, QuantLinear) else "" for part in self.parts
        ]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs ``x Wᵀ + b``: (…, K) → (…, N) in the dtype of ``x``."""
        outputs: list[Tensor] = []
        first = 0
        for matrix, weight_format in zip(self._matrices(), self._formats, strict=True):
            rows = matrix.out_features
            own_bias = None if bias is None else bias.narrow(0, first, rows)
            outputs.append(_product(matrix, weight_format, x, own_bias))
            first += rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def warm_up(self, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what runs with one row of input and with few, so that no request waits for it."""
        with torch.inference_mode():
            for rows in (1, 2):
                self(
                    torch.zeros(rows, self._matrices()[0].in_features, dtype=dtype, device=device),
                    bias,
                )

    def _matrices(self) -> list[QuantLinear | nn.Linear]:
        return [matrix for matrix in self.parts if isinstance(matrix, QuantLinear | nn.Linear)]


def stacked(shares: Sequence[Share]) -> list[Share]:
    """Neighbours that can be one matrix put together, exactly.

    Reads values of small tensors; at loading only.
    """
    result: list[Share] = []
    for share in shares:
        if result and _fit_together(result[-1], share):
            result[-1] = _below(result[-1], share)
        else:
            result.append(share)
    return result


def _fit_together(upper: Share, lower: Share) -> bool:
    if upper.spec is None or lower.spec is None:
        return upper.spec is lower.spec
    if _without_rows(upper.spec) != _without_rows(lower.spec) or upper.spec.format.has_outliers:
        return False
    return all(
        torch.equal(upper.tensors[key], lower.tensors[key])
        for key, stored in upper.spec.buffers().items()
        if not stored.has_rows
    )


def _without_rows(spec: LayerSpec) -> LayerSpec:
    """Return what must be equal: all but the number of rows and the bias, which vLLM holds."""
    return dataclasses.replace(spec, out_features=1, bias=False, dtype="float32")


def _below(upper: Share, lower: Share) -> Share:
    spec, has_rows = upper.spec, {"weight": True}
    if spec is not None and lower.spec is not None:
        has_rows = {key: stored.has_rows for key, stored in spec.buffers().items()}
        spec = dataclasses.replace(spec, out_features=spec.out_features + lower.spec.out_features)
    tensors = dict(upper.tensors)
    for key, tensor in lower.tensors.items():
        if has_rows[key]:
            tensors[key] = torch.cat([tensors[key], tensor])
    return Share(f"{upper.name} and {lower.name}", spec, tensors)


def _module(share: Share, dtype: torch.dtype, device: torch.device) -> QuantLinear | nn.Linear:
    if share.spec is None:
        weight = share.tensors["weight"].to(device, dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    layer = dataclasses.replace(share.spec, bias=False).build(share.name)
    for key, tensor in share.tensors.items():
        setattr(layer, key, tensor.to(device))
    layer.dtype_marker = torch.empty(0, dtype=dtype, device=device)
    return layer


# --- running ---------------------------------------------------------------------------------------


def _product(
    matrix: QuantLinear | nn.Linear, weight_format: str, x: Tensor, bias: Tensor | None
) -> Tensor:
    if not isinstance(matrix, QuantLinear):
        return F.linear(x, matrix.weight, None if bias is None else bias.to(x.dtype))
    run = _operation if torch.compiler.is_compiling() else _run
    output: Tensor = run(x, bias, list(matrix.parts), weight_format)
    return output


def _run(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor | None], weight_format: str
) -> Tensor:
    """Run a packed matrix, for an operation, whose arguments can be tensors, lists of them and plain values."""
    tensors = Parts(*parts)  # type: ignore[arg-type]
    return running.linear(x, bias, tensors, _format_of(weight_format), x.shape[-1])


@functools.cache
def _text_of(weight_format: WeightFormat) -> str:
    return json.dumps(weight_format.to_dict())


@functools.cache
def _format_of(text: str) -> WeightFormat:
    properties = json.loads(text)
    return WeightFormat.of(**{**properties, "scale_dtype": dtype_of(properties["scale_dtype"])})


_operation = torch.library.custom_op("tsq_layers::serve", _run, mutates_args=())


@_operation.register_fake
def _(x: Tensor, bias: Tensor | None, parts: Sequence[Tensor | None], _: object) -> Tensor:  # noqa: ARG001
    words = parts[0]
    assert words is not None
    return x.new_empty(*x.shape[:-1], words.shape[0])
