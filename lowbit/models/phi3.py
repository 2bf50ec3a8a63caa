"""Phi-3: Llama's block with q, k and v from one linear, gate and up from another."""

from dataclasses import replace

from transformers import PreTrainedConfig

from lowbit.models.llama import llama
from lowbit.models.spaces import Adapter, AttentionParts, MLPParts, Norm

QUERY_KEY_VALUE = ("self_attn.qkv_proj",)
GATE_UP = ("mlp.gate_up_proj",)


def phi3(config: PreTrainedConfig) -> Adapter:
    """The adapter of one Phi-3 configuration."""
    unfused = llama(config)
    spaces, dim = dict(unfused.spaces), unfused.spaces["value"].dim
    del spaces["query_key_channels"]  # the rows of q and of k are in one linear
    first = (config.num_attention_heads + config.num_key_value_heads) * dim
    values = (first, first + config.num_key_value_heads * dim)
    up = (config.intermediate_size, 2 * config.intermediate_size)
    return replace(
        unfused,
        stages=(QUERY_KEY_VALUE, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)),
        norms=(Norm("input_layernorm", QUERY_KEY_VALUE), Norm("post_attention_layernorm", GATE_UP)),
        spaces={
            **spaces,
            "residual": replace(spaces["residual"], readers=QUERY_KEY_VALUE + GATE_UP),
            "value": replace(spaces["value"], writers=QUERY_KEY_VALUE, rows=values),
            "mlp_hidden": replace(spaces["mlp_hidden"], scale_writers=GATE_UP, rows=up),
            "attention_input": replace(spaces["attention_input"], readers=QUERY_KEY_VALUE),
            "mlp_input": replace(spaces["mlp_input"], readers=GATE_UP),
            "value_channels": replace(
                spaces["value_channels"], scale_writers=QUERY_KEY_VALUE, rows=values
            ),
        },
        scores=QUERY_KEY_VALUE,
        attention_parts=AttentionParts(("qkv_proj",)),
        mlp_parts=MLPParts(("gate_up_proj",)),
    )
