"""Architectures lowbit knows, one adapter each."""

from transformers import PreTrainedConfig, PreTrainedModel

from lowbit.errors import InputError
from lowbit.models.experts import unfuse_experts
from lowbit.models.granite import granite
from lowbit.models.llama import llama
from lowbit.models.minicpm import minicpm
from lowbit.models.mixtral import mixtral
from lowbit.models.phi import phi
from lowbit.models.phi3 import phi3
from lowbit.models.qwen3 import qwen3
from lowbit.models.spaces import Adapter

# By config.model_type. Those that llama describes share its modules' names: Mistral without biases,
# Qwen2 with those of q, k and v, SmolLM3 with layers without RoPE.
ADAPTERS = {
    "granite": granite,
    "llama": llama,
    "minicpm": minicpm,
    "mistral": llama,
    "mixtral": mixtral,
    "phi": phi,
    "phi3": phi3,
    "qwen2": llama,
    "qwen3": qwen3,
    "smollm3": llama,
}


def adapter_for(config: PreTrainedConfig) -> Adapter:
    """The adapter of a configuration; an architecture without one is an InputError."""
    kind = config.model_type
    if kind not in ADAPTERS:
        name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise InputError(
            f"unknown architecture {kind!r} ({name}): expected one of {', '.join(ADAPTERS)}; a new "
            f"one is described in lowbit/models/{kind}.py, see docs/add_an_architecture.md"
        )
    return ADAPTERS[kind](config)


def adapter_of(model: PreTrainedModel) -> Adapter:
    """The adapter of a model, whose modules are from then on what it names: experts that
    transformers keeps in one tensor become linears, in place."""
    adapter = adapter_for(model.config)
    if adapter.experts:
        unfuse_experts(model, adapter)
    return adapter
