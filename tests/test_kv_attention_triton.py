"""Triton's kv_attention in the interpreter, on the caches of test_kv_attention.py.

The interpreter has no inline assembly, computes bf16 in fp32 and truncates to it; test_compile.py
sees the instructions that replace what runs here.
"""

import re
from dataclasses import replace

import pytest
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

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # nan

# A split is at least 128 positions, a tile of decode 16 rows, of prefill 64 or 128.
MIXED = Batch(((7, 7), (1, 1), (65, 0), (0, 0), (133, 9), (18, 2)))
DECODE = Batch(((260, 1), (128, 1), (129, 1), (0, 0), (17, 1)))
BATCHES = {
    "decode": Batch(((37, 1),)),
    "decode in splits": DECODE,
    "two queries each": Batch(((130, 2), (2, 2), (33, 2))),
    "prefill": Batch(((50, 50),)),
    "chunked prefill in splits": Batch(((260, 22),)),
    "mixed": MIXED,
}


def triton(q: Tensor, cache: Cache, batch: Batch, scaling: float | None = None) -> Tensor:
    with poison():
        return attend(q, cache, batch, scaling, backend="triton")


def check(batch: Batch, dtype=torch.float16, Hq=3, Hkv=1, D=64, bits=4, page_size=16):
    cache = random_cache(batch, Hkv, D, bits, page_size)
    q = random_q(batch, Hq, D, dtype)
    assert_is_torchs(triton(q, cache, batch), q, cache, batch)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_batch(batch):
    check(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype(dtype):
    check(Batch(((7, 7), (0, 0), (133, 3))), dtype, 4, 2)


@pytest.mark.parametrize("D", [4, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("batch", [Batch(((33, 1), (20, 1))), Batch(((25, 25),))], ids=str)
def test_every_head_dim(batch, D):
    check(batch, Hq=4, Hkv=1, D=D)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (2, 2), (4, 1), (8, 1), (16, 1), (40, 2)])
@pytest.mark.parametrize("batch", [Batch(((33, 1), (20, 1))), Batch(((25, 7), (3, 3)))], ids=str)
def test_every_group_of_heads(batch, Hq, Hkv):
    check(batch, Hq=Hq, Hkv=Hkv)


@pytest.mark.parametrize(("bits", "page_size"), [(2, 10), (4, 64), (6, 64), (8, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_cache(bits, page_size, dtype):
    check(Batch(((133, 1), (33, 5))), dtype, 2, 1, bits=bits, page_size=page_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [Batch(((60, 12),)), Batch(((200, 2),))], ids=str)
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
    got = triton(q.to(dtype), filled([k], [v]), batch, scaling=1.0)
    assert_bitwise(got, v[wanted].repeat_interleave(2, 1).to(dtype))


@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**12])
def test_one_visible_position_is_v_whatever_its_scale(scale):
    # scale / 15 is no power of two, and fp16 narrows it: out is what is in the cache all the same.
    batch = Batch(((1, 1), (1, 1)))
    v = [scale * torch.rand(1, 2, 64) for _ in range(2)]
    cache = filled([torch.randn(1, 2, 64) for _ in range(2)], v)
    expected = torch.cat(cache.v).repeat_interleave(3, 1)
    q = random_q(batch, 6)
    assert_bitwise(triton(q, cache, batch), expected.float())
    assert_bitwise(triton(q.half(), cache, batch), expected.float().half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", [64, 256])
def test_equal_scores_give_the_exact_mean(length, dtype):
    # q = 0: a query that sees 2^m tokens weighs each by 2^-m; 256 of them are in two splits.
    v = torch.randint(0, 16, (length, 1, 64)).float()
    v[:, :, 0], v[:, :, 1] = 0, 15
    batch = Batch(((length, 1),))
    out = triton(
        torch.zeros(1, 2, 64, dtype=dtype), filled([torch.randn(length, 1, 64)], [v]), batch
    )
    assert_bitwise(out[0], v.mean(0).expand(2, 64).to(dtype))


def test_small_values_do_not_vanish_in_fp16():
    # Weights of 2^-12 to 1 and values of 2^-12 and less: their product is below fp16's 2^-24.
    batch = Batch(((200, 1),))
    values = torch.randn(200, 2, 64) * 2.0**-12
    values[100] *= 2**12  # of a later tile than the first
    cache = filled([torch.randn(200, 2, 64) * 2], [values], bits=4)
    q = random_q(batch, 6, dtype=torch.float16)
    assert_is_torchs(triton(q, cache, batch), q, cache, batch)
    small = replace(cache, v=[t * 2.0**-11 for t in cache.v])
    small.pages.v_scale.mul_(2.0**-11)
    exact = attend(q.double(), small, batch)
    assert (triton(q.float(), small, batch) - exact).abs().max() < 2.0**-20 * exact.abs().max()
    got = triton(q, small, batch).double()
    assert (got - exact).abs().max() <= 2.0**-24 + 2.0**-9 * exact.abs().max()


@pytest.mark.parametrize("scaling", [0.0, -0.5])
def test_scaling(scaling):
    batch = Batch(((40, 3), (130, 1)))
    cache, q = random_cache(batch, 1), random_q(batch, 2)
    exact = attend(q.double(), cache, batch, scaling)
    assert (triton(q, cache, batch, scaling) - exact).abs().max() < 2.0**-18


@pytest.mark.parametrize("cached", [3, 140])
def test_rows_that_see_nothing_get_zero(cached):
    # n > L, L = 0, and rows of no sequence; without splits and with, where nobody may write them.
    batch = Batch(((3, 5), (0, 2), (cached, 1)))
    cache = random_cache(batch, 1)
    q = torch.randn(12, 3, 64).half()
    got = triton(q, cache, batch)
    assert not got[[0, 1, 5, 6, 8, 9, 10, 11]].any()
    seen = Batch(((3, 3), (cached, 1)))
    rest = replace(cache, block_table=cache.block_table[::2], seq_lens=cache.seq_lens[::2])
    assert_bitwise(got[[2, 3, 4, 7]], triton(q[[2, 3, 4, 7]], rest, seen))


def test_no_queries_and_no_sequences():
    cache = random_cache(Batch(((4, 1),)))
    none, start = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for T in (0, 3):
        q = torch.ones(T, 9, 64)
        out = kv_attention(q, cache.pages, none, none[:, 0], start, 0.1, backend="triton")
        assert out.shape == (T, 9, 64) and not out.any()
    assert triton(torch.ones(0, 9, 64), cache, Batch(((4, 0),))).shape == (0, 9, 64)


@pytest.mark.parametrize("batch", [Batch(((20, 1), (150, 1))), Batch(((30, 4), (40, 6)))])
@pytest.mark.parametrize(
    ("name", "value"),
    [("k_scale", "nan"), ("k_scale", "inf"), ("v_scale", "nan"), ("v_scale", "inf")],
)
def test_token_that_is_not_finite_reaches_only_who_sees_it(name, value, batch):
    cache, q = random_cache(batch, 2), random_q(batch, 4, dtype=torch.float16)
    expected = triton(q, cache, batch)
    getattr(cache.pages, name)[cache.block_table[1, 0].long(), 3, 1] = float(value)
    got = triton(q, cache, batch)
    rows = slice(*query_start(batch).tolist()[1:3])
    assert got[rows, 2:4].isnan().all()
    got[rows, 2:4] = expected[rows, 2:4]
    assert_bitwise(got, expected)
    early = replace(cache, seq_lens=torch.tensor([20, 3], dtype=torch.int32))
    assert triton(q, early, batch).isfinite().all()


def test_where_the_pages_lie_does_not_matter():
    batch = Batch(((130, 2), (33, 1)))
    shapes = [(length, 1, 64) for length, _ in batch.sequences]
    keys, values = ([torch.randn(s) for s in shapes] for _ in "kv")
    q = random_q(batch, 2).half()
    one, other = (filled(keys, values, seed=s) for s in (0, 1))
    assert not torch.equal(one.block_table, other.block_table)
    assert_bitwise(triton(q, one, batch), triton(q, other, batch))


def test_operands_that_are_not_contiguous():
    batch = Batch(((40, 2), (33, 1)))
    cache, q = random_cache(batch, 1), random_q(batch, 2).half()
    expected = triton(q, cache, batch)
    moved = cache.block_table.T.contiguous().T
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not moved.is_contiguous() and not q.is_contiguous()
    assert_bitwise(triton(q, replace(cache, block_table=moved), batch), expected)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, 2), (torch.float16, 4), (torch.float16, 8)]
    + [(torch.bfloat16, 2), (torch.bfloat16, 4)], ids=str,
)  # fmt: skip
def test_inline_assembly_on_every_word(dtype, bits):
    # The interpreter has none: done here by hand, with the constants that it holds.
    import triton.language as tl

    from lowbit.kernels.kv_attention import expand_asm

    def pair(number: str) -> Tensor:
        half = int(number, 16) & 0xFFFF
        assert int(number, 16) == half * 0x10001
        return torch.tensor([half], dtype=torch.int32)

    word = torch.arange(2**16, dtype=torch.int32)
    zero_point = torch.tensor([0, 1, 2 ** (bits - 1), 2**bits - 1])
    power = 1024 if dtype == torch.float16 else 128
    addend = -(power + zero_point.to(dtype))
    assert (addend == -(power + zero_point)).all()
    for part in range(16 // bits):
        asm = expand_asm(part, bits, getattr(tl, str(dtype).removeprefix("torch.")))
        form = (
            r"{ .reg .b32 t, one; mov.b32 one, (\w+); shr.u32 t, \$1, (\d+); "
            r"lop3.b32 t, t, (\w+), (\w+), 0xEA; fma.rn.b?f16x2 \$0, t, one, \$2; }"
        )
        one, shift, mask, bit = re.fullmatch(form, asm).groups()
        assert pair(one).to(torch.int16).view(dtype) == 1
        float_bits = ((word >> int(shift)) & pair(mask)) | pair(bit)
        got = float_bits.to(torch.int16).view(dtype)[:, None] + addend
        expected = (word >> (bits * part) & (2**bits - 1))[:, None] - zero_point
        assert_bitwise(got, expected.to(dtype))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(3, 9, 64).double()}, "computes in fp32, q is fp64"),
        ({"bits": 3, "D": 64}, "packed in 2, 4 or 8 bits, bits is 3"),
        ({"bits": 8, "D": 258}, "a head_dim up to 256 .* got 258 of 8 bits"),
        ({"bits": 4, "D": 2}, "whole 16-bit words, got 2 of 4 bits"),
    ],
)
def test_reasons(change, reason):
    arguments = op_arguments()
    if "D" in change:
        batch, D = Batch(((20, 2), (5, 1))), change.pop("D")
        cache = random_cache(batch, D=D, bits=change["bits"])
        names = ("k_codes", "k_scale", "k_zero_point", "v_codes", "v_scale", "v_zero_point")
        arguments |= dict(zip(names, cache.pages.tensors, strict=True))
        arguments |= {"q": random_q(batch, D=D), "block_table": cache.block_table}
    with pytest.raises(RuntimeError, match=f"triton: the Triton kernel .*{reason}"):
        KV_ATTENTION(*(arguments | change).values(), backend="triton")
