"""nn.MultiheadAttention whose weights and inputs pass fake-quantizers. torch's own uses them in functions of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = {
    "in_proj_weight": "weight_quant",
    "q_proj_weight": "q_weight_quant",
    "k_proj_weight": "k_weight_quant",
    "v_proj_weight": "v_weight_quant",
}


class QuantMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with the same arguments and results. ``out_proj`` is a QuantLinear. Scores stay in float.

    ``act_quant``, ``key_quant`` and ``value_quant`` quantize query, key and value. Where two of these are one tensor, the
    first one's quantizer is used for both.
    """

    @classmethod
    def convert_(cls, attention: nn.MultiheadAttention, weight_quant: Callable[[str, Tensor], nn.Module]) -> None:
        """Make one of ``attention``, in place; ``weight_quant`` makes the quantizer of a weight, given its name and itself."""
        attention.__class__ = cls
        for name, quant in PROJECTIONS.items():
            if (weight := getattr(attention, name)) is not None:
                setattr(attention, quant, weight_quant(name, weight))
        attention.act_quant, attention.key_quant, attention.value_quant = (nn.Identity() for _ in range(3))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A former version had quantizers of keys and values in self-attention, too, which it never used."""
        for name in ("key_quant", "value_quant"):
            if type(getattr(self, name)) is nn.Identity:
                for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def projections(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """(quantizer, weight) of the projections of query, key and value: one, or one for each."""
        for name, quant in PROJECTIONS.items():
            if (weight := getattr(self, name)) is not None:
                yield getattr(self, quant), weight

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
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal is a hint, and needs attn_mask")
        batched = query.dim() == 3
        q = self.act_quant(query)
        k = q if key is query else self.key_quant(key)
        v = q if value is query else k if value is key else self.value_quant(value)
        weights = [quant(weight) for quant, weight in self.projections()]
        weights = weights[0].chunk(3) if len(weights) == 1 else weights
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(self._batch_first(x, batched), w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        k, v = self._lengthened(k, self.bias_k), self._lengthened(v, self.bias_v)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            x = shares @ v
            shares = shares.mean(1) if average_attn_weights else shares
            shares = shares if batched else shares.squeeze(0)
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x.squeeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)), shares

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """[N, L, E]"""
        return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

    def _lengthened(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the learned one and with the zero one behind them, where there are such."""
        if bias is not None:
            x = torch.cat([x, bias.expand(len(x), 1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, broadcast to [N, heads, L, S]; None if it is nothing."""
        masks = []
        if attn_mask is not None:
            by_head = (-1, self.num_heads, *attn_mask.shape[-2:]) if attn_mask.dim() == 3 else attn_mask.shape
            masks.append(attn_mask.reshape(by_head))
        if padding is not None:
            masks.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
        added = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
            mask = F.pad(mask.to(q.dtype), (0, k.shape[-2] - mask.shape[-1]))
            added = mask if added is None else added + mask
        return added
