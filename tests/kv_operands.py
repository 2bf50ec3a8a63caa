"""What the tests of the KV cache's ops append and attend to, and how they call the kernels."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, poison
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowbit.formats import IntFormat, Layout
from lowbit.ops import KVPages, dequantize, kv_append, kv_attention, quantize
from lowbit.ops.kv_append import CACHE
from lowbit.ops.kv_attention import NewTokens

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROTATED = pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])

MARKS = {"cuda": pytest.mark.emulate, "triton": pytest.mark.interpret}


def kernels(names: str = "", **cases):
    """Parametrizes a test by `backend`, and by `names` with the cases of each: cuda=, triton=.

    A case is a tuple where there are several names. Without names the test runs once on each.
    """
    names = [name for name in names.split(",") if name]
    cases = cases if names else dict.fromkeys(MARKS, [()])
    rows = [(b, *(c if len(names) != 1 else [c])) for b in MARKS for c in cases[b]]
    return pytest.mark.parametrize(
        ["backend", *names],
        [pytest.param(*row, marks=MARKS[row[0]], id="-".join(map(str, row))) for row in rows],
    )


def poison_of(t: Tensor) -> float:
    return float("nan") if t.is_floating_point() else 0xCC


def poison_pages(pages: KVPages) -> KVPages:
    for t in pages.tensors:
        t.fill_(poison_of(t))
    return pages


# kv_append

NUM_PAGES, PAGE_SIZE = 3, 4
SLOT = torch.tensor([11, 0, 4, 7, 2])  # of 12; every page is touched, none is filled


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor


def angles(T: int, R: int) -> tuple[Tensor, Tensor]:
    """cos and sin as Llama makes them: R / 2 frequencies, twice."""
    frequency = 10000.0 ** (-torch.arange(0, R, 2) / R)
    angle = torch.arange(3, 3 + T)[:, None] * torch.cat((frequency, frequency))
    return angle.cos(), angle.sin()


def inputs(T=5, Hq=4, Hkv=2, D=64, R=None, dtype=torch.float32) -> Inputs:
    q, k, v = (torch.randn(T, H, D).to(dtype) for H in (Hq, Hkv, Hkv))
    return Inputs(q, k, v, *angles(T, R or D))


def exact_inputs(T=5, Hq=4, Hkv=2, D=64, R=None) -> Inputs:
    """Small integers, and quarter turns: RoPE gives integers and H_64 / 8 gives eighths."""
    q, k, v = (torch.randint(-8, 9, (T, H, D)).float() for H in (Hq, Hkv, Hkv))
    turns = torch.randint(0, 4, (T, (R or D) // 2)).repeat(1, 2)
    cos, sin = (torch.tensor(t)[turns] for t in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]))
    return Inputs(q, k, v, cos, sin)


def narrowed(x: Inputs, dtype: torch.dtype) -> Inputs:
    return x._replace(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))


def poisoned(Hkv=2, D=64, bits=4) -> KVPages:
    return poison_pages(KVPages.allocate(NUM_PAGES, PAGE_SIZE, Hkv, D, bits))


def append(backend: str, x: Inputs, slot=SLOT, bits=4, **options) -> tuple[Tensor, ...]:
    """q_out and the six tensors of a cache that was poison: what is not stored is seen too."""
    pages = poisoned(x.k.shape[1], x.q.shape[-1], bits)
    with poison():
        q = kv_append(*x, slot, pages, **options, backend=backend)
    return q, *pages.tensors


def assert_same(backend: str, x: Inputs, slot=SLOT, bits=4, **options):
    """The kernel gives the bits of the reference."""
    got, expected = (append(name, x, slot, bits, **options) for name in (backend, "reference"))
    assert_bitwise(got, expected)


# kv_attention

NEW = ("k_new", "v_new", "cached_lens")
NOWHERE = 2**30  # a page number that must never be looked up


class Batch(NamedTuple):
    """(cached tokens, queries) of every sequence, and the call's sliding window."""

    sequences: tuple[tuple[int, int], ...]
    window: int = 0


@dataclass(frozen=True)
class Cache:
    """A filled paged cache, and the numbers in it: one [length, num_kv_heads, D] a sequence.

    new: the tokens that are not read from it.
    """

    pages: KVPages
    block_table: Tensor
    seq_lens: Tensor
    k: list[Tensor]
    v: list[Tensor]
    new: NewTokens | None = None


