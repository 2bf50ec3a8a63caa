"""Phi-1, Phi-1.5 and Phi-2: LayerNorm, biases everywhere, RoPE on a part of each head, and an
attention and an MLP without a gate that read the same norm."""

from transformers import PreTrainedConfig

from lowbit.models.spaces import Adapter, AttentionParts, Norm, Space, head_spaces

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READ_NORM = (*QUERY_KEY_VALUE, "mlp.fc1")


def phi(config: PreTrainedConfig) -> Adapter:
    """The adapter of one Phi configuration."""
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return Adapter(
        base_path="model",
        block_path="model.layers",
        rotary_path="model.rotary_emb",
        attention="self_attn",
        mlp="mlp",
        stages=(READ_NORM, ("self_attn.dense",), ("mlp.fc2",)),
        norms=(Norm("input_layernorm", READ_NORM),),
        final_norm=Norm("model.final_layernorm", ("lm_head",)),
        layer_norms=True,
        spaces={
            "residual": Space(
                config.hidden_size,
                writers=("self_attn.dense", "mlp.fc2"),
                readers=READ_NORM,
                embedding="model.embed_tokens",
                head="lm_head",
            ),
            **head_spaces(num_heads, num_kv_heads, head_dim, "self_attn.v_proj", "self_attn.dense"),
            "mlp_hidden": Space(config.intermediate_size, readers=("mlp.fc2",)),
            "attention_input": Space(  # the MLP's too: there is no mlp_input
                config.hidden_size,
                readers=READ_NORM,
                scale_writers=("input_layernorm",),
                judge="",
            ),
        },
        scores=("self_attn.q_proj", "self_attn.k_proj"),
        attention_parts=AttentionParts(output="dense", norms=("q_layernorm", "k_layernorm")),
        mlp_parts=None,
    )
