"""swap: put the quantized modules of a LowbitConfig into a transformers model, in place."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from lowbit.config import LowbitConfig
from lowbit.errors import InputError
from lowbit.formats import IntFormat
from lowbit.models.spaces import Adapter
from lowbit.nn.attention import IMPLEMENTATION, PREFILL_KV, QUANTIZED, QuantAttention
from lowbit.nn.kv_cache import QuantKVCache
from lowbit.nn.linear import QuantLinear, frozen, prepare
from lowbit.nn.mlp import QuantMLP
from lowbit.nn.static_cache import StaticQuantKVCache
from lowbit.ops.dispatch import BACKENDS
from lowbit.transforms.norms import become_rms_norm
from lowbit.transforms.online import OnlineTransform


def swap(model: PreTrainedModel, adapter: Adapter, config: LowbitConfig) -> PreTrainedModel:
    """Replace linears, MLPs and attention of every block by what `config` says; on any device.

    `model` is as adapter_of leaves it. Codes and scales of new QuantLinears are empty: fill them
    with `assign` or load_state_dict. Biases are kept. A QuantLinear that is there already stays.
    """
    quantized, adapter = config.format, replace(adapter, ranks=config.tensor_parallel)
    if getattr(model, "lowbit_config", None) is not None:
        raise InputError(f"model must not be quantized yet, got {model.lowbit_config.format}")
    unknown = sorted(set(config.input_transforms) - set(adapter.linears))
    if unknown or (config.input_transforms and quantized.weight is None):
        raise InputError(
            f"input_transforms must name quantized linears of a block, got "
            f"{unknown or sorted(config.input_transforms)} with format {quantized}"
        )
    _check_clips(model, adapter, config)
    for index, block in enumerate(model.get_submodule(adapter.block_path)):
        path = f"{adapter.block_path}.{index}"
        if config.centred:
            for norm in adapter.norms:
                become_rms_norm(block, norm)
        if quantized.weight is not None:
            device = next(block.parameters()).device
            for name in adapter.linears:
                plain = block.get_submodule(name)
                linear = _quant_linear(
                    plain,
                    quantized.weight,
                    adapter.input_format(name, plain.in_features, quantized.activation),
                    model.dtype,
                    device,
                    config.clips.get(f"{path}.{name}", config.activation_clip),
                    config.input_transforms.get(name),
                )
                block.set_submodule(name, linear)
        if quantized.activation is not None and adapter.mlp_parts is not None:
            for name in adapter.mlps:
                ordinary = block.get_submodule(name)
                mlp = QuantMLP.from_mlp(ordinary, model.config.hidden_act, adapter.mlp_parts)
                block.set_submodule(name, mlp)
        if quantized.kv is not None:
            attention = QuantAttention(
                block.get_submodule(adapter.attention),
                quantized.kv,
                config.clips.get(f"{path}.{adapter.attention}", config.kv_clip),
                config.query_key_transform,
                adapter.attention_parts,
            )
            block.set_submodule(adapter.attention, attention)
    if config.centred:
        become_rms_norm(model, adapter.final_norm)
    if quantized.head is not None:
        head = model.get_output_embeddings()
        device = head.weight.device
        head = _quant_linear(head, quantized.head, None, model.dtype, device)
        model.set_output_embeddings(head)
        model.config.tie_word_embeddings = False  # the embedding keeps its numbers
    if quantized.kv is not None:
        model.set_attn_implementation(IMPLEMENTATION)
        base = model.get_submodule(adapter.base_path)
        base.lowbit_kv = quantized.kv
        base.lowbit_cache_hook = base.register_forward_pre_hook(use_quant_cache, with_kwargs=True)
    model.lowbit_config, model.lowbit_decode = config, None
    return model


def _check_clips(model: nn.Module, adapter: Adapter, config: LowbitConfig):
    """Every clip of a module that quantizes: of a linear where the format quantizes activations, of
    attention where it quantizes KV."""
    names = adapter.linears if config.format.activation else ()
    names += (adapter.attention,) if config.format.kv else ()
    count = len(model.get_submodule(adapter.block_path))
    known = {f"{adapter.block_path}.{index}.{name}" for index in range(count) for name in names}
    unknown = sorted(config.clips.keys() - known)
    if unknown:
        raise InputError(
            f"clips must name modules whose inputs or KV {config.format} quantizes, got {unknown}"
        )


def _quant_linear(
    linear: nn.Module,
    weight: IntFormat,
    activation: IntFormat | None,
    dtype: torch.dtype,
    device: torch.device,
    activation_clip: float = 1.0,
    transform: OnlineTransform | None = None,
) -> QuantLinear:
    """Of the shape of `linear`, whose own weight may be gone already."""
    if isinstance(linear, QuantLinear):
        return linear
    module = QuantLinear(
        linear.in_features,
        linear.out_features,
        weight,
        activation,
        bias=linear.bias is not None,
        activation_clip=activation_clip,
        transform=transform,
        dtype=dtype,
        device=device,
    )
    if linear.bias is not None:
        module.bias = frozen(linear.bias.detach())
    return module.train(linear.training)


def set_backend(model: nn.Module, backend: str | None):
    """Name the backend every quantized module runs its ops on; None: the first that can.

    Weights are laid out for it: QuantLinear.prepare.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    for module in model.modules():
        if isinstance(module, (QuantLinear, QuantMLP, QuantAttention)):
            module.backend = backend
    prepare(model)


