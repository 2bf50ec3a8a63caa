"""kv_attention in CUDA, on the caches of test_kv_attention.py."""

import re
from dataclasses import replace

import pytest
import sass
import torch
from helpers import assert_bitwise, poison
from test_kv_attention import (
    Batch,
    Cache,
    assert_is_torchs,
    attend,
    filled,
    op_arguments,
    query_start,
    random_cache,
    random_q,
)
from torch import Tensor

from lowbit.ops import kv_attention
from lowbit.ops.kv_attention import KV_ATTENTION

pytestmark = pytest.mark.emulate
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
BITS = pytest.mark.parametrize("bits", [4, 8])

# A split is at least 256 positions, a step 32 or 128, a tile of decode 16 rows, of prefill 64.
MIXED = Batch(((7, 7), (1, 1), (65, 0), (0, 0), (133, 9), (18, 2)))
DECODE = Batch(((530, 1), (256, 1), (257, 1), (0, 0), (17, 1)))
BATCHES = {
    "decode": Batch(((37, 1),)),
    "decode of one": Batch(((1, 1),)),
    "decode in splits": DECODE,
    "two queries each": Batch(((130, 2), (2, 2), (33, 2))),
    "prefill": Batch(((50, 50),)),
    "prefill of a step": Batch(((32, 32),)),
    "chunked prefill in splits": Batch(((300, 22),)),
    "mixed": MIXED,
}


def cuda(q: Tensor, cache: Cache, batch: Batch, scaling: float | None = None) -> Tensor:
    with poison():
        return attend(q, cache, batch, scaling, backend="cuda")


def check(batch: Batch, dtype=torch.float16, Hq=3, Hkv=1, D=64, bits=4, page_size=16):
    cache = random_cache(batch, Hkv, D, bits, page_size)
    q = random_q(batch, Hq, D, dtype)
    assert_is_torchs(cuda(q, cache, batch), q, cache, batch)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@DTYPES
@BITS
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_batch(batch, bits, dtype):
    check(batch, dtype, bits=bits)


@BITS
@pytest.mark.parametrize("D", [16, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("batch", [Batch(((33, 1), (20, 1))), Batch(((25, 25),))], ids=str)
def test_every_head_dim(batch, D, bits):
    check(batch, Hq=4, Hkv=1, D=D, bits=bits)
    check(batch, torch.bfloat16, 4, 2, D, bits)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (2, 2), (4, 1), (8, 1), (16, 1), (9, 3), (40, 2)])
@pytest.mark.parametrize(
    "batch", [Batch(((33, 1), (20, 1))), Batch(((25, 7), (3, 3))), Batch(((70, 40),))], ids=str
)
def test_every_group_of_heads(batch, Hq, Hkv):
    check(batch, Hq=Hq, Hkv=Hkv)


@DTYPES
@pytest.mark.parametrize(("bits", "page_size"), [(4, 1), (4, 64), (5, 7), (6, 64), (8, 10)])
def test_every_cache(bits, page_size, dtype):
    check(Batch(((133, 1), (33, 5), (35, 0))), dtype, 2, 1, bits=bits, page_size=page_size)


@DTYPES
@pytest.mark.parametrize("batch", [Batch(((60, 12),)), Batch(((200, 2),)), Batch(((250, 70),))])
def test_softmax_picks_exactly_one_visible_position(batch, dtype):
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
    got = cuda(q.to(dtype), filled([k], [v]), batch, scaling=1.0)
    assert_bitwise(got, v[wanted].repeat_interleave(2, 1).to(dtype))


@DTYPES
@BITS
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**12])
def test_one_visible_position_is_v_whatever_its_scale(scale, bits, dtype):
    # scale / 15 is no power of two: out is what is in the cache all the same.
    batch = Batch(((1, 1), (1, 1)))
    v = [scale * torch.rand(1, 2, 64) for _ in range(2)]
    cache = filled([torch.randn(1, 2, 64) for _ in range(2)], v, bits)
    expected = torch.cat(cache.v).repeat_interleave(3, 1)
    got = cuda(random_q(batch, 6, dtype=dtype), cache, batch)
    assert_bitwise(got, expected.float().to(dtype))


