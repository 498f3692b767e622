"""`nn.MultiheadAttention` as four linear layers.

Shapes: N batch, L targets, S sources, E embed_dim, H heads, D = E/H. S' is S and one more for each of
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
    """What an ``nn.MultiheadAttention`` computes, by the children ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    These are plain ``nn.Linear`` layers, and any layer of the same widths can take the place of one.
    They are called with the tensors that the caller gave, so that layers with the same input are
    seen to have it. The attributes of the original are there; ``in_proj_weight`` and
    ``in_proj_bias`` are put together from the children when they are read.

    torch's encoder layers use the weights of their attention directly where they can, without
    calling any layer. Around this module they never do: every child is called. What their fused paths
    alone return is gone then, zeros at padding tokens (``nn.TransformerEncoder``) and NaN for a
    token that may attend to none without weights being asked for: these are as in training.

    Args:
        module: taken over are its parameters, attributes, hooks and the training flag. It is not modified.
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
        attributes = vars(module).items()
        vars(self).update({name: value for name, value in attributes if not _is_state(name)})
        self._qkv_same_embed_dim = False  # torch's own: no fused path
        own, out = module._parameters, module.out_proj._parameters
        weights = _thirds(module.in_proj_weight) or [own[f"{name}_weight"] for name in _PROJECTIONS]
        biases = _thirds(module.in_proj_bias) or [None, None, None]
        for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias))
        self.out_proj = _linear(out["weight"], out["bias"])
        for name in ("bias_k", "bias_v"):
            if name in own:
                self.register_parameter(name, own[name])

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The three weights in one (3E, E), made anew each time; ``None`` where their widths differ."""
        if not self.kdim == self.vdim == self.embed_dim:
            return None
        return self._joined("weight").as_subclass(_Packed)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The three biases in one (3E,), made anew each time; ``None`` if there are none."""
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
        """As ``nn.MultiheadAttention``: arguments, masks and results.

        Args:
            query: (L, N, E), (N, L, E) if ``batch_first``, or (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,); True is ignored, a float is added.
            need_weights: return the attention weights too. The attention is ``scaled_dot_product_attention`` without.
            attn_mask: (L, S) or (N·H, L, S); True is ignored, a float is added.
            average_attn_weights: over the heads.
            is_causal: ``attn_mask`` is the causal mask, which must be given too.

        Returns:
            as ``query``, and the weights (N, L, S'), (N, H, L, S') if not averaged, without N if ``query`` has none.

        Raises:
            LayerError: nested tensors; tensors or masks of shapes that do not belong together;
                ``is_causal`` without a mask; a mask that is neither bool nor floating point.
        """
        _check(query, key, value)
        if is_causal and attn_mask is None:
            raise LayerError("is_causal without attn_mask: give the causal mask too")
        q, k, v = (
            self._by_batch(y) for y in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        _check_batches(q, k, v)
        causal = (
            is_causal and key_padding_mask is None and not need_weights
        )  # then the hint is enough
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k.shape[1])
        k, v = _with_extra(k, self.bias_k), _with_extra(v, self.bias_v)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return self._output(
                F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), query
            ), None
        weights = _attention_weights(q, k, mask)
        weights = F.dropout(weights, dropout) if dropout else weights
        output = self._output(weights @ v, query)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if query.dim() == 3 else weights.squeeze(0)

    def _joined(self, attribute: str) -> Tensor:
        parts: list[Any] = [getattr(self.get_submodule(name), attribute) for name in _PROJECTIONS]
        return torch.cat(parts)

    def _by_batch(self, x: Tensor) -> Tensor:
        """Whatever the caller's layout → (N, L, E)."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, E) → (N, H, L, D)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _output(self, attended: Tensor, query: Tensor) -> Tensor:
        """(N, H, L, D) → the output, in the caller's layout."""
        if query.dim() == 2:
            rows = attended.squeeze(0).transpose(0, 1)
        else:
            rows = (
                attended.permute(0, 2, 1, 3) if self.batch_first else attended.permute(2, 0, 1, 3)
            )
        output: Tensor = self.out_proj(rows.flatten(-2))
        return output

    def _mask(
        self, attn: Tensor | None, padding: Tensor | None, q: Tensor, sources: int
    ) -> Tensor | None:
        """Both masks in one to be added to the scores, broadcastable to (N, H, L, S')."""
        batch, targets, heads = q.shape[0], q.shape[1], self.num_heads
        mask = None
        if attn is not None:
            _check_mask("attn_mask", attn, (targets, sources), (batch * heads, targets, sources))
            own_heads = (1, 1) if attn.dim() == 2 else (batch, heads)
            mask = _additive(attn, q.dtype).view(*own_heads, targets, sources)
        if padding is not None:
            _check_mask(
                "key_padding_mask",
                padding,
                (batch, sources),
                (sources,) if batch == 1 else (batch, sources),
            )
            keys = _additive(padding, q.dtype).view(batch, 1, 1, sources)
            mask = keys if mask is None else mask + keys
        extra = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, extra)) if mask is not None and extra else mask


