"""Attention of a float model with something in front of it that gradients pass.

transformers' sdpa, on what `before_attending` of the attention module makes of its q, k and v
[B, heads, length, D], k and v of the KV heads: rotated after RoPE, and quantized.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "lowbit_learning"  # config._attn_implementation of a model that learns


def attend_through(attention: nn.Module, before: Callable[[Tensor, Tensor, Tensor], tuple]):
    """Put `before` in front of `attention`, whose config is no other model's."""
    attention.before_attending = before
    attention.config._attn_implementation = IMPLEMENTATION


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    query, key, value = module.before_attending(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
AttentionInterface.register(IMPLEMENTATION, _attention)