@DTYPES
@pytest.mark.parametrize("length", [64, 256, 512])
def test_equal_scores_give_the_exact_mean(length, dtype):
    # q = 0: a query that sees 2^m tokens weighs each by 2^-m; 512 of them are in two splits.
    v = torch.randint(0, 16, (length, 1, 64)).float()
    v[:, :, 0], v[:, :, 1] = 0, 15
    batch, q = Batch(((length, 1),)), torch.zeros(1, 2, 64, dtype=dtype)
    out = cuda(q, filled([torch.randn(length, 1, 64)], [v]), batch)
    assert_bitwise(out[0], v.mean(0).expand(2, 64).to(dtype))


def test_small_values_do_not_vanish_in_fp16():
    # Weights of 2^-12 to 1 and values of 2^-12 and less: their product is below fp16's 2^-24.
    batch = Batch(((200, 1),))
    values = torch.randn(200, 2, 64) * 2.0**-12
    values[[100, 150]] *= 2**12  # of a warp's first step, and of another's second
    cache = filled([torch.randn(200, 2, 64) * 2], [values], bits=4)
    q = random_q(batch, 6, dtype=torch.float16)
    assert_is_torchs(cuda(q, cache, batch), q, cache, batch)
    small = replace(cache, v=[t * 2.0**-11 for t in cache.v])
    small.pages.v_scale.mul_(2.0**-11)
    exact = attend(q.double(), small, batch)
    got = cuda(q, small, batch).double()
    assert (got - exact).abs().max() <= 2.0**-24 + 2.0**-9 * exact.abs().max()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**60])
def test_queries_of_any_size(size):
    # bf16 has fp32's range, matrix units get fp16: rows are brought there, each by a power of two.
    batch = Batch(((70, 3),))
    cache = random_cache(batch, 1)
    q = random_q(batch, 4, dtype=torch.bfloat16)
    q[1] *= 2.0**-9
    expected = cuda(q, cache, batch, 0.125)
    assert_bitwise(cuda(q * size, cache, batch, 0.125 / size), expected)
    assert_is_torchs(expected, q, cache, batch)


@pytest.mark.parametrize("scaling", [0.0, -0.5])
def test_scaling(scaling):
    batch = Batch(((40, 3), (530, 1)))
    cache, q = random_cache(batch, 1), random_q(batch, 2, dtype=torch.float16)
    exact = attend(q.double(), cache, batch, scaling)
    in_torch = attend(q.double(), cache, batch, scaling).half().double()
    error = (cuda(q, cache, batch, scaling) - exact).abs().max()
    assert error <= 2 * (in_torch - exact).abs().max() + 2.0**-10


@pytest.mark.parametrize("cached", [3, 300])
def test_rows_that_see_nothing_get_zero(cached):
    # n > L, L = 0, and rows of no sequence; without splits and with, where nobody may write them.
    batch = Batch(((3, 5), (0, 2), (cached, 1)))
    cache = random_cache(batch, 1)
    q = torch.randn(12, 3, 64).half()
    got = cuda(q, cache, batch)
    assert not got[[0, 1, 5, 6, 8, 9, 10, 11]].any()
    seen = Batch(((3, 3), (cached, 1)))
    lengths = cache.seq_lens[::2].contiguous()
    rest = replace(cache, block_table=cache.block_table[::2], seq_lens=lengths)
    assert_bitwise(got[[2, 3, 4, 7]], cuda(q[[2, 3, 4, 7]], rest, seen))


def test_no_queries_and_no_sequences():
    cache = random_cache(Batch(((4, 1),)))
    none, start = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for T in (0, 3):
        q = torch.ones(T, 9, 64).half()
        out = kv_attention(q, cache.pages, none, none[:, 0], start, 0.1, backend="cuda")
        assert out.shape == (T, 9, 64) and not out.any()
    assert cuda(torch.ones(0, 9, 64).half(), cache, Batch(((4, 0),))).shape == (0, 9, 64)


