"""QuantAttention: attention over a quantized paged cache, with transformers' signature.

    q, k, v = projections of x, q and k through their norms
    q = kv_append(q, k, v)           RoPE, rotation, quantized K and V into the cache
    y = o_proj(kv_attention(q))      over all that the cache holds; one op, kv_attention_quant, with
                                     the rotation and quantization of o_proj's input

Pads are neither projected, stored nor attended; the output in their place is 0.

Of its own forward's tokens a query sees, as `prefill_kv` says:

    quantized   what their pages hold, as of all before
    full        K and V in the model's dtype, as they were before they were quantized. The pages
                hold what they hold either way, and later forwards see that

`full` is for prefill, a forward of several columns. One column, a step of decoding, reads its token
from the page: its kernels and its bits stay. The last piece of a prompt in pieces may be such a
column; the candidates of assisted decoding, several at a time, are prefill.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from lowbit.errors import InputError
from lowbit.formats import IntFormat, PackedTensor
from lowbit.models.spaces import LLAMA_ATTENTION, AttentionParts, window_of
from lowbit.nn.kv_cache import QuantKVCache
from lowbit.nn.linear import QuantLinear, check_same_input, shared_input
from lowbit.nn.online_map import OnlineMap
from lowbit.nn.page_table import Step
from lowbit.nn.static_cache import NEW_COLUMNS
from lowbit.ops import KVPages, kv_append, kv_attention, kv_attention_quant
from lowbit.ops.kv_attention import NewTokens
from lowbit.transforms.online import OnlineTransform

IMPLEMENTATION = "lowbit"  # config._attn_implementation of a model with QuantAttention
QUANTIZED, FULL = PREFILL_KV = ("quantized", "full")


def padding_mask(
    *,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    kv_length: int | None = None,
    kv_offset: int = 0,
    **kind,
) -> Tensor | None:
    """What QuantAttention takes as attention_mask: bool [B, columns], true for tokens, or None.

    The columns of all that was seen; with a static cache of this forward alone: their number does
    not change from token to token.

    transformers calls it with more than it needs, by keyword, in other words in each version.
    """
    is_static = kv_offset == NEW_COLUMNS
    if not is_causal_mask(mask_function, is_step=is_static, **kind):
        raise InputError(
            "quantized attention is causal: packed sequences (position_ids that restart without "
            "an attention_mask) and custom masks are not supported"
        )
    if attention_mask is not None and is_static:
        # a copy: strides of a view would be those of a mask that grows
        return attention_mask[:, -kv_length:].clone(memory_format=torch.contiguous_format)
    return attention_mask


def is_causal_mask(
    mask_function,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    is_step: bool = False,
    **_unused,
) -> bool:
    """Whether a mask of transformers is causal, or a window of local_size, and nothing more.

    What is more forbids the skip. So does a step of decoding with a cache that can be compiled.
    """
    is_window = local_size is not None and (allow_is_causal_skip or is_step)
    return mask_function is causal_mask_function or is_window


def _not_swapped(*_args, **_kwargs):
    raise RuntimeError(
        f"attention implementation {IMPLEMENTATION!r} runs in QuantAttention only: this model's "
        "attention was not swapped"
    )


AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
AttentionInterface.register(IMPLEMENTATION, _not_swapped)


class Place(NamedTuple):
    """Where the tokens of one call go in the cache, and their angles, cos and sin [T, R].

    in_full: they see each other as they are, not what is stored of them.
    """

    step: Step
    pages: KVPages
    cos: Tensor
    sin: Tensor
    in_full: bool

    def rows_of(self, x: Tensor) -> Tensor:
        """x [B, columns, ...] -> [T, ...], without the pads."""
        rows = x.flatten(0, 1)
        return rows if self.step.tokens is None else rows[self.step.tokens]

    def columns_of(
        self, rows: Tensor, shape: tuple[int, ...], pads: Tensor | None = None
    ) -> Tensor:
        """Inverse of rows_of: rows [T, N] -> shape [B, columns, N], pads as in `pads`, or 0."""
        if self.step.tokens is None:
            return rows.view(shape)
        whole = rows.new_zeros(shape) if pads is None else pads.clone()
        whole.flatten(0, 1)[self.step.tokens] = rows
        return whole


class QuantAttention(nn.Module):
    """Stands in for an attention of transformers and keeps its names, over linears of any kind."""

    def __init__(
        self,
        attention: nn.Module,
        kv: IntFormat,
        clip: float = 1.0,
        transform: OnlineTransform | None = None,
        parts: AttentionParts = LLAMA_ATTENTION,
    ):
        super().__init__()
        _check_plain(attention, parts)
        head_dim = attention.head_dim
        if transform is not None and transform.stages != ((head_dim, 1),):
            raise InputError(
                f"the rotation of q and k must have order {head_dim} (head_dim) and inner 1, got "
                f"order {transform.order} and inner {transform.inner}"
            )
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = head_dim, attention.scaling
        self.num_heads = attention.config.num_attention_heads
        self.num_kv_heads = attention.config.num_key_value_heads
        self.has_rope = bool(getattr(attention, "use_rope", True))  # not in every layer of SmolLM3
        self.window = window_of(attention)
        self.kv, self.clip = kv, clip
        self.rotation = None if transform is None else OnlineMap(transform)
        self.replaced, self.parts = type(attention), parts
        for name in (*parts.projections, parts.output):
            setattr(self, name, getattr(attention, name))
        for name in parts.norms:
            setattr(self, name, getattr(attention, name, None))
        check_same_input("attention", *self.projections)
        self.backend: str | None = None
        self.prefill_kv = QUANTIZED
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: QuantKVCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        place = self.place(
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        out = self.output(self.attend(place.rows_of(hidden_states), place))
        return place.columns_of(out, (*hidden_states.shape[:-1], out.shape[-1])), None

    def place(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: QuantKVCache | None = None,
        **kwargs,
    ) -> Place:
        """Room in the cache for the columns of hidden_states; arguments as of forward."""
        _check_call(attention_mask, past_key_values, self.kv, kwargs)
        batch, columns, _ = hidden_states.shape
        cache, layer = past_key_values, self.layer_idx
        if cache is None:  # K and V are quantized all the same, for this call
            cache, layer = self._single_use_cache(columns), 0
        step, pages = cache.step(
            layer, batch, columns, attention_mask, hidden_states.device, self.num_kv_heads
        )
        cos, sin = (t.expand(batch, -1, -1) for t in position_embeddings)
        place = Place(step, pages, cos, sin, self.prefill_kv == FULL and columns > 1)
        return place._replace(cos=place.rows_of(cos), sin=place.rows_of(sin))

    def attend(self, x: Tensor | PackedTensor, place: Place) -> Tensor | PackedTensor:
        """What `output` reads for x [T, hidden], or for x quantized for the projections."""
        step, pages, cos, sin, in_full = place
        q, k, v = self._project(x)
        if not self.has_rope:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        rotate, matrix = self.rotation is not None, None
        if rotate:
            ((_, _, matrix),) = self.rotation.stages(q.device)
        heads = torch.cat((q, k), 1) if in_full else q  # k beside q is rotated, and not quantized
        heads = kv_append(
            heads, k, v, cos, sin, step.slot, pages, rotate, matrix, self.clip, backend=self.backend
        )
        new = None
        if in_full:
            heads, k = (t.contiguous() for t in heads.split((q.shape[1], k.shape[1]), 1))
            new = NewTokens(k, v.contiguous(), step.cached_lens)
        attention = (heads, pages, step.block_table, step.seq_lens, step.query_start, self.scaling)
        return self._attend(*attention, new=new)

    @property
    def projections(self) -> list[nn.Module]:
        """What makes q, k and v, of one input."""
        return self._named(self.parts.projections)

    @property
    def output(self) -> nn.Module:
        """The linear that reads the heads."""
        return getattr(self, self.parts.output)

    def _named(self, names: tuple[str, ...]) -> list[nn.Module]:
        return [getattr(self, name) for name in names]

    def _project(self, x: Tensor | PackedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [T, heads of each, head_dim], before RoPE."""
        x = shared_input(self.projections[0], x)
        outputs = [projection(x) for projection in self.projections]
        if len(outputs) == 1:
            heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
            outputs = outputs[0].split([n * self.head_dim for n in heads], -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in outputs)
        q_norm, k_norm = self._named(self.parts.norms)
        if q_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return q, k, v

    def _attend(self, *attention, new: NewTokens | None) -> Tensor | PackedTensor:
        """The input of the output linear for the arguments of kv_attention."""
        o_proj = self.output
        if not self._quantizes_for(o_proj, attention[0]):
            return kv_attention(*attention, new, self.window, backend=self.backend).flatten(1)
        order, inner = 0, 1
        if o_proj.transform is not None:
            order, inner = o_proj.transform.order, o_proj.transform.inner
        return kv_attention_quant(
            *attention,
            o_proj.activation_format,
            order,
            inner,
            None,
            o_proj.activation_clip,
            o_proj.input_layout,
            new,
            self.window,
            backend=self.backend,
        )

    def _quantizes_for(self, o_proj: nn.Module, q: Tensor) -> bool:
        """Whether attention of q and o_proj's quantizer are one op.

        Not where they were given different backends, or the input is quantized in slices. Nor with
        a rotation that is not a Hadamard matrix: no CUDA kernel has it, and attention would have to
        run elsewhere with it.
        """
        return (
            isinstance(o_proj, QuantLinear)
            and o_proj.quantizes(q)
            and o_proj.slices == 1
            and o_proj.backend == self.backend
            and (o_proj.transform is None or o_proj.transform.kind == "hadamard")
        )

    def _single_use_cache(self, columns: int) -> QuantKVCache:
        return QuantKVCache(
            kv=self.kv,
            num_layers=1,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_length=columns,
        )


