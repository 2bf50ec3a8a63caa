"""Whole models of real shapes, packed or as transformers has them, and calls of theirs to time.

Weights are random, but SmolLM2-135M's are its own: what a forward takes depends on sizes, and on
numbers only through the power they draw. What a cache holds is random too.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)

from benchmarks.shapes import Model
from lowbit.checkpoint import finish
from lowbit.config import LowbitConfig
from lowbit.formats import GROUP_SCALE_MAX, QuantFormat
from lowbit.models import adapter_for
from lowbit.models.source import PACKAGED, load_source
from lowbit.nn import StaticQuantKVCache, swap
from lowbit.nn.linear import QuantLinear
from lowbit.quantize import quantize
from lowbit.recipes.quarot import ROTATIONS
from lowbit.tensors import restore_rotary
from lowbit.transforms import fit

RECIPE = "quarot-rtn"  # every online rotation there is, and no calibration
DTYPE = torch.bfloat16  # of activations, and of weights that are not quantized
LONGEST = 1 << 20  # positions: RoPE's table is made of those that are used


def config_of(model: Model, num_layers: int | None = None) -> PreTrainedConfig:
    """As its family has it; num_layers None: all."""
    kind = Qwen2Config if model.qkv_bias else LlamaConfig
    return kind(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_attention_heads=model.num_q_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_hidden_layers=num_layers or model.num_layers,
        vocab_size=model.vocabulary,
        max_position_embeddings=LONGEST,
    )


def packed_on_meta(config: PreTrainedConfig, format: QuantFormat) -> PreTrainedModel:
    """A model of RECIPE without memory; not fused."""
    adapter = adapter_for(config)
    fitted = fit(ROTATIONS, adapter, seed=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    lowbit_config = LowbitConfig(
        format,
        RECIPE,
        input_transforms=fitted.input_transforms if format.weight else {},
        query_key_transform=fitted.query_key if format.kv else None,
    )
    return swap(model, adapter, lowbit_config)


def packed_model(
    name: str, model: Model, format: QuantFormat, num_layers: int | None, device: torch.device
) -> PreTrainedModel:
    """As `lowbit.load` returns it."""
    if name == PACKAGED and num_layers is None:
        source, _ = load_source(PACKAGED, torch.float32)
        packed = quantize(source, RECIPE, format, progress=False)
        return finish(packed.to(DTYPE).to(device))
    packed = _filled(packed_on_meta(config_of(model, num_layers), format), device)
    return finish(packed)


def full_model(
    name: str, model: Model, num_layers: int | None, device: torch.device
) -> PreTrainedModel:
    """In bf16, with torch's attention."""
    if name == PACKAGED and num_layers is None:
        return load_source(PACKAGED, DTYPE)[0].to(device).eval()
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(config_of(model, num_layers), dtype=DTYPE)
    return _filled(full, device).eval()


