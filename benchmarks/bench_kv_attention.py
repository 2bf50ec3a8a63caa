"""kv_attention: decode of M sequences at each context; past DECODE_ROWS, prefill of M tokens."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Model, Setup
from lowbit.nn.kv_cache import PAGE_SIZE
from lowbit.ops.kv_attention import KV_ATTENTION, NONE_NEW
from lowbit.ops.pack import PACK

BITS = (4, 8)
DECODE_ROWS = 64
MOST_TOKENS = 1 << 20  # of all sequences together: peers keep them in bf16


def cases(setup: Setup) -> Iterator[Case]:
    for bits in BITS:
        for M in setup.rows:
            if M > DECODE_ROWS:
                yield attention_case(setup.device, setup.model, bits, batch=1, queries=M, context=M)
                continue
            for context in setup.contexts:
                if M * context <= MOST_TOKENS:
                    yield attention_case(setup.device, setup.model, bits, M, 1, context)


def attention_case(device, model: Model, bits: int, batch: int, queries: int, context: int) -> Case:
    Hq, Hkv, D = model.num_q_heads, model.num_kv_heads, model.head_dim
    T, pages = batch * queries, -(-context // PAGE_SIZE)

    def arguments(exact: bool) -> tuple:
        tokens = (batch * pages, PAGE_SIZE, Hkv)
        table = torch.randperm(batch * pages, device=device).view(batch, pages)
        make = _needle if exact else _random
        q, cache = make(tokens, table, T, Hq, D, bits, queries > 1, device)
        seq_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        start = torch.arange(0, T + 1, queries, dtype=torch.int32, device=device)
        scaling = 1.0 if exact else D**-0.5
        tables = table.to(torch.int32), seq_lens, start
        return q, *cache, *tables, *NONE_NEW, bits, scaling, 0

    # of n new tokens, the i-th sees context - n + i; two matrix products
    seen = batch * (queries * context - queries * (queries - 1) // 2)
    # q and out in bf16, the tokens, and the int32 tables
    tables = 4 * (batch * pages + 2 * batch + 1)
    nbytes = 4 * T * Hq * D + batch * inputs.cache_bytes(context, Hkv, D, bits) + tables
    return Case(
        KV_ATTENTION,
        shape_text(batch=batch, queries=queries, context=context)
        + f" {shape_text(heads=Hq, kv_heads=Hkv, head_dim=D)}",
        f"bf16 x kv{bits}",
        inputs.NORMAL_AND_CODES,
        arguments,
        partial(_peers, batch, queries, context, (Hq, Hkv, D), device),
        operations=4 * seen * Hq * D,
        nbytes=nbytes,
    )


def _random(tokens: tuple, table: Tensor, T: int, Hq: int, D: int, bits: int, _causal, device):
    """q and the six tensors of a cache, pages in random order."""
    row = (*tokens, D * bits // 8)

    def one() -> tuple[Tensor, Tensor, Tensor]:
        zero_point = torch.randint(0, 1 << bits, tokens, device=device, dtype=torch.uint8)
        scale = inputs.scales(tokens, torch.float16, device, exact=False)
        return inputs.random_bytes(row, device), scale, zero_point

    return inputs.floats((T, Hq, D), torch.bfloat16, device, False), (*one(), *one())


def _needle(tokens: tuple, table: Tensor, T: int, Hq: int, D: int, bits: int, causal, device):
    """Integers, and one position a head whose score is so far above the others' that their
    probabilities are exactly 0: the output is that position's V, in every order of additions.

    In steps of the grid the needle scores 2 * 7 * D, another at most a few times 2 * 5 * sqrt(D).
    """
    num_pages, page_size, Hkv = tokens
    batch, pages = table.shape
    k, v = torch.randint(0, 16, (2, *tokens, D), device=device, dtype=torch.uint8)
    zero_point = torch.full(tokens, 8, device=device, dtype=torch.uint8)
    sign = 2 * torch.randint(0, 2, (batch, Hkv, D), device=device) - 1
    # causal: at position 0, which every query sees; else anywhere up to the last page
    positions = 1 if causal else (pages - 1) * page_size + 1
    position = torch.randint(0, positions, (batch, Hkv), device=device)
    page = table.gather(1, position // page_size)
    head = torch.arange(Hkv, device=device).expand(batch, Hkv)
    k[page, position % page_size, head] = (8 + 7 * sign).to(torch.uint8)
    q = 2 * sign.repeat_interleave(Hq // Hkv, 1).repeat_interleave(T // batch, 0)
    ones = torch.ones(tokens, device=device, dtype=torch.float16)
    cache = (PACK.reference(k, bits), ones, zero_point, PACK.reference(v, bits), ones, zero_point)
    return q.bfloat16(), tuple(t.clone() for t in cache)


def _peers(batch: int, queries: int, context: int, heads: tuple, device, *_args) -> Peers:
    sdpa = partial(peers.sdpa, batch, queries, context, heads, device)
    found = {
        "torch sdpa flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "torch sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    }
    if queries == 1 and heads[0] > heads[1]:
        as_rows = partial(sdpa, SDPBackend.FLASH_ATTENTION, group_as_rows=True)
        found["torch sdpa flash, group as rows"] = as_rows
    return found
