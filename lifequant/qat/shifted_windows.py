"""The attention of torchvision's Swin Transformer, which uses its layers' weights and does not call the layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class _CallsItsLayers:
    """The same function of x [N, H, W, C], by calls of its layers ``qkv`` and ``proj``."""

    def forward(self, x: Tensor) -> Tensor:
        n, *size, _ = x.shape
        window = self.window_size
        whole = [-(-s // w) * w for s, w in zip(size, window, strict=True)]
        shift = [0 if w >= s else by for s, w, by in zip(whole, window, self.shift_size, strict=True)]
        x = F.pad(x, (0, 0, 0, whole[1] - size[1], 0, whole[0] - size[0]))
        x = self._windows(torch.roll(x, [-by for by in shift], (1, 2)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shift):
            scores = (scores.unflatten(0, (n, -1)) + self._mask(whole, shift, x)).flatten(0, 1)
        shares = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        x = F.dropout(self.proj((shares @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)
        x = x.view(n, whole[0] // window[0], whole[1] // window[1], *window, -1).transpose(2, 3)
        x = torch.roll(x.reshape(n, *whole, -1), shift, (1, 2))
        return x[:, : size[0], : size[1]].contiguous()

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)

    def _windows(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N windows, places in a window, C]"""
        height, width = self.window_size
        x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def _mask(self, whole: list[int], shift: list[int], x: Tensor) -> Tensor:
        """[windows, 1, places, places]: -100 between places that were apart before the roll."""
        sides = []
        for s, w, by in zip(whole, self.window_size, shift, strict=True):
            place = torch.arange(s, device=x.device)
            sides.append((place >= s - w).int() + (place >= s - by).int() if by else torch.zeros_like(place))
        area = 3 * sides[0][:, None] + sides[1]
        area = self._windows(area[None, :, :, None]).squeeze(-1)
        return torch.where(area[:, None, :] == area[:, :, None], 0.0, -100.0).to(x.dtype)[:, None]


class QuantShiftedWindowAttention(_CallsItsLayers, ShiftedWindowAttention):
    """That of Swin Transformer."""


class QuantShiftedWindowAttentionV2(_CallsItsLayers, ShiftedWindowAttentionV2):
    """That of its second version: cosines, and keys without a bias."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.qkv.bias is not None:
            bias = self.qkv.bias.chunk(3)[1].unflatten(0, (self.num_heads, 1, -1))
            k = k - bias
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=math.log(100)).exp()


def convert_(attention: nn.Module) -> None:
    """Make one of these of ``attention``, in place."""
    second = isinstance(attention, ShiftedWindowAttentionV2)
    attention.__class__ = QuantShiftedWindowAttentionV2 if second else QuantShiftedWindowAttention
