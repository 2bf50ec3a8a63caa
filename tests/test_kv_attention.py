"""kv_attention against torch's own attention in fp64 over the dequantized cache."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, assert_registered
from kv_operands import (
    FLOATS,
    Batch,
    assert_is_torchs,
    attend,
    attention_arguments,
    filled,
    query_start,
    random_cache,
    random_q,
    torch_attention,
    with_new,
)

from lowbit.ops import kv_attention
from lowbit.ops.kv_attention import KV_ATTENTION, QUERY_CHUNK

pytestmark = pytest.mark.usefixtures("seed")

BATCHES = {
    "decode": Batch(((37, 1),)),
    "decode of one": Batch(((1, 1),)),
    "prefill": Batch(((48, 48),)),
    "prefill of a page": Batch(((16, 16),)),
    "prefill of many chunks": Batch(((2 * QUERY_CHUNK + 5, 2 * QUERY_CHUNK + 5),)),
    "chunked prefill": Batch(((3 * QUERY_CHUNK, QUERY_CHUNK + 1),)),
    "ragged": Batch(((1, 1), (37, 37), (64, 1), (65, 0), (150, 70), (0, 0), (33, 2))),
    "ragged decode": Batch(((5, 1), (16, 1), (17, 1), (90, 1))),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_batch(batch, dtype):
    cache, q = random_cache(batch), random_q(batch, dtype=dtype)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)


@pytest.mark.parametrize("D", [2, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (4, 4), (9, 3), (8, 1)])
def test_every_head(Hq, Hkv, D):
    batch = BATCHES["ragged"]
    cache, q = random_cache(batch, Hkv, D), random_q(batch, Hq, D)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)


@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_cache(bits, page_size):
    batch = BATCHES["ragged"]
    cache, q = random_cache(batch, bits=bits, page_size=page_size), random_q(batch)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)


def test_where_the_pages_lie_does_not_matter():
    batch = BATCHES["ragged"]
    shapes = [(length, 3, 64) for length, _ in batch.sequences]
    keys, values = ([torch.randn(s) for s in shapes] for _ in "kv")
    q = random_q(batch)
    one, other = (filled(keys, values, seed=s) for s in (0, 1))
    assert not torch.equal(one.block_table, other.block_table)
    assert_bitwise(attend(q, one, batch), attend(q, other, batch))


def test_sequences_do_not_see_each_other():
    batch = BATCHES["ragged"]
    cache, q = random_cache(batch), random_q(batch)
    together, start = attend(q, cache, batch), query_start(batch).tolist()
    for b, sequence in enumerate(batch.sequences):
        alone = replace(
            cache, block_table=cache.block_table[b : b + 1], seq_lens=cache.seq_lens[b : b + 1]
        )
        rows = slice(start[b], start[b + 1])
        assert_bitwise(attend(q[rows], alone, Batch((sequence,))), together[rows])


@pytest.mark.parametrize("window", [1, 15, QUERY_CHUNK, 149, 500])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_window(batch, window):
    batch = Batch(batch.sequences, window)
    cache, q = random_cache(batch), random_q(batch)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)
    cache = with_new(cache, batch)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)


@pytest.mark.parametrize("first", [1, QUERY_CHUNK, 100, 159])
def test_prefill_in_two_calls(first):
    whole = Batch(((160, 160),))
    cache, q = random_cache(whole), random_q(whole)
    early = replace(cache, seq_lens=torch.tensor([first], dtype=torch.int32))
    got = torch.cat(
        (
            attend(q[:first], early, Batch(((first, first),))),
            attend(q[first:], cache, Batch(((160, 160 - first),))),
        )
    )
    assert_is_torchs(got, q, cache, whole)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_new_tokens_in_full_precision(batch, dtype):
    cache, q = with_new(random_cache(batch), batch, dtype), random_q(batch, dtype=dtype)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("pads", [1, 20, 100])
def test_some_of_the_queries_tokens_in_full_precision(pads, bits):
    """As where pads stand between the tokens of a row and its new ones."""
    batch = BATCHES["ragged"]
    cache = with_new(random_cache(batch, bits=bits, page_size=7), batch, pads=pads)
    q = random_q(batch)
    assert_is_torchs(attend(q, cache, batch), q, cache, batch)


def test_new_tokens_that_are_what_the_pages_hold():
    """The same numbers from either place: the same bits, rows without tokens included."""
    batch = Batch(((30, 7), (3, 5), (0, 2), (4, 4), (9, 0)))
    cache, q = random_cache(batch), torch.randn(20, 9, 64)
    again = with_new(cache, batch, unowned=2)
    for rows, numbers in ((again.new.k, cache.k), (again.new.v, cache.v)):
        for x, cached, end in zip(
            numbers, again.new.cached_lens, query_start(batch)[1:], strict=True
        ):
            rows[end - (len(x) - cached) : end] = x[cached:]
    assert_bitwise(attend(q, again, batch), attend(q, cache, batch))


@pytest.mark.parametrize("batch", [Batch(((64, 64),)), Batch(((64, 5),)), Batch(((64, 1),))])
def test_softmax_picks_exactly_one_visible_position(batch):
    # K[j] = 15 e_j is exact in 4 bits. A query asks for `wanted`, and even more for the position
    # right after the last it may see: out must be V[wanted] to the bit.
    length, n = batch.sequences[0]
    k = 15 * torch.eye(64).repeat(3, 1, 1).transpose(0, 1)
    v = torch.randint(0, 16, (length, 3, 64)).float()
    v[:, :, 0], v[:, :, 1] = 0, 15
    cache = filled([k], [v])
    assert_bitwise(cache.v[0].float(), v)
    last = length - n + torch.arange(n)
    wanted = (torch.rand(n) * (last + 1)).long()
    q = torch.zeros(n, 9, 64)
    q[torch.arange(n), :, wanted] = 100.0
    hidden = last + 1 < length
    q[torch.arange(n)[hidden], :, last[hidden] + 1] = 200.0
    expected = v[wanted].repeat_interleave(3, 1)
    assert_bitwise(attend(q, cache, batch, scaling=1.0), expected)


def test_equal_scores_give_the_exact_mean():
    # q = 0: a query that sees 2^m tokens weighs each by 2^-m.
    v = torch.randint(0, 16, (256, 1, 64)).float()
    v[:, :, 0], v[:, :, 1] = 0, 15
    batch = Batch(((256, 256),))
    out = attend(torch.zeros(256, 2, 64), filled([torch.randn(256, 1, 64)], [v]), batch)
    for m in range(9):
        expected = v[: 2**m].mean(0).expand(2, 64)
        assert_bitwise(out[2**m - 1], expected)


@pytest.mark.parametrize("scaling", [0.25, 1.0, -0.5])
def test_scaling(scaling):
    batch = Batch(((40, 8),))
    cache, q = random_cache(batch), random_q(batch)
    exact = torch_attention(q.double() * (scaling * math.sqrt(64)), cache, batch, torch.float64)
    in_torch = torch_attention(q * (scaling * math.sqrt(64)), cache, batch, torch.float32)
    assert_no_worse_than_torch(attend(q, cache, batch, scaling), in_torch, exact, floor=2.0**-21)


def test_query_that_sees_nothing_gets_zero():
    batch = Batch(((3, 5), (0, 2), (4, 4)))
    cache = random_cache(batch)
    q = random_q(batch)
    got = attend(q, cache, batch)
    assert not got[[0, 1, 5, 6]].any()
    rest = replace(cache, block_table=cache.block_table[::2], seq_lens=cache.seq_lens[::2])
    expected = attend(q[[2, 3, 4, 7, 8, 9, 10]], rest, Batch(((3, 3), (4, 4))))
    assert_bitwise(got[[2, 3, 4, 7, 8, 9, 10]], expected)


def test_rows_of_no_sequence_get_zero():
    batch = Batch(((20, 2),))
    cache, q = random_cache(batch), torch.randn(6, 9, 64)
    got = attend(q, cache, batch)
    assert_bitwise(got[:2], attend(q[:2], cache, batch))
    assert not got[2:].any()


@pytest.mark.parametrize("T", [0, 3])
def test_no_sequences(T):
    cache = random_cache(Batch(((4, 1),)))
    none = torch.zeros(0, 1, dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int32)
    out = kv_attention(torch.ones(T, 9, 64), cache.pages, none, none[:, 0], start, 0.125)
    assert out.shape == (T, 9, 64) and not out.any()


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_token_that_is_not_finite_reaches_only_who_sees_it(name, value):
    batch = Batch(((30, 1), (30, 1), (20, 1)))
    cache, q = random_cache(batch), random_q(batch)
    expected = attend(q, cache, batch)
    getattr(cache.pages, name)[cache.block_table[1, 0].long(), 3, 1] = float(value)
    got = attend(q, cache, batch)
    assert got[1, 3:6].isnan().all()
    got[1, 3:6] = expected[1, 3:6]
    assert_bitwise(got, expected)
    early = replace(cache, seq_lens=torch.tensor([30, 3, 20], dtype=torch.int32))
    assert attend(q, early, batch).isfinite().all()


def test_inputs_are_left_alone():
    batch = BATCHES["ragged"]
    cache, q = random_cache(batch), random_q(batch)
    kept, pages = q.clone(), [t.clone() for t in cache.pages.tensors]
    attend(q, cache, batch)
    assert_bitwise((q, *cache.pages.tensors), (kept, *pages))


def test_sequence_longer_than_its_pages():
    batch = Batch(((20, 1),))
    cache, q = random_cache(batch), random_q(batch)
    cut = replace(cache, block_table=cache.block_table[:, :1])
    with pytest.raises(ValueError, match="sequence 0 has 20 tokens, more than the 1 pages of 16"):
        attend(q, cut, batch)


@pytest.mark.parametrize("cached", [17, 21])
def test_cached_lens_that_the_queries_do_not_complete(cached):
    lens = torch.tensor([cached, 4], dtype=torch.int32)
    arguments = attention_arguments(new=True) | {"cached_lens": lens}
    with pytest.raises(ValueError, match=f"no more than the 2 queries of the 20 .* got {cached}"):
        KV_ATTENTION(*arguments.values())


I32 = torch.int32
SHAPES = r"must have shapes \[B, P\], \[B\] and \[B \+ 1\]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 576)}, r"q must have shape \[T, num_q_heads, head_dim\]"),
        ({"q": torch.zeros(3, 9, 64).long()}, "q must be .* got torch.int64"),
        ({"q": torch.zeros(3, 8, 64)}, "k_codes must have shape .* num_kv_heads dividing 8"),
        ({"q": torch.zeros(3, 9, 80)}, r"k_codes must be torch.uint8 of shape \(.*, 16, 3, 40\)"),
        ({"bits": 8}, r"k_codes must be torch.uint8 of shape \(.*, 16, 3, 64\)"),
        ({"bits": 1}, r"bits must be in 2\.\.8, got 1"),
        ({"v_scale": torch.zeros(5, 16, 3)}, "v_scale must be torch.float16"),
        ({"block_table": torch.zeros(2, 3).long()}, "block_table must be int32"),
        ({"seq_lens": torch.ones(2).long()}, "seq_lens must be int32"),
        ({"query_start": torch.zeros(3).long()}, "query_start must be int32"),
        ({"block_table": torch.zeros(2, dtype=I32)}, f".*{SHAPES}"),
        ({"seq_lens": torch.zeros(3, dtype=I32)}, f".*{SHAPES}"),
        ({"query_start": torch.zeros(2, dtype=I32)}, f".*{SHAPES}"),
        ({"window": -1}, "window must be at least 0, which is none, got -1"),
    ],
)
def test_wrong_argument(change, message):
    with pytest.raises(ValueError, match=f"kv_attention: {message}"):
        KV_ATTENTION(*(attention_arguments() | change).values())


ALL_OF_THEM = "k_new, v_new, cached_lens must be given together"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_new": None}, f"{ALL_OF_THEM}, got no k_new"),
        ({"k_new": None, "v_new": None}, f"{ALL_OF_THEM}, got no k_new"),
        ({"cached_lens": None}, f"{ALL_OF_THEM}, got no cached_lens"),
        ({"k_new": torch.zeros(3, 3, 64).half()}, "k_new must be torch.float32 of shape"),
        ({"v_new": torch.zeros(3, 9, 64)}, r"v_new must be .* \(3, 3, 64\), got .* \(3, 9, 64\)"),
        ({"cached_lens": torch.zeros(2)}, r"cached_lens must be torch.int32 of shape \(2,\)"),
        ({"cached_lens": torch.zeros(3, dtype=I32)}, r"cached_lens must be .* got .* \(3,\)"),
    ],
)
def test_wrong_new_tokens(change, message):
    with pytest.raises(ValueError, match=f"kv_attention: {message}"):
        KV_ATTENTION(*(attention_arguments(new=True) | change).values())


def test_backend_that_cannot_says_so():
    with pytest.raises(RuntimeError, match="cuda: the CUDA kernel takes fp16 and bf16"):
        KV_ATTENTION(*attention_arguments().values(), backend="cuda")


def test_registered():
    for new in (False, True):
        assert_registered(KV_ATTENTION, *attention_arguments(new=new).values())