def filled(keys: list[Tensor], values: list[Tensor], bits=4, page_size=16, seed=0) -> Cache:
    """Sequences quantized into pages in random order; every slot that holds no token is poison."""
    lengths = [len(k) for k in keys]
    used = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = poison_pages(KVPages.allocate(len(order), page_size, *keys[0].shape[1:], bits))
    table = torch.full((len(keys), max(used) + 1), NOWHERE, dtype=torch.int32)
    numbers = {"k": [], "v": []}
    for b, length in enumerate(lengths):
        table[b, : used[b]] = torch.tensor([order.pop() for _ in range(used[b])])
        position = torch.arange(length)
        where = (table[b, position // page_size].long(), position % page_size)
        for name, x in (("k", keys[b]), ("v", values[b])):
            t = quantize(x, IntFormat(bits, symmetric=False), 1.0, Layout.ROW_MAJOR, torch.float16)
            getattr(pages, f"{name}_codes")[where] = t.codes
            getattr(pages, f"{name}_scale")[where] = t.scale.squeeze(-1)
            getattr(pages, f"{name}_zero_point")[where] = t.zero_point.squeeze(-1)
            numbers[name].append(dequantize(t, torch.float64))
    return Cache(pages, table, torch.tensor(lengths, dtype=torch.int32), **numbers)


def random_cache(batch: Batch, Hkv=3, D=64, bits=4, page_size=16) -> Cache:
    shapes = [(length, Hkv, D) for length, _ in batch.sequences]
    keys, values = ([torch.randn(s) for s in shapes] for _ in "kv")
    return filled(keys, values, bits, page_size)


def query_start(batch: Batch) -> Tensor:
    counts = torch.tensor([0, *(n for _, n in batch.sequences)])
    return counts.cumsum(0).to(torch.int32)


def with_new(cache: Cache, batch: Batch, dtype=torch.float32, pads=0, unowned=0) -> Cache:
    """The queries' own tokens, but for the first `pads` of them, in full precision instead.

    Poison is where nobody may look: their slots, and rows that stand for no such token.
    """
    _, Hkv, D = cache.k[0].shape
    T = sum(n for _, n in batch.sequences) + unowned
    new = {name: torch.full((T, Hkv, D), torch.nan, dtype=dtype) for name in "kv"}
    numbers, cached = {"k": list(cache.k), "v": list(cache.v)}, []
    pages = replace(cache.pages, **{name: getattr(cache.pages, name).clone() for name in CACHE})
    for b, ((length, n), end) in enumerate(
        zip(batch.sequences, query_start(batch)[1:].tolist(), strict=True)
    ):
        count = min(max(n - pads, 0), length)
        cached.append(length - count)
        for name in "kv":
            own = torch.randn(count, Hkv, D).to(dtype)
            new[name][end - count : end] = own
            numbers[name][b] = torch.cat((numbers[name][b][: length - count], own.double()))
        position = torch.arange(length - count, length)
        page = cache.block_table[b, position // pages.page_size].long()
        for t in pages.tensors:
            t[page, position % pages.page_size] = poison_of(t)
    lens = torch.tensor(cached, dtype=torch.int32)
    return replace(cache, pages=pages, new=NewTokens(*new.values(), lens), **numbers)


def attend(
    q: Tensor, cache: Cache, batch: Batch, scaling: float | None = None, backend: str | None = None
) -> Tensor:
    """kv_attention into poisoned memory."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    where = cache.block_table, cache.seq_lens, query_start(batch)
    with poison():
        return kv_attention(
            q, cache.pages, *where, scaling, cache.new, batch.window, backend=backend
        )


def torch_attention(q: Tensor, cache: Cache, batch: Batch, dtype: torch.dtype) -> Tensor:
    """scaled_dot_product_attention in dtype, sequence by sequence, the mask written out."""
    outs, start = [], 0
    for b, (length, n) in enumerate(batch.sequences):
        rows = q[start : start + n].to(dtype).transpose(0, 1)
        repeats = q.shape[1] // cache.k[b].shape[1]
        k, v = (
            t[b].to(dtype).transpose(0, 1).repeat_interleave(repeats, 0) for t in (cache.k, cache.v)
        )
        last = length - n + torch.arange(n)[:, None]
        seen = torch.arange(length) <= last
        if batch.window:
            seen &= torch.arange(length) > last - batch.window
        out = scaled_dot_product_attention(rows, k, v, attn_mask=seen)
        outs.append(out.transpose(0, 1))
        start += n
    return torch.cat(outs)


def random_q(batch: Batch, Hq=9, D=64, dtype=torch.float32) -> Tensor:
    return torch.randn(sum(n for _, n in batch.sequences), Hq, D).to(dtype)


def assert_is_torchs(got: Tensor, q: Tensor, cache: Cache, batch: Batch):
    exact = torch_attention(q, cache, batch, torch.float64)
    in_torch = torch_attention(q, cache, batch, got.dtype)
    # A few roundings of numbers of size 1: on short rows torch is now and then exact.
    floor = 4 * torch.finfo(got.dtype).eps
    assert_no_worse_than_torch(got, in_torch, exact, floor)


def check_attention(
    backend: str,
    batch: Batch,
    dtype=torch.float16,
    Hq=3,
    Hkv=1,
    D=64,
    bits=4,
    page_size=16,
    new: int | None = None,
):
    """The kernel is no worse than torch on random numbers; new: as `pads` of with_new."""
    cache = random_cache(batch, Hkv, D, bits, page_size)
    if new is not None:
        cache = with_new(cache, batch, dtype, new)
    q = random_q(batch, Hq, D, dtype)
    assert_is_torchs(attend(q, cache, batch, backend=backend), q, cache, batch)


def attention_arguments(D=64, bits=4, dtype=torch.float32, new=False) -> dict:
    """A valid call of the op: two sequences, 3 queries in all."""
    batch = Batch(((20, 2), (5, 1)))
    cache = random_cache(batch, D=D, bits=bits)
    if new:
        cache = with_new(cache, batch, dtype)
    return {
        "q": random_q(batch, D=D, dtype=dtype),
        **dict(zip(CACHE, cache.pages.tensors, strict=True)),
        "block_table": cache.block_table,
        "seq_lens": cache.seq_lens,
        "query_start": query_start(batch),
        **dict(zip(NEW, cache.new or (None,) * 3, strict=True)),
        "bits": bits,
        "scaling": 0.125,
        "window": 0,
    }
