"""Define the composite of ``nn.MultiheadAttention``, which is split into four linear layers.

Shapes: N batch, L targets, S sources, E embed_dim, H heads, D = E/H. S' is S plus one for each of
``add_bias_kv`` and ``add_zero_attn``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsq_layers.errors import LayerError
from tsq_layers.layers.composites import Composite

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_PARAMETERS = {f"{name}_weight" for name in _PROJECTIONS} | {
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
}


class SplitAttention(nn.Module):
    """An ``nn.MultiheadAttention`` that calls its children ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    The children are plain ``nn.Linear`` layers, and any layer of the same widths can replace one. They are
    called with the tensors that the caller gave, so layers with the same input receive the same tensor
    object. The attributes of the original are kept. ``in_proj_weight`` and ``in_proj_bias`` are
    concatenated from the children at each access.

    The encoder layers of torch have fused paths, which read the weights of their attention and call no
    layer. Around this module they do not take them: every child is called. Results that only the fused
    paths give are missing then: zeros at padding tokens (``nn.TransformerEncoder``), and NaN for a token
    that may attend to no other one, if attention weights are not asked for. These are as in training.

    Args:
        module: the original, which is not modified. Its parameters, attributes, hooks and training mode
            are used.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if not _is_state(name):
                vars(self)[name] = value
        # torch's encoder layers read this attribute, and take no fused path if it is False.
        self._qkv_same_embed_dim = False
        parameters = module._parameters
        weights = _thirds(module.in_proj_weight)
        if not weights:
            weights = [parameters[f"{name}_weight"] for name in _PROJECTIONS]
        biases = _thirds(module.in_proj_bias) or [None, None, None]
        for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias))
        out_parameters = module.out_proj._parameters
        self.out_proj = _linear(out_parameters["weight"], out_parameters["bias"])
        for name in ("bias_k", "bias_v"):
            if name in parameters:
                self.register_parameter(name, parameters[name])

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of query, key and value, concatenated (3E, E); ``None`` if their widths differ."""
        if not self.kdim == self.vdim == self.embed_dim:
            return None
        return self._joined("weight").as_subclass(_Packed)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of query, key and value, concatenated (3E,); ``None`` if there are none."""
        if self.q_proj.bias is None:
            return None
        return self._joined("bias")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``nn.MultiheadAttention`` returns for the same arguments.

        Args:
            query: (L, N, E), (N, L, E) if ``batch_first``, or (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,). Of a bool mask, True excludes a key; a float mask is added to the
                scores.
            need_weights: return the attention weights too. If False,
                ``scaled_dot_product_attention`` computes the output.
            attn_mask: (L, S) or (N·H, L, S), bool or float as ``key_padding_mask``.
            average_attn_weights: average the attention weights over the heads.
            is_causal: a hint that ``attn_mask``, which must be given too, is the causal mask.

        Returns:
            the output, shaped like ``query``, and the attention weights: (N, L, S') if averaged, else
            (N, H, L, S'), without N if ``query`` has no batch; ``None`` if not needed.

        Raises:
            LayerError: tensors are nested, shapes of tensors or masks do not fit together, ``is_causal`` is
                given without a mask, or a mask is neither bool nor floating point.
        """
        _check(query, key, value)
        if is_causal and attn_mask is None:
            raise LayerError("is_causal without attn_mask: give the causal mask too")
        q = self._by_batch(self.q_proj(query))
        k = self._by_batch(self.k_proj(key))
        v = self._by_batch(self.v_proj(value))
        _check_batches(q, k, v)
        # The hint replaces the mask only in scaled_dot_product_attention, and if there is no other mask.
        use_hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if use_hint else self._mask(attn_mask, key_padding_mask, q, k.shape[1])
        k = _with_extra(k, self.bias_k)
        v = _with_extra(v, self.bias_v)
        q = self._heads(q)
        k = self._heads(k)
        v = self._heads(v)
        if self.add_zero_attn:
            k = F.pad(k, (0, 0, 0, 1))
            v = F.pad(v, (0, 0, 0, 1))
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, use_hint)
            return self._output(output, query), None
        weights = _attention_weights(q, k, mask)
        if dropout:
            weights = F.dropout(weights, dropout)
        output = self._output(weights @ v, query)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        return output, weights if query.dim() == 3 else weights.squeeze(0)

    def _joined(self, attribute: str) -> Tensor:
        """Return the weights or biases of query, key and value in one tensor."""
        tensors: list[Any] = [getattr(self.get_submodule(name), attribute) for name in _PROJECTIONS]
        return torch.cat(tensors)

    def _by_batch(self, x: Tensor) -> Tensor:
        """Return a tensor in the caller's layout as (N, L, E)."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """Split the heads, (N, L, E) → (N, H, L, D)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _output(self, heads: Tensor, query: Tensor) -> Tensor:
        """Join the heads (N, H, L, D), and apply ``out_proj``; the result is in the caller's layout."""
        if query.dim() == 2:
            rows = heads.squeeze(0).transpose(0, 1)
        elif self.batch_first:
            rows = heads.permute(0, 2, 1, 3)
        else:
            rows = heads.permute(2, 0, 1, 3)
        output: Tensor = self.out_proj(rows.flatten(-2))
        return output

    def _mask(
        self, attn: Tensor | None, padding: Tensor | None, q: Tensor, sources: int
    ) -> Tensor | None:
        """Return one mask to add to the scores, which broadcasts to (N, H, L, S'); ``None`` if there is none."""
        batch, targets = q.shape[:2]
        heads = self.num_heads
        mask = None
        if attn is not None:
            _check_mask("attn_mask", attn, (targets, sources), (batch * heads, targets, sources))
            leading_sizes = (1, 1) if attn.dim() == 2 else (batch, heads)
            mask = _additive(attn, q.dtype).view(*leading_sizes, targets, sources)
        if padding is not None:
            shapes: list[tuple[int, ...]] = [(batch, sources)]
            if batch == 1:
                shapes.append((sources,))
            _check_mask("key_padding_mask", padding, *shapes)
            keys = _additive(padding, q.dtype).view(batch, 1, 1, sources)
            mask = keys if mask is None else mask + keys
        extra = (self.bias_k is not None) + self.add_zero_attn
        if mask is None or not extra:
            return mask
        return F.pad(mask, (0, extra))


class _Packed(Tensor):
    """A concatenated weight that is an ordinary tensor, except that the fused paths of torch refuse it.

    ``nn.TransformerEncoder`` makes a nested tensor of its input, which layers do not accept. It does not
    if a weight of its first layer overrides ``__torch_function__``.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def split_attention(module: nn.Module) -> SplitAttention:
    """Split an attention into four linear layers, which share the memory of its parameters.

    Args:
        module: an ``nn.MultiheadAttention``, which is not modified.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> split = split_attention(attention)
        >>> x = torch.randn(3, 5, 8)
        >>> torch.testing.assert_close(split(x, x, x), attention(x, x, x))
        >>> [name for name, _ in split.named_children()]
        ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    assert isinstance(module, nn.MultiheadAttention)
    return SplitAttention(module)


def _is_attention(module: nn.Module) -> bool:
    """Return True for an ``nn.MultiheadAttention`` with torch's forward and plain parameters.

    Whatever computes a weight (pruning, a parametrization) adds parameters or children, or removes some.
    """
    if not isinstance(module, nn.MultiheadAttention) or "forward" in vars(module):
        return False
    if type(module).forward is not nn.MultiheadAttention.forward:
        return False
    parameters = module._parameters
    has_one_weight = parameters.get("in_proj_weight") is not None
    has_weights = all(parameters.get(f"{name}_weight") is not None for name in _PROJECTIONS)
    if not (has_one_weight or has_weights) or not parameters.keys() <= _PARAMETERS:
        return False
    return module._modules.keys() == {"out_proj"} and _is_plain_linear(module._modules["out_proj"])


def _is_plain_linear(module: nn.Module | None) -> bool:
    if not isinstance(module, nn.Linear) or module._modules:
        return False
    return module._parameters.keys() == {"weight", "bias"}


ATTENTION = Composite(
    name="MultiheadAttention", matches=_is_attention, split=split_attention, always=True
)
"""``nn.MultiheadAttention``."""


def _is_state(name: str) -> bool:
    """Return True for attributes of a module that a new module has of its own."""
    containers = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return name in containers or "state_dict" in name


def _thirds(parameter: Tensor | None) -> list[nn.Parameter | None]:
    """Return the parameters of query, key and value, views of the concatenated one; none if that is ``None``."""
    if parameter is None:
        return []
    return [nn.Parameter(part, parameter.requires_grad) for part in parameter.detach().chunk(3)]


def _linear(weight: nn.Parameter | None, bias: nn.Parameter | None) -> nn.Linear:
    assert weight is not None
    # The meta device takes no memory for the weight that is replaced.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _with_extra(x: Tensor, extra: Tensor | None) -> Tensor:
    """Add one source to every sequence, (N, S, E) → (N, S+1, E)."""
    if extra is None:
        return x
    return torch.cat([x, extra.to(x.dtype).expand(len(x), 1, -1)], dim=1)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax of the scaled scores, (N, H, L, S')."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return F.softmax(scores, dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: −inf where a bool mask is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = (query, key, value)
    if any(tensor.is_nested for tensor in tensors):
        raise LayerError(
            "attention of nested tensors: give padded tensors, with a key_padding_mask"
        )
    if query.dim() not in (2, 3) or {key.dim(), value.dim()} != {query.dim()}:
        # Shapes as text cannot be compiled, so they are not prepared above.
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise LayerError(
            f"query, key, value have shapes {shapes}; "
            "give all three dimensions, or all two without a batch"
        )


def _check_batches(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0]:
        sizes = ", ".join(f"{x.shape[0]}×{x.shape[1]}" for x in (q, k, v))
        raise LayerError(
            f"query, key, value hold {sizes} tokens (batch × length); "
            "batches must agree, and key with value"
        )


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    """Refuse a mask that has none of the shapes, or no dtype of a mask."""
    # Not "mask.shape in shapes", which torch.compile refuses for sizes that vary.
    if not any(mask.shape == torch.Size(shape) for shape in shapes):
        allowed_shapes = " or ".join(map(str, dict.fromkeys(shapes)))
        raise LayerError(f"{name} has shape {tuple(mask.shape)}; give one of {allowed_shapes}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise LayerError(f"{name} is {mask.dtype}; give a bool or floating-point mask")
