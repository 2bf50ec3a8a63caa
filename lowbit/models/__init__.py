"""Architectures lowbit knows, one adapter each."""

from transformers import PreTrainedConfig

from lowbit.errors import InputError
from lowbit.models.llama import llama
from lowbit.models.spaces import Adapter

# By config.model_type. Mistral and Qwen2 are Llamas: one has no biases, the other those of q, k, v.
ADAPTERS = {"llama": llama, "mistral": llama, "qwen2": llama}


def adapter_for(config: PreTrainedConfig) -> Adapter:
    """The adapter of a configuration; an architecture without one is an InputError."""
    if config.model_type not in ADAPTERS:
        raise InputError(
            f"unknown architecture {config.model_type!r}: expected one of {sorted(ADAPTERS)}"
        )
    return ADAPTERS[config.model_type](config)
