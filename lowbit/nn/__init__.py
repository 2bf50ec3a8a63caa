"""The modules of a packed model; each holds state and calls ops, none does math."""

from lowbit.nn.attention import QuantAttention
from lowbit.nn.decode import set_decode
from lowbit.nn.fused import fuse, unfuse
from lowbit.nn.kv_cache import QuantKVCache
from lowbit.nn.linear import QuantLinear, prepare
from lowbit.nn.mlp import QuantMLP
from lowbit.nn.static_cache import StaticQuantKVCache
from lowbit.nn.swap import set_backend, set_prefill_kv, swap

__all__ = [
    "QuantAttention",
    "QuantKVCache",
    "QuantLinear",
    "QuantMLP",
    "StaticQuantKVCache",
    "fuse",
    "prepare",
    "set_backend",
    "set_decode",
    "set_prefill_kv",
    "swap",
    "unfuse",
]
