"""kv_attention in CUDA and in Triton, on the caches of kv_operands.py.

Triton's interpreter has no inline assembly, computes bf16 in fp32 and truncates to it;
test_compile.py sees the instructions that replace what runs here.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch
from kv_operands import (
    Batch,
    assert_is_torchs,
    attend,
    check_attention,
    filled,
    kernels,
    query_start,
    random_cache,
    random_q,
    torch_attention,
    with_new,
)

from lowbit.ops import kv_attention
from lowbit.ops.kv_attention import NewTokens

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # nan, in the interpreter
]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"cuda": [FP16, BF16], "triton": [FP32, FP16]}
DECODE, CHUNKS = Batch(((33, 1), (20, 1))), Batch(((25, 7), (3, 3)))

# At least the positions of a split. A step has 32 or 128, a tile of decode 16 rows, of prefill 64
# or 128.
SPLIT = {"cuda": 256, "triton": 128}
THREE_SPLITS = {backend: 2 * split + 18 for backend, split in SPLIT.items()}


def batches(backend: str) -> dict[str, Batch]:
    split, long = SPLIT[backend], THREE_SPLITS[backend]
    return {
        "decode": Batch(((37, 1),)),
        "decode of one": Batch(((1, 1),)),
        "decode in splits": Batch(((long, 1), (split, 1), (split + 1, 1), (0, 0), (17, 1))),
        "two queries each": Batch(((130, 2), (2, 2), (33, 2))),
        "prefill": Batch(((50, 50),)),
        "prefill of a step": Batch(((32, 32),)),
        "chunked prefill in splits": Batch(((split + 44, 22),)),
        "chunked prefill in more splits": Batch(((2 * split + 4, 22),)),
        "mixed": Batch(((7, 7), (1, 1), (65, 0), (0, 0), (133, 9), (18, 2))),
    }


@kernels("dtype,bits", cuda=product(DTYPES["cuda"], [4, 8]), triton=[(FP16, 4)])
@pytest.mark.parametrize("name", batches("cuda"))
def test_every_batch(backend, name, dtype, bits):
    check_attention(backend, batches(backend)[name], dtype, bits=bits)


@kernels(
    "D,bits",
    cuda=product([16, 64, 80, 96, 112, 128, 256], [4, 8]),
    triton=product([4, 64, 80, 96, 128, 256], [4]),
)
@pytest.mark.parametrize(("dtype", "Hkv"), [(FP16, 1), (BF16, 2)], ids=str)
@pytest.mark.parametrize("batch", [DECODE, Batch(((25, 25),))], ids=str)
def test_every_head_dim(backend, batch, dtype, Hkv, D, bits):
    check_attention(backend, batch, dtype, 4, Hkv, D, bits)


@kernels(
    "dtype,bits", cuda=product(DTYPES["cuda"], [4, 8]), triton=[(FP16, 4), (FP32, 8), (BF16, 2)]
)
@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", batches("cuda"))
def test_new_tokens_in_full_precision(backend, name, pads, dtype, bits):
    batch = batches(backend)[name]
    check_attention(backend, batch, dtype, bits=bits, page_size=7, new=pads)


@kernels(
    "D,bits",
    cuda=product([16, 64, 80, 96, 112, 128, 256], [4, 8]),
    triton=product([4, 64, 80, 128], [4]),
)
@pytest.mark.parametrize(("dtype", "Hkv"), [(FP16, 1), (BF16, 2)], ids=str)
def test_new_tokens_of_every_head_dim(backend, dtype, Hkv, D, bits):
    check_attention(backend, Batch(((75, 40), (3, 5))), dtype, 4, Hkv, D, bits, new=0)


@kernels("dtype", **DTYPES)
@pytest.mark.parametrize("size", [2.0**-12, 2.0**12])
def test_new_values_of_any_size(backend, dtype, size):
    """Whether those in the pages are as large, or 2^10 times larger or smaller."""
    batch = Batch(((60, 30),))
    for other in (1.0, 2.0**-10, 2.0**10):
        v = other * size * torch.randn(60, 1, 64)
        cache = with_new(filled([torch.randn(60, 1, 64)], [v]), batch, dtype)
        cache.new.v.mul_(size)
        cache.v[0][30:] = cache.new.v
        q = random_q(batch, 2, dtype=dtype)
        exact, in_torch = (torch_attention(q, cache, batch, t) for t in (torch.float64, dtype))
        got = attend(q, cache, batch, backend=backend)
        floor = 4 * torch.finfo(dtype).eps * size * max(other, 1.0)
        assert_no_worse_than_torch(got, in_torch, exact, floor)


@kernels()
def test_new_tokens_and_rows_that_see_nothing(backend):
    batch = Batch(((3, 5), (0, 2), (40, 20)))
    cache = with_new(random_cache(batch, 1), batch, FP16, unowned=3)
    q = torch.randn(30, 3, 64).half()
    got = attend(q, cache, batch, backend=backend)
    assert not got[[0, 1, 5, 6, 27, 28, 29]].any()
    in_fp64 = NewTokens(cache.new.k.double(), cache.new.v.double(), cache.new.cached_lens)
    exact = attend(q.double(), replace(cache, new=in_fp64), batch)
    assert_no_worse_than_torch(got, exact.half(), exact, 4 * torch.finfo(FP16).eps)


def windows(backend: str) -> dict[str, Batch]:
    """Windows that are and are not whole steps; longer than sequences, than a split, than two."""
    split, long = SPLIT[backend], THREE_SPLITS[backend]
    return {
        "decode": Batch(((37, 1), (20, 1), (5, 1)), 16),
        "of one": Batch(((50, 12), (33, 1)), 1),
        "prefill": Batch(((150, 150),), 41),
        "chunked prefill": Batch(((split + 44, 70), (3, 3)), 64),
        "decode in splits": Batch(((2 * long, 1), (split + 1, 1), (0, 0), (17, 1)), split + 5),
        "longer than two splits": Batch(((2 * long, 2), (9, 1)), 2 * split + 7),
        "queries further apart than a split": Batch(((2 * long, split + 40),), split - 9),
        "longer than all": Batch(((65, 33), (4, 6)), 1000),
    }


@kernels(
    "dtype,bits,new", cuda=product(DTYPES["cuda"], [4, 8], [None, 5]), triton=[(FP16, 4, None)]
)
@pytest.mark.parametrize("name", windows("cuda"))
def test_every_window(backend, name, new, dtype, bits):
    check_attention(backend, windows(backend)[name], dtype, bits=bits, page_size=7, new=new)


@kernels("D", cuda=[80, 128, 256], triton=[80, 256])
def test_a_window_of_every_head_dim(backend, D):
    batch = Batch(((75, 40), (30, 1)), 20)
    check_attention(backend, batch, BF16, 4, 2, D)
    check_attention(backend, batch, BF16, 4, 2, D, new=0)


HEADS = [(1, 1), (2, 2), (4, 1), (8, 1), (16, 1), (9, 3), (40, 2)]


@kernels("batch", cuda=[DECODE, CHUNKS, Batch(((70, 40),))], triton=[DECODE, CHUNKS])
@pytest.mark.parametrize(("Hq", "Hkv"), HEADS)
def test_every_group_of_heads(backend, batch, Hq, Hkv):
    check_attention(backend, batch, Hq=Hq, Hkv=Hkv)


@kernels(
    "dtype,cache",
    cuda=product(DTYPES["cuda"], [(4, 1), (4, 64), (5, 7), (6, 64), (8, 10)]),
    triton=product(DTYPES["triton"], [(2, 10), (4, 64), (6, 64), (8, 10)]),
)
def test_every_cache(backend, dtype, cache):
    bits, page_size = cache
    batch = Batch(((133, 1), (33, 5), (35, 0)))
    check_attention(backend, batch, dtype, 2, 1, bits=bits, page_size=page_size)


PICKED = [Batch(((60, 12),)), Batch(((200, 2),))]


@kernels("batch", cuda=[*PICKED, Batch(((250, 70),))], triton=PICKED)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_softmax_picks_exactly_one_visible_position(backend, batch, dtype):
    # K[j] = 15 e_j, exact in 4 bits. A query asks for `wanted`, and even more for the position
    # right after the last it may see: out must be V[wanted] to the bit.
    length, n = batch.sequences[0]
    D = 64 if length <= 64 else 256
    k = 15 * torch.eye(length, D)[:, None]
    v = torch.randint(0, 16, (length, 1, D)).float()
    v[:, :, 0], v[:, :, 1] = 0, 15
    last = length - n + torch.arange(n)
    wanted = (torch.rand(n) * (last + 1)).long()
    q = torch.zeros(n, 2, D)
    q[torch.arange(n), :, wanted] = 100.0
    hidden = last + 1 < length
    q[torch.arange(n)[hidden], :, last[hidden] + 1] = 200.0
    got = attend(q.to(dtype), filled([k], [v]), batch, scaling=1.0, backend=backend)
    assert_bitwise(got, v[wanted].repeat_interleave(2, 1).to(dtype))


@kernels("dtype,bits", cuda=product(DTYPES["cuda"], [4, 8]), triton=product(DTYPES["triton"], [4]))
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**12])
def test_one_visible_position_is_v_whatever_its_scale(backend, dtype, bits, scale):
    # scale / 15 is no power of two, and fp16 narrows it: out is what is in the cache all the same.
    batch = Batch(((1, 1), (1, 1)))
    v = [scale * torch.rand(1, 2, 64) for _ in range(2)]
    cache = filled([torch.randn(1, 2, 64) for _ in range(2)], v, bits)
    expected = torch.cat(cache.v).repeat_interleave(3, 1)
    got = attend(random_q(batch, 6, dtype=dtype), cache, batch, backend=backend)
    assert_bitwise(got, expected.float().to(dtype))


@kernels(
    "dtype,length",
    cuda=product(DTYPES["cuda"], [64, 256, 512]),
    triton=product(DTYPES["triton"], [64, 256]),
)
def test_equal_scores_give_the_exact_mean(backend, dtype, length):
    # q = 0: a query that sees 2^m tokens weighs each by 2^-m; the most of them are in two splits.
    v = torch.randint(0, 16, (length, 1, 64)).float()
    v[:, :, 0], v[:, :, 1] = 0, 15
    batch, q = Batch(((length, 1),)), torch.zeros(1, 2, 64, dtype=dtype)
    out = attend(q, filled([torch.randn(length, 1, 64)], [v]), batch, backend=backend)
    assert_bitwise(out[0], v.mean(0).expand(2, 64).to(dtype))


@kernels("dtype", cuda=[FP16], triton=[FP16, FP32])
def test_small_values_do_not_vanish(backend, dtype):
    # Weights of 2^-12 to 1 and values of 2^-12 and less: their product is below fp16's 2^-24.
    batch = Batch(((200, 1),))
    values = torch.randn(200, 2, 64) * 2.0**-12
    values[[100, 150]] *= 2**12  # of a later step or tile than the first, and of a warp's second
    cache = filled([torch.randn(200, 2, 64) * 2], [values], bits=4)
    q = random_q(batch, 6, dtype=dtype)
    assert_is_torchs(attend(q, cache, batch, backend=backend), q, cache, batch)
    small = replace(cache, v=[t * 2.0**-11 for t in cache.v])
    small.pages.v_scale.mul_(2.0**-11)
    exact = attend(q.double(), small, batch)
    relative, absolute = {FP16: (2.0**-9, 2.0**-24), FP32: (2.0**-20, 0)}[dtype]
    error = (attend(q, small, batch, backend=backend) - exact).abs().max()
    assert error <= relative * exact.abs().max() + absolute


@kernels("dtype,floor", cuda=[(FP16, 2.0**-10)], triton=[(FP32, 2.0**-18)])
@pytest.mark.parametrize("scaling", [0.0, -0.5])
def test_scaling(backend, dtype, floor, scaling):
    batch = Batch(((40, 3), (THREE_SPLITS[backend], 1)))
    cache, q = random_cache(batch, 1), random_q(batch, 2, dtype=dtype)
    exact = attend(q.double(), cache, batch, scaling)
    got = attend(q, cache, batch, scaling, backend)
    assert_no_worse_than_torch(got, exact.to(dtype), exact, floor)


@kernels("cached", cuda=[3, 300], triton=[3, 140])
def test_rows_that_see_nothing_get_zero(backend, cached):
    # n > L, L = 0, and rows of no sequence; without splits and with, where nobody may write them.
    batch = Batch(((3, 5), (0, 2), (cached, 1)))
    cache = random_cache(batch, 1)
    q = torch.randn(12, 3, 64).half()
    got = attend(q, cache, batch, backend=backend)
    assert not got[[0, 1, 5, 6, 8, 9, 10, 11]].any()
    seen = Batch(((3, 3), (cached, 1)))
    lengths = cache.seq_lens[::2].contiguous()
    rest = replace(cache, block_table=cache.block_table[::2], seq_lens=lengths)
    assert_bitwise(got[[2, 3, 4, 7]], attend(q[[2, 3, 4, 7]], rest, seen, backend=backend))


@kernels()
def test_no_queries_and_no_sequences(backend):
    cache = random_cache(Batch(((4, 1),)))
    none, start = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for T in (0, 3):
        q = torch.ones(T, 9, 64).half()
        out = kv_attention(q, cache.pages, none, none[:, 0], start, 0.1, backend=backend)
        assert out.shape == (T, 9, 64) and not out.any()
    nobody = attend(torch.ones(0, 9, 64).half(), cache, Batch(((4, 0),)), backend=backend)
    assert nobody.shape == (0, 9, 64)


@kernels(
    "batch",
    cuda=[Batch(((20, 1), (300, 1))), Batch(((30, 4), (40, 6))), Batch(((20, 20), (90, 80)))],
    triton=[Batch(((20, 1), (150, 1))), Batch(((30, 4), (40, 6)))],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_token_that_is_not_finite_reaches_only_who_sees_it(backend, name, value, batch):
    cache, q = random_cache(batch, 2), random_q(batch, 4, dtype=FP16)
    expected = attend(q, cache, batch, backend=backend)
    getattr(cache.pages, name)[cache.block_table[1, 0].long(), 3, 1] = float(value)
    got = attend(q, cache, batch, backend=backend)
    start, stop = query_start(batch).tolist()[1:3]
    length, n = batch.sequences[1]
    first = start + max(0, 3 - (length - n))  # that sees position 3
    assert got[first:stop, 2:4].isnan().all()
    got[start:stop, 2:4] = expected[start:stop, 2:4]
    assert_bitwise(got, expected)
    early = replace(cache, seq_lens=torch.tensor([20, 3], dtype=torch.int32))
    assert attend(q, early, batch, backend=backend).isfinite().all()


@kernels()
def test_where_the_pages_lie_does_not_matter(backend):
    batch = Batch(((THREE_SPLITS[backend], 2), (33, 1)))
    shapes = [(length, 1, 64) for length, _ in batch.sequences]
    keys, values = ([torch.randn(s) for s in shapes] for _ in "kv")
    q = random_q(batch, 2).half()
    one, other = (filled(keys, values, seed=s) for s in (0, 1))
    assert not torch.equal(one.block_table, other.block_table)
    outs = [attend(q, cache, batch, backend=backend) for cache in (one, other)]
    assert_bitwise(*outs)


@kernels()
def test_only_out_is_written(backend):
    batch = batches(backend)["mixed"]
    cache, q = random_cache(batch, 1), random_q(batch, 3).half()
    kept, pages = q.clone(), [t.clone() for t in cache.pages.tensors]
    attend(q, cache, batch, backend=backend)
    assert_bitwise((q, *cache.pages.tensors), (kept, *pages))
