"""The Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU, optional biases."""

from transformers import PreTrainedConfig

from lowbit.models.spaces import Adapter, Norm, Space, head_spaces

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def llama(config: PreTrainedConfig) -> Adapter:
    """The adapter of one Llama-like configuration."""
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return Adapter(
        base_path="model",
        block_path="model.layers",
        rotary_path="model.rotary_emb",
        attention="self_attn",
        mlp="mlp",
        stages=(QUERY_KEY_VALUE, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)),
        norms=(Norm("input_layernorm", QUERY_KEY_VALUE), Norm("post_attention_layernorm", GATE_UP)),
        final_norm=Norm("model.norm", ("lm_head",)),
        spaces={
            "residual": Space(
                config.hidden_size,
                writers=("self_attn.o_proj", "mlp.down_proj"),
                readers=QUERY_KEY_VALUE + GATE_UP,
                embedding="model.embed_tokens",
                head="lm_head",
            ),
            **head_spaces(
                num_heads, num_kv_heads, head_dim, "self_attn.v_proj", "self_attn.o_proj"
            ),
            "mlp_hidden": Space(
                config.intermediate_size,
                readers=("mlp.down_proj",),
                scale_writers=("mlp.up_proj",),
                judge="mlp.down_proj",
            ),
            "attention_input": Space(
                config.hidden_size,
                readers=QUERY_KEY_VALUE,
                scale_writers=("input_layernorm",),
                judge="self_attn",
            ),
            "mlp_input": Space(
                config.hidden_size,
                readers=GATE_UP,
                scale_writers=("post_attention_layernorm",),
                judge="mlp",
            ),
            "query_key_channels": Space(
                num_kv_heads,
                inner=head_dim,
                scale_writers=("self_attn.k_proj",),
                multiplied=("self_attn.q_proj",),
                repeat=num_heads // num_kv_heads,
                turned=head_dim,
            ),
        },
        scores=("self_attn.q_proj", "self_attn.k_proj"),
        plain=True,
    )
