"""Qwen3: Llama's block with norms of q and k, head by head, which stay where they are."""

from dataclasses import replace

from transformers import PreTrainedConfig

from lowbit.models.llama import llama
from lowbit.models.spaces import Adapter, Space


def qwen3(config: PreTrainedConfig) -> Adapter:
    """The adapter of one Qwen3 configuration."""
    base = llama(config)
    head_dim = base.spaces["query_key"].dim
    channels = Space(  # the gains of the norms are those of every head
        1,
        inner=head_dim,
        scale_writers=("self_attn.k_norm",),
        multiplied=("self_attn.q_norm",),
        turned=head_dim,
    )
    return replace(base, spaces={**base.spaces, "query_key_channels": channels})