@pytest.mark.parametrize(
    "batch", [Batch(((20, 1), (300, 1))), Batch(((30, 4), (40, 6))), Batch(((20, 20), (90, 80)))]
)
@pytest.mark.parametrize(
    ("name", "value"),
    [("k_scale", "nan"), ("k_scale", "inf"), ("v_scale", "nan"), ("v_scale", "-inf")],
)
def test_token_that_is_not_finite_reaches_only_who_sees_it(name, value, batch):
    cache, q = random_cache(batch, 2), random_q(batch, 4, dtype=torch.float16)
    expected = cuda(q, cache, batch)
    getattr(cache.pages, name)[cache.block_table[1, 0].long(), 3, 1] = float(value)
    got = cuda(q, cache, batch)
    start, stop = query_start(batch).tolist()[1:3]
    length, n = batch.sequences[1]
    first = start + max(0, 3 - (length - n))  # that sees position 3
    assert got[first:stop, 2:4].isnan().all()
    got[start:stop, 2:4] = expected[start:stop, 2:4]
    assert_bitwise(got, expected)
    early = replace(cache, seq_lens=torch.tensor([20, 3], dtype=torch.int32))
    assert cuda(q, early, batch).isfinite().all()


def test_many_sequences():
    """More than a warp looks at together; some without queries."""
    batch = Batch(tuple((5 + 3 * (b % 7), b % 3) for b in range(70)))
    check(batch, Hq=2, Hkv=1)
    check(Batch(tuple((4 + b % 9, 1) for b in range(70))), Hq=2, Hkv=1)


def test_where_the_pages_lie_does_not_matter():
    batch = Batch(((530, 2), (33, 1)))
    shapes = [(length, 1, 64) for length, _ in batch.sequences]
    keys, values = ([torch.randn(s) for s in shapes] for _ in "kv")
    q = random_q(batch, 2).half()
    one, other = (filled(keys, values, seed=s) for s in (0, 1))
    assert not torch.equal(one.block_table, other.block_table)
    assert_bitwise(cuda(q, one, batch), cuda(q, other, batch))


def test_only_out_is_written():
    batch = MIXED
    cache, q = random_cache(batch, 1), random_q(batch, 3).half()
    kept, pages = q.clone(), [t.clone() for t in cache.pages.tensors]
    cuda(q, cache, batch)
    assert_bitwise((q, *cache.pages.tensors), (kept, *pages))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(3, 9, 64)}, "takes fp16 and bf16, q is torch.float32"),
        ({"bits": 3}, "packed in 4 or 8 bits, bits is 3"),
        ({"D": 72}, "a multiple of 16 up to 256, got 72"),
        ({"D": 272}, "a multiple of 16 up to 256, got 272"),
        ({"q": torch.zeros(3, 9, 128).half()[..., ::2]}, "reads contiguous tensors"),
    ],
)
def test_reasons(change, reason):
    arguments = op_arguments()
    D, bits = change.pop("D", 64), change.get("bits", 4)
    cache = random_cache(Batch(((20, 2), (5, 1))), D=D, bits=bits)
    names = ("k_codes", "k_scale", "k_zero_point", "v_codes", "v_scale", "v_zero_point")
    arguments |= dict(zip(names, cache.pages.tensors, strict=True))
    arguments |= {"q": torch.zeros(3, 9, D).half(), "block_table": cache.block_table}
    with pytest.raises(RuntimeError, match=f"cuda: the CUDA kernel .*{reason}"):
        KV_ATTENTION(*(arguments | change).values(), backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_machine_code(architecture):
    """Products of fp16, summed in fp32; codes transposed as they are loaded; copies past L1."""
    seen = 0
    for name, code in sass.kernels_sass(sass.built()[0], architecture).items():
        if "kv_attention_kernel<" in name:
            assert set(re.findall(r"HMMA[.\w]*", code)) == {"HMMA.16816.F32"}, name
            assert {"LDSM.16.M88.4", "LDSM.16.MT88.4"} <= set(re.findall(r"LDSM[.\w]*", code)), name
            assert "LDGSTS.E.BYPASS" in code, name
            seen += 1
    assert seen == 12  # 2 widths of codes, 3 sizes of heads, decode and prefill