class _Packed(Tensor):
    """A packed weight that can be read like any tensor, but that torch's fused encoder paths refuse.

    ``nn.TransformerEncoder`` turns its input into a nested tensor, which layers cannot be given,
    unless a weight of its first layer says that it handles torch functions itself.
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
    """The same attention, computed by four linear layers on the memory of the module's parameters.

    Args:
        module: an ``nn.MultiheadAttention``; not modified.

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
    """Of torch's own forward, with plain parameters only: anything that computes a weight adds or hides some."""
    if not isinstance(module, nn.MultiheadAttention) or "forward" in vars(module):
        return False
    own, out = module._parameters, module._modules.get("out_proj")
    packed = own.get("in_proj_weight") is not None
    separate = all(own.get(f"{name}_weight") is not None for name in _PROJECTIONS)
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and (packed or separate)
        and own.keys() <= _PARAMETERS
        and module._modules.keys() == {"out_proj"}
        and isinstance(out, nn.Linear)
        and out._parameters.keys() == {"weight", "bias"}
        and not out._modules
    )


ATTENTION = Composite(
    name="MultiheadAttention", matches=_is_attention, split=split_attention, always=True
)


def _is_state(name: str) -> bool:
    return (
        name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        or "state_dict" in name
    )


def _thirds(packed: Tensor | None) -> list[nn.Parameter | None]:
    """The parameters of query, key and value, views of the packed one; none if there is none."""
    return (
        [nn.Parameter(part, packed.requires_grad) for part in packed.detach().chunk(3)]
        if packed is not None
        else []
    )


def _linear(weight: nn.Parameter | None, bias: nn.Parameter | None) -> nn.Linear:
    assert weight is not None
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=False, device="meta"
    )  # made without memory
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _with_extra(x: Tensor, extra: Tensor | None) -> Tensor:
    """One more source for every sequence: (N, S, E) → (N, S+1, E)."""
    return x if extra is None else torch.cat([x, extra.to(x.dtype).expand(len(x), 1, -1)], dim=1)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the scaled scores: (N, H, L, S')."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    return F.softmax(scores if mask is None else scores + mask, dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
        if mask.dtype == torch.bool
        else mask
    )


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = (query, key, value)
    if any(tensor.is_nested for tensor in tensors):
        raise LayerError(
            "attention of nested tensors: give padded tensors, with a key_padding_mask"
        )
    if query.dim() not in (2, 3) or {key.dim(), value.dim()} != {query.dim()}:
        shapes = ", ".join(
            str(tuple(tensor.shape)) for tensor in tensors
        )  # only here: it cannot be compiled
        raise LayerError(
            f"query, key, value have shapes {shapes}; give all three dimensions, or all two without a batch"
        )


def _check_batches(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0]:
        sizes = ", ".join(f"{x.shape[0]}×{x.shape[1]}" for x in (q, k, v))
        raise LayerError(
            f"query, key, value hold {sizes} tokens (batch × length); batches must agree, and key with value"
        )


def _check_mask(name: str, mask: Tensor, *allowed: tuple[int, ...]) -> None:
    if not any(
        mask.shape == torch.Size(shape) for shape in allowed
    ):  # "in" cannot be compiled for sizes that vary
        raise LayerError(
            f"{name} has shape {tuple(mask.shape)}; give one of {' or '.join(map(str, dict.fromkeys(allowed)))}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise LayerError(f"{name} is {mask.dtype}; give a bool or floating-point mask")
