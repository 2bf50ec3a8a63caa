"""Attention of a float model with something in front of it that gradients pass.

transformers' sdpa, on what `before_attending` of the attention module makes of its q, k and v
[B, heads, length, D], k and v of the KV heads: rotated after RoPE, and quantized.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbit.formats import IntFormat
from lowbit.rounding.learned import clipped_through

IMPLEMENTATION = "lowbit_learning"  # config._attn_implementation of a model that learns
BEFORE = "before_attending"  # the name under which an attention holds what is in front of it


class QuantizedKV(nn.Module):
    """q and k turned alike, k and v quantized as the cache will hold them.

    turn  of q and of k; None: they stay
    clip  a buffer [], that what is learned may take the place of
    """

    def __init__(
        self,
        format: IntFormat,
        turn: Callable[[Tensor], Tensor] | None = None,
        clip: float = 1.0,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.format, self.turn = format, turn
        self.register_buffer("clip", torch.tensor(clip, device=device), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.turn is not None:
            query, key = self.turn(query), self.turn(key)
        key, value = (clipped_through(x.float(), self.format, self.clip) for x in (key, value))
        return query, key, value


class Attending:
    """A handle: remove() leaves the attention as it was."""

    def __init__(self, attention: nn.Module):
        self.attention, self.implementation = attention, attention.config._attn_implementation

    def remove(self):
        delattr(self.attention, BEFORE)
        self.attention.config._attn_implementation = self.implementation


def attend_through(attention: nn.Module, before: QuantizedKV) -> Attending:
    """Put `before` in front of `attention`. Others of the same config cannot run until the handle
    is removed, unless they have one too."""
    handle = Attending(attention)
    setattr(attention, BEFORE, before)
    attention.config._attn_implementation = IMPLEMENTATION
    return handle


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    query, key, value = getattr(module, BEFORE)(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
AttentionInterface.register(IMPLEMENTATION, _attention)