def check_prefill_kv(prefill_kv: str):
    if prefill_kv not in PREFILL_KV:
        raise InputError(f"prefill_kv must be one of {PREFILL_KV}, got {prefill_kv!r}")


def set_prefill_kv(model: nn.Module, prefill_kv: str):
    """What queries of prefill see of their own forward's tokens: lowbit/nn/attention.py."""
    check_prefill_kv(prefill_kv)
    attentions = [m for m in model.modules() if isinstance(m, QuantAttention)]
    if not attentions and prefill_kv != QUANTIZED:
        raise InputError(
            f"prefill_kv must be {QUANTIZED!r} for a model without a quantized KV cache, "
            f"got {prefill_kv!r}"
        )
    for attention in attentions:
        attention.prefill_kv = prefill_kv


def use_quant_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the base model: the cache it is given, or makes, holds quantized KV."""
    caches = [a for a in (*args, *kwargs.values()) if isinstance(a, Cache)]
    for cache in caches:
        _make_quantized(cache, module)
    use_cache = kwargs.get("use_cache")
    if not caches and (module.config.use_cache if use_cache is None else use_cache):
        kwargs = {**kwargs, "past_key_values": QuantKVCache(module.config, module.lowbit_kv)}
    return args, kwargs


def _make_quantized(cache: Cache, module: nn.Module):
    """An empty DynamicCache or StaticCache becomes a quantized one, in place: generate() and who
    made it keep their reference, and must find the tokens there in the next call."""
    if isinstance(cache, QuantKVCache):
        if not cache.is_whole:
            raise InputError(
                "past_key_values was left by a forward that did not end: reset() it and start over"
            )
        return
    kind = {DynamicCache: QuantKVCache, StaticCache: StaticQuantKVCache}.get(type(cache))
    if kind is None or cache.offloading:
        raise InputError(
            "past_key_values must be a QuantKVCache or an empty DynamicCache or StaticCache that "
            f"is not offloaded, got {type(cache).__name__}"
        )
    if cache.get_seq_length() > 0:
        raise InputError(
            "past_key_values must be quantized from its first token on, got a "
            f"{type(cache).__name__} that holds {cache.get_seq_length()} tokens: start from an "
            "empty cache"
        )
    sizes = {}
    if kind is StaticQuantKVCache:  # of layers with a sliding window it has no more than that
        sizes["max_length"] = max(layer.max_cache_len for layer in cache.layers)
    cache.__class__ = kind
    cache.__init__(module.config, module.lowbit_kv, **sizes)
