"""kv_attention_quant: decode of bench_kv_attention.py up to the o_proj input, its heads mixed where
there is a Hadamard matrix; fused, and as two ops. Prefill is two launches either way."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.bench_kv_attention import BITS, DECODE_ROWS, MOST_TOKENS, attention_case
from benchmarks.harness import Case, Peer, Peers
from benchmarks.shapes import Setup
from lowbit import hadamard
from lowbit.ops.kv_attention import KV_ATTENTION
from lowbit.ops.kv_attention_quant import KV_ATTENTION_QUANT, two_calls
from lowbit.ops.quantize import QUANTIZE

GRID = (4, True, 1.0, False)  # bits, symmetric, clip, packed


def cases(setup: Setup) -> Iterator[Case]:
    for bits in BITS:
        for M in setup.rows:
            for context in setup.contexts:
                if M <= DECODE_ROWS and M * context <= MOST_TOKENS:
                    yield from _cases(setup, bits, M, context)


def _cases(setup: Setup, bits: int, batch: int, context: int) -> Iterator[Case]:
    m = setup.model
    row = m.num_q_heads * m.head_dim
    order, inner = (m.num_q_heads, m.head_dim) if hadamard.exists(m.num_q_heads) else (0, 1)
    attention = attention_case(setup.device, m, bits, batch, 1, context)

    def arguments(exact: bool) -> tuple:
        return *attention.arguments(exact), order, inner, None, *GRID

    fused = replace(
        attention,
        op=KV_ATTENTION_QUANT,
        shape=f"{attention.shape} order={order}",
        dtype=f"{attention.dtype} -> int4",
        arguments=arguments,
        peers=partial(_peers, attention, order, inner),
        nbytes=attention.nbytes + batch * (row + 4 - 2 * row),  # codes and a scale, not bf16
    )
    yield fused
    yield replace(fused, run=_as_two_ops, variant="as two ops", peers=lambda *_args: {})


def _as_two_ops(*args, backend: str):
    attention, quantizer, grid = two_calls(args)
    return quantizer(KV_ATTENTION(*attention, backend=backend).flatten(1), *grid, backend=backend)


def _peers(attention: Case, order: int, inner: int, *args) -> Peers:
    """torch's attentions, each followed by torch.compile's rotation and quantization."""
    x = args[0].flatten(1)
    rotate = peers.rotation(x, order, inner) if order else lambda y: y
    bits, symmetric, clip, packed = GRID

    def in_torch(x: Tensor):
        return QUANTIZE.reference(rotate(x), bits, 0, symmetric, clip, packed, torch.float32)

    def then_quantized(make) -> Peer:
        attend, finish = make(), peers.compiled(in_torch, x)
        for part in (attend, finish):
            if isinstance(part, str):
                return part
        return lambda: (attend(), finish())

    found = attention.peers(*args[: len(args) - 7])
    return {f"{name}, torch.compile": partial(then_quantized, make) for name, make in found.items()}
