"""The quantisation method ``"tsq"`` of vLLM: classes that vLLM makes and calls. Importing this registers it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from tsq_layers.errors import ConfigError
from tsq_layers.formats.tsq.description import DESCRIPTION_FILE, NON_PERSISTENT
from tsq_layers.integrations.vllm.assembly import Intake, Matrices
from tsq_layers.integrations.vllm.description import (
    METHOD,
    check_unclaimed,
    check_within,
    foreign_keys,
    layer_specs,
    parts_of,
)
from tsq_layers.integrations.vllm.sharding import Cut, Span, row_spans
from tsq_layers.runtime.spec import LayerSpec

_QKV = {"q": 0, "k": 1, "v": 2}


@register_quantization_config(METHOD)
class TsqConfig(QuantizationConfig):  # type: ignore[misc]
    """The packed layers, and the specification of each.

    Args:
        values: the ``quantization_config`` of ``config.json``, or ``tsq.json``.

    Attributes:
        layers: by their names in vLLM's model; ``None`` until ``tsq.json`` of the directory is read.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self._describe(values)
        self._claimed: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TsqConfig":
        """From the ``quantization_config`` of ``config.json``, or where that has none from ``tsq.json``."""
        return cls(config)

    def _describe(self, values: Mapping[str, Any]) -> None:
        self.layers, self._foreign = layer_specs(values), foreign_keys(values)

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,  # noqa: ARG002
        revision: str | None = None,
    ) -> None:
        """Read ``tsq.json`` beside the model, if ``config.json`` does not name the layers.

        Raises:
            ConfigError: there is none.
        """
        if self.layers is not None:
            return
        values = get_hf_file_to_dict(DESCRIPTION_FILE, model_name, revision)
        self._describe(values or {})
        if self.layers is None:
            raise ConfigError(
                f"{model_name} holds no {DESCRIPTION_FILE} that names its layers: give a directory "
                "that tsq_layers saved"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Names as vLLM's model has them."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers or {})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method that runs a layer; ``None`` leaves it to vLLM."""
        specs = self.layers or {}
        if isinstance(layer, RoutedExperts):
            check_within(prefix, specs)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        names = parts_of(prefix, self.packed_modules_mapping, specs)
        if specs.keys().isdisjoint(names):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        self._claimed.update(names)
        return TsqLinearMethod(names, [specs.get(name) for name in names])

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Leave out what the file holds for other loaders. All layers are built when this is asked for.

        Raises:
            ConfigError: a packed layer is none of vLLM's linear layers.
        """
        if get_pp_group().world_size == 1:  # otherwise other processes build some of them
            check_unclaimed(self.layers or {}, self._claimed)
        left_out = [re.escape(NON_PERSISTENT), *(f"{re.escape(key)}$" for key in self._foreign)]
        return WeightsMapper(orig_to_new_regex={re.compile(f"^(?:{'|'.join(left_out)}).*"): None})

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Take over a model without ``quantization_config``, if the user asks for ``quantization="tsq"``."""
        return [DESCRIPTION_FILE]


class TsqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Builds, fills and runs one linear layer of vLLM.

    Args:
        names: of the layers of the file that it is made of.
        specs: theirs; ``None`` of those in full precision.
    """

    def __init__(self, names: list[str], specs: list[LayerSpec | None]) -> None:
        self.names, self.specs = names, specs
        self._intakes: list[Intake] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002
        params_dtype: torch.dtype,
        **attributes: Any,  # noqa: ARG002
    ) -> None:
        """Placeholders with the names that the file has: their loader keeps this process' share of what is read."""
        columns = None
        if input_size_per_partition != input_size:
            columns = Span(layer.tp_rank * input_size_per_partition, input_size_per_partition)
        cuts = _cuts(layer, self.names, list(output_partition_sizes), columns)
        for name, spec, (rows, cut) in zip(self.names, self.specs, cuts, strict=True):
            self._intakes.append(Intake(name, spec, (rows, input_size), cut))
        self._dtype = params_dtype
        for intake in self._intakes:
            for key, expected in intake.expected.items():
                if key not in layer._parameters:
                    dtype = params_dtype if intake.spec is None else expected.dtype
                    placeholder = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                    placeholder.weight_loader = self._loader(key)  # type: ignore[attr-defined]
                    layer.register_parameter(key, placeholder)

    def _loader(self, key: str) -> Callable[..., None]:
        def load(_: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
            place = (
                0 if shard is None else _QKV.get(shard, shard) if isinstance(shard, str) else shard
            )
            if not isinstance(place, int) or place >= len(self._intakes):
                raise ConfigError(
                    f"layer {self.names[0]!r}: vLLM loads a part {shard!r}, which is not served packed"
                )
            self._intakes[place].take(key, tensor)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the matrices in the place of the placeholders, on their device.

        Raises:
            CheckpointError: the file lacks a tensor of the layer.
        """
        keys = {key for intake in self._intakes for key in intake.expected}
        device = next(layer._parameters[key].device for key in keys)
        shares = [intake.share() for intake in self._intakes]
        for key in keys:
            delattr(layer, key)
        layer.matrices = Matrices(shares, self._dtype, device)
        layer.matrices.warm_up(layer.bias, self._dtype, device)
        self._intakes = []

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs ``x Wᵀ + b``: (…, K) → (…, N)."""
        output: Tensor = layer.matrices(x, bias)
        return output

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:  # noqa: ARG002
        raise ConfigError(
            f"layer {self.names[0]!r} is quantised and tied to the embedding, which vLLM shares "
            f"unpacked: quantise with skip=({self.names[0]!r},)"
        )


def _cuts(
    layer: Any, names: list[str], sizes: list[int], columns: Span | None
) -> list[tuple[int, Cut]]:
    """Rows that the file holds of each named layer, and what of it this process runs."""
    if isinstance(layer, ParallelLMHead):
        indices = layer.shard_indices
        span = Span(
            indices.org_vocab_start_index,
            indices.org_vocab_end_index - indices.org_vocab_start_index,
        )
        rows = None if span.length == layer.org_vocab_size else (span,)
        return [(layer.org_vocab_size, Cut(rows, columns, padding=sum(sizes) - span.length))]
    wholes = _wholes(layer, sizes)
    rank, ranks = layer.tp_rank, layer.tp_size
    if len(names) == 1:
        return [(sum(wholes), Cut(row_spans(sizes, wholes, rank, ranks), columns))]
    if len(names) != len(sizes):
        raise ConfigError(
            f"layer {layer.prefix!r} of vLLM has {len(sizes)} parts, and the file holds "
            f"{', '.join(names)}: such a layer is not served packed; quantise with "
            f"skip={tuple(names)!r}"
        )
    spans = [
        row_spans([size], [whole], rank, ranks) for size, whole in zip(sizes, wholes, strict=True)
    ]
    return [(whole, Cut(rows, columns)) for whole, rows in zip(wholes, spans, strict=True)]


def _wholes(layer: Any, sizes: list[int]) -> list[int]:
    """Rows of each part over all processes."""
    if isinstance(layer, QKVParallelLinear) and len(sizes) == len(
        _QKV
    ):  # output_sizes counts heads that several processes run several times
        kv_heads = layer.total_num_kv_heads
        return [
            layer.total_num_heads * layer.head_size,
            kv_heads * layer.head_size,
            kv_heads * layer.v_head_size,
        ]
    return list(getattr(layer, "output_sizes", [layer.output_size] if len(sizes) == 1 else sizes))