def _filled(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """From the meta device to this one, random; outputs are of the size of inputs."""
    model = model.to_empty(device=device)
    restore_rotary(model, adapter_for(model.config).rotary_path, device)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            _fill_packed(module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            width = module.weight.shape[1] if isinstance(module, nn.Linear) else 1
            module.weight.data.normal_(std=width**-0.5)
        elif getattr(module, "weight", None) is not None:
            module.weight.data.fill_(1)  # a norm
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(std=0.1)
    return model.requires_grad_(False)


def _fill_packed(linear: QuantLinear):
    format = linear.weight_format
    step = 3**0.5 / (2 ** (format.bits - 1) * linear.in_features**0.5)  # of uniform codes
    linear.codes.random_(0, 256)
    if format.two_level:
        linear.scale.random_(1, GROUP_SCALE_MAX + 1)
        linear.channel_scale.fill_(2 * step / GROUP_SCALE_MAX)
    else:
        linear.scale.fill_(step)
    if linear.zero_point is not None:
        linear.zero_point.fill_(2 ** (format.bits - 1))


@dataclass(frozen=True)
class Call:
    """run   one forward; may run again and again, and then does the same
    kv_bytes of the cache that it reads and writes
    """

    run: Callable[[], object]
    kv_bytes: int


class Contender:
    """One way to run a model. compiled: by torch.compile, and a cache of fixed size."""

    def __init__(self, name: str, model: PreTrainedModel, compiled: bool = False):
        self.name, self.model = name, model
        self.is_packed = hasattr(model, "lowbit_config")
        self.kv = model.lowbit_config.format.kv if self.is_packed else None
        self.is_static = compiled or self.kv is not None
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        self.is_compiled = compiled

    @property
    def weight_bytes(self) -> int:
        """Of all parameters, the embedding's too."""
        return sum(p.nbytes for p in self.model.parameters())

    def prefill(self, batch: int, tokens: int) -> Call:
        """Of prompts, to the logits of their last tokens.

        Compiled, transformers keeps no cache, which is in its favour: it stores nothing, and its
        attention needs no mask for a cache of fixed size.
        """
        self._forget_shapes()
        ids = self._random_ids(batch, tokens)
        if self.kv is None and self.is_static:
            return Call(lambda: self.forward(ids, use_cache=False, logits_to_keep=1), 0)
        if self.kv is None:
            config = self.model.config
            kv_bytes = self._bf16_kv_bytes(batch, tokens)
            return Call(
                lambda: self.forward(
                    ids, past_key_values=DynamicCache(config=config), logits_to_keep=1
                ),
                kv_bytes,
            )
        cache = self._quantized_cache(batch, tokens)

        def run():
            cache.table.clear()
            return self.forward(ids, past_key_values=cache, logits_to_keep=1)

        return Call(run, cache.nbytes)

    def decode(self, batch: int, context: int, compiled: bool = True) -> Call:
        """Of one token a sequence, which is the last of `context` in the cache."""
        self._forget_shapes()
        forward = self.forward if compiled else self.model
        ids = self._random_ids(batch, 1)
        if self.kv is not None:
            cache = self._quantized_cache(batch, context)
            lengths, kv_bytes = [cache.table.seen, cache.table.columns], cache.nbytes
        elif self.is_static:
            cache = StaticCache(self.model.config, max_cache_len=context)
            self.model(ids, past_key_values=cache)  # makes its tensors
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
            lengths = [layer.cumulative_length for layer in cache.layers]
            kv_bytes = self._bf16_kv_bytes(batch, context)
        else:
            return self._decode_growing(ids, context)

        def run():
            for length in lengths:
                length.fill_(context - 1)
            return forward(ids, past_key_values=cache)

        return Call(run, kv_bytes)

    def _forget_shapes(self):
        """Before each case: dynamo compiles a function for eight shapes and runs others as they
        are."""
        if self.is_compiled:
            torch.compiler.reset()

    def _decode_growing(self, ids: Tensor, context: int) -> Call:
        cache, config = DynamicCache(config=self.model.config), self.model.config
        shape = (len(ids), config.num_key_value_heads, context - 1, config.head_dim)
        before = [torch.randn(shape, dtype=DTYPE, device=ids.device) for _ in range(2)]
        for index in range(config.num_hidden_layers):
            cache.update(before[0].clone(), before[1].clone(), index)
        kept = [(layer.keys, layer.values) for layer in cache.layers]

        def run():
            for layer, (keys, values) in zip(cache.layers, kept, strict=True):
                layer.keys, layer.values = keys, values
            return self.forward(ids, past_key_values=cache)

        return Call(run, self._bf16_kv_bytes(len(ids), context))

    def _quantized_cache(self, batch: int, tokens: int) -> StaticQuantKVCache:
        cache = StaticQuantKVCache(self.model.config, self.kv, max_length=tokens)
        self.model(self._random_ids(batch, 1), past_key_values=cache)  # makes its tensors
        for layer in cache.layers:
            pages = layer.pages
            for codes in (pages.k_codes, pages.v_codes):
                codes.random_(0, 256)
            for scale in (pages.k_scale, pages.v_scale):
                scale.fill_(2.0**-self.kv.bits)
            for zero_point in (pages.k_zero_point, pages.v_zero_point):
                zero_point.fill_(2 ** (self.kv.bits - 1))
        return cache

    def _bf16_kv_bytes(self, batch: int, tokens: int) -> int:
        c = self.model.config
        elements = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        return batch * tokens * elements * DTYPE.itemsize

    def _random_ids(self, batch: int, tokens: int) -> Tensor:
        size = (batch, tokens)
        return torch.randint(self.model.config.vocab_size, size, device=self.model.device)


def largest_batch(contender: Contender, context: int) -> int:
    """Sequences of `context` tokens that a decoding step has memory for on this GPU; 0: not one."""
    fits, too_many = 0, None
    batch = 1
    while too_many is None or too_many - fits > 1:
        if _has_room(contender, batch, context):
            fits = batch
        else:
            too_many = batch
        batch = 2 * fits if too_many is None else (fits + too_many) // 2
    return fits


def _has_room(contender: Contender, batch: int, context: int) -> bool:
    try:
        call = contender.decode(batch, context, compiled=False)
        call.run()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        call = None
        gc.collect()
        torch.cuda.empty_cache()
    return True
