"""Architectures lowbit knows, one adapter each."""

from transformers import PreTrainedConfig

from lowbit.errors import InputError
from lowbit.models.llama import llama
from lowbit.models.spaces import Adapter

ADAPTERS = {"llama": llama}  # by config.model_type


def adapter_for(config: PreTrainedConfig) -> Adapter:
    """The adapter of a configuration; an architecture without one is an InputError."""
    if config.model_type not in ADAPTERS:
        raise InputError(
            f"unknown architecture {config.model_type!r}: expected one of {sorted(ADAPTERS)}"
        )
    return ADAPTERS[config.model_type](config)
