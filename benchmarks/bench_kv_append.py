"""kv_append: M new tokens of one layer, with the head rotation, into int4 and int8 pages."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Model, Setup
from lowbit.nn.kv_cache import PAGE_SIZE
from lowbit.ops import KVPages
from lowbit.ops.kv_append import KV_APPEND

BITS = (4, 8)


def cases(setup: Setup) -> Iterator[Case]:
    for M in setup.rows:
        for bits in BITS:
            yield _case(setup.device, M, setup.model, bits)


def _case(device, M: int, model: Model, bits: int) -> Case:
    Hq, Hkv, D = model.num_q_heads, model.num_kv_heads, model.head_dim

    def arguments(exact: bool) -> tuple:
        q = inputs.floats((M, Hq, D), torch.bfloat16, device, exact)
        k, v = inputs.floats((2, M, Hkv, D), torch.bfloat16, device, exact)
        num_pages = -(-M // PAGE_SIZE)
        slot = torch.randperm(num_pages * PAGE_SIZE, device=device)[:M]
        pages = KVPages.allocate(num_pages, PAGE_SIZE, Hkv, D, bits, device)
        return q, k, v, *_angles(M, D, device, exact), slot, *pages.tensors, None, True, bits, 1.0

    # q, k, v, cos and sin in bf16, slots in int64, q again, and what one token takes in the cache
    nbytes = 2 * M * D * (2 * Hq + 2 * Hkv + 2) + 8 * M + inputs.cache_bytes(M, Hkv, D, bits)
    return Case(
        KV_APPEND,
        shape_text(M=M, heads=Hq, kv_heads=Hkv, head_dim=D),
        f"bf16 -> kv{bits}",
        inputs.NORMAL,
        arguments,
        partial(_peers, device),
        nbytes=nbytes,
    )


def _angles(M: int, D: int, device, exact: bool) -> tuple[Tensor, Tensor]:
    """cos and sin; exact: of quarter turns, so that RoPE of integers gives integers."""
    if exact:
        turns = torch.randint(0, 4, (M, D // 2), device=device)
        angle = (turns * (torch.pi / 2)).repeat(1, 2)
        return angle.cos().round().bfloat16(), angle.sin().round().bfloat16()
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)
    angle = (torch.arange(M, device=device)[:, None] * frequency).repeat(1, 2)
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def _peers(
    device, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, *_
) -> Peers:
    """RoPE, and k and v in bf16 to their slots: no rotation, nothing is quantized."""
    slots = -(-len(slot) // PAGE_SIZE) * PAGE_SIZE
    keys, values = torch.empty(2, slots, *k.shape[1:], device=device, dtype=k.dtype)

    def rope(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    def append(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[slot], values[slot] = rope(k), v
        return rope(q)

    return {"torch.compile, bf16 cache": partial(peers.compiled, append, q, k, v)}