def _check_call(mask: Tensor | None, cache, kv: IntFormat, kwargs: dict):
    if mask is not None and mask.dim() != 2:
        raise InputError(
            f"attention_mask must be None or [batch, length], got shape {tuple(mask.shape)}: "
            "quantized attention is causal and takes no other mask"
        )
    if cache is not None and not isinstance(cache, QuantKVCache):
        raise InputError(
            f"past_key_values must be a QuantKVCache or None, got {type(cache).__name__}"
        )
    if cache is not None and cache.kv != kv:
        raise InputError(f"past_key_values must hold {kv}, got {cache.kv}")
    if kwargs.get("output_attentions"):
        raise InputError("output_attentions is not supported: quantized attention keeps no scores")


def _check_plain(attention: nn.Module, parts: AttentionParts):
    """Refuse what this module would silently leave out."""
    kind, config = type(attention).__name__, attention.config
    children = dict(attention.named_children())
    linears = (*parts.projections, parts.output)
    missing = [name for name in linears if name not in children]
    if missing:
        raise InputError(f"{kind} must have {', '.join(linears)}, got none named {missing}")
    of_heads = all(_is_of_heads(children.get(name), attention) for name in parts.norms)
    norms = parts.norms if of_heads else ()
    extra = [name for name, _ in attention.named_parameters(recurse=False)]
    extra += [
        name
        for name, child in children.items()
        if name not in linears + norms and ("norm" in name or any(True for _ in child.parameters()))
    ]
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(attention, name, None) or getattr(config, name, None):
            extra.append(name)
    if extra:
        raise InputError(
            f"quantized KV supports plain causal attention, got {kind} with {sorted(extra)}"
        )


def _is_of_heads(norm: nn.Module | None, attention: nn.Module) -> bool:
    """Whether it normalizes each head by itself: not so in every family that has q_norm."""
    return tuple(getattr(getattr(norm, "weight", None), "shape", ())) == (attention.head_dim,)
