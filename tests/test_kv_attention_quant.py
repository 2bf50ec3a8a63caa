"""kv_attention_quant: on each backend the bits of the two ops that it stands for."""

import pytest
import torch
from helpers import assert_bitwise, assert_registered, poison, slow_quantize
from torch import Tensor

from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.hadamard import HadamardOrderError, hadamard_matrix
from lowbit.ops import (
    KVPages,
    hadamard_quant,
    kv_attention,
    kv_attention_quant,
    quantize,
    to_layout,
)
from lowbit.ops.kv_attention import NewTokens
from lowbit.ops.kv_attention_quant import KV_ATTENTION_QUANT

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
# (cached tokens, queries) of each sequence; two queries see nothing
RAGGED = ((37, 1), (0, 1), (65, 3), (5, 5), (9, 0), (2, 3))
ROTATIONS = [(0, 1), (1, 1), (64, 1), (4, 64), (256, 1)]  # order, inner of 4 heads of 64
Call = tuple[Tensor, KVPages, Tensor, Tensor, Tensor, float]


def attention_call(
    sequences, dtype=torch.float16, Hq=4, Hkv=2, D=64, bits=4, page_size=16, unowned=0
) -> Call:
    """What kv_attention takes: random q, with `unowned` rows more than the sequences have, and
    random tokens in pages of random order."""
    used = [-(-length // page_size) for length, _ in sequences]
    order = torch.randperm(sum(used)).to(torch.int32)
    pages = KVPages.allocate(len(order), page_size, Hkv, D, bits)
    for name, t in zip("csz" * 2, pages.tensors, strict=True):
        if name == "s":
            t.copy_(0.5 + torch.rand(t.shape))
        else:
            t.random_(0, 1 << bits if name == "z" else 256)
    table = torch.zeros(len(used), max(used) + 1, dtype=torch.int32)
    for b, part in enumerate(order.split(used)):
        table[b, : len(part)] = part
    lengths, queries = torch.tensor(sequences, dtype=torch.int32).T.contiguous()
    start = torch.tensor([0, *queries.cumsum(0)], dtype=torch.int32)
    q = torch.randn(start[-1] + unowned, Hq, D).to(dtype)
    return q, pages, table, lengths, start, D**-0.5


def two_ops(
    call: Call,
    format: IntFormat,
    order: int = 0,
    inner: int = 1,
    matrix: Tensor | None = None,
    *grid,
    new: NewTokens | None = None,
    window: int = 0,
    **backend,
) -> PackedTensor:
    x = kv_attention(*call, new, window, **backend).flatten(1)
    if order == 0:
        return quantize(x, format, *grid, **backend)
    return hadamard_quant(x, format, order, inner, matrix, *grid, **backend)


def new_tokens(call: Call) -> NewTokens:
    """All of the queries' own tokens, random."""
    q, pages, _, lengths, start, _ = call
    k, v = torch.randn(2, q.shape[0], pages.num_kv_heads, q.shape[2]).to(q.dtype)
    return NewTokens(k, v, (lengths - start.diff()).clamp(min=0).to(torch.int32))


def assert_same(call: Call, format: IntFormat, *rest, **options) -> PackedTensor:
    """The same bits as the two ops on the same backend."""
    expected = two_ops(call, format, *rest, **options)
    with poison():
        got = kv_attention_quant(*call, format, *rest, **options)
    assert_bitwise(got, expected)
    return got


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@SYMMETRIC
@pytest.mark.parametrize(("order", "inner"), ROTATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_two_ops(dtype, order, inner, symmetric):
    call = attention_call(RAGGED, dtype, unowned=2)
    got = assert_same(call, IntFormat(4, symmetric), order, inner, None, 0.9)
    for row in (1, 10, 13, 14):  # that see nothing, and that no sequence owns
        assert got.scale[row] == 2.0**-24 and not got.codes[row].any()


@SYMMETRIC
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_exact_by_hand(dtype, symmetric):
    """One token each: attention is its V, integers, and heads of a KV head are equal."""
    q, pages, table, lengths, start, scaling = attention_call(((1, 1),) * 3, dtype)
    pages.v_scale.fill_(1.0)
    codes = torch.stack((pages.v_codes & 15, pages.v_codes >> 4), -1).flatten(-2).int()
    v = (codes - pages.v_zero_point[..., None].int())[table[:, 0].long(), 0]  # [T, Hkv, D]
    heads = v.repeat_interleave(2, 1)
    mixed = torch.einsum("thd,hg->tgd", heads, hadamard_matrix(4).int())
    for order, inner, rows in ((0, 1, heads), (4, 64, mixed)):
        rows = rows.flatten(1).float() * (0.5 if order else 1.0)
        call = (q, pages, table, lengths, start, scaling)
        got = kv_attention_quant(*call, IntFormat(4, symmetric), order, inner, clip=0.9)
        assert got.shape == (3, 256)
        for i, row in enumerate(rows.tolist()):
            codes, scale, zero_point = slow_quantize(row, 4, symmetric, 0.9)
            assert got.codes[i].tolist() == codes and got.scale[i].item() == float(scale)
            assert symmetric or got.zero_point[i].item() == zero_point


def test_narrowed_in_between():
    """As kv_attention does; otherwise these codes differ."""
    call = attention_call(((90, 40),), torch.bfloat16)
    got = assert_same(call, IntFormat(8), 256)
    in_fp32 = two_ops((call[0].float(), *call[1:]), IntFormat(8), 256)
    assert not torch.equal(got.codes, in_fp32.codes)


def test_new_tokens_in_full_precision():
    call = attention_call(RAGGED, unowned=2)
    stored = assert_same(call, IntFormat(8), 4, 64)
    got = assert_same(call, IntFormat(8), 4, 64, new=new_tokens(call))
    differs = (got.codes != stored.codes).any(1)
    assert differs.any() and not differs[[1, 10, 13, 14]].any()  # rows that see nothing


@pytest.mark.parametrize("rotation", [(0, 1), (4, 64)])
def test_a_sliding_window(rotation):
    call = attention_call(RAGGED)
    got = assert_same(call, IntFormat(8), *rotation, window=5)
    assert not torch.equal(got.codes, assert_same(call, IntFormat(8), *rotation).codes)


def test_given_matrix():
    call = attention_call(RAGGED, Hq=9, Hkv=3)
    assert_same(call, IntFormat(4), 9, 64, torch.linalg.qr(torch.randn(9, 9)).Q)


@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_layouts(bits, symmetric):
    call, format = attention_call(RAGGED), IntFormat(bits, symmetric)
    in_bytes = kv_attention_quant(*call, format, 4, 64)
    packed = kv_attention_quant(*call, format, 4, 64, layout=Layout.ROW_MAJOR)
    assert_bitwise(packed, to_layout(in_bytes, Layout.ROW_MAJOR))


@pytest.mark.parametrize("rotation", [(0, 1), (64, 1)])
def test_not_finite(rotation):
    call = attention_call(((37, 1), (20, 1), (30, 1)))
    call[1].v_scale[call[2][1, 0].long(), 3, 1] = float("inf")
    got = assert_same(call, IntFormat(4, False), *rotation)
    assert got.scale.isnan().flatten().tolist() == [False, True, False]
    assert not got.codes[1].any()


def test_no_rows():
    call = attention_call(((5, 0),))
    for rotation in ((0, 1), (64, 1)):
        assert assert_same(call, IntFormat(4), *rotation).codes.shape == (0, 256)


def op_arguments(**change) -> tuple:
    q, pages, *tables, scaling = attention_call(RAGGED)
    arguments = {
        **{"q": q, **dict(zip(("kc", "ks", "kz", "vc", "vs", "vz"), pages.tensors, strict=True))},
        **dict(zip(("block_table", "seq_lens", "query_start"), tables, strict=True)),
        **dict.fromkeys(("k_new", "v_new", "cached_lens")),
        **{"kv_bits": 4, "scaling": scaling, "window": 0, "order": 4, "inner": 64, "matrix": None},
        **{"bits": 4, "symmetric": True, "clip": 0.9, "packed": False},
    }
    return tuple((arguments | change).values())


@pytest.mark.parametrize("change", [{}, {"symmetric": False, "packed": True}], ids=str)
@pytest.mark.parametrize("rotation", [{}, {"order": 0, "inner": 1}], ids=str)
def test_registered(rotation, change):
    assert_registered(KV_ATTENTION_QUANT, *op_arguments(**rotation, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(13, 256)}, r"q must have shape \[T, num_q_heads, head_dim\]"),
        ({"q": torch.zeros(13, 4, 64).int()}, "q must be .* got torch.int32"),
        ({"q": torch.zeros(13, 0, 64)}, r"q must have heads, got shape \(13, 0, 64\)"),
        ({"kv_bits": 8}, r"k_codes must be torch.uint8 of shape \(.*, 16, 2, 64\)"),
        ({"seq_lens": torch.ones(6)}, "seq_lens must be int32, got torch.float32"),
        ({"seq_lens": torch.ones(5).int()}, r"block_table, seq_lens and query_start must have"),
        ({"order": 8}, "order . inner must divide the row length 256, got order 8 and inner 64"),
        ({"order": -4}, ".* got order -4"),
        ({"order": 0}, "order 0 rotates nothing and needs inner 1, no matrix; got inner 64"),
        ({"order": 0, "inner": 1, "matrix": torch.eye(4)}, "order 0 .* got a matrix"),
        ({"matrix": torch.eye(8)}, r"matrix must be floating point \[4, 4\]"),
        ({"bits": 9}, r"bits must be in 2..8, got 9"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_argument(change, message):
    with pytest.raises(ValueError, match=f"kv_attention_quant: {message}"):
        KV_ATTENTION_QUANT(*op_arguments(**change))


def test_groups_and_orders_that_do_not_exist():
    call = attention_call(RAGGED, Hq=6)
    with pytest.raises(ValueError, match="kv_attention_quant: .*got group_size 64"):
        kv_attention_quant(*call, IntFormat(4, group_size=64))
    with pytest.raises(HadamardOrderError, match="no Hadamard matrix of order 6 exists"):
        kv_attention_quant(*call, IntFormat(4), 6, 64)


INTERPRET = pytest.mark.interpret
WARNS_OF_NAN = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@INTERPRET
@WARNS_OF_NAN
@pytest.mark.parametrize(("order", "inner"), ROTATIONS)
def test_triton(order, inner):
    # a split is at least 128 positions
    call = attention_call(((140, 1), (0, 1), (17, 2)), Hkv=1, unowned=1)
    rest = (order, inner, None, 0.9, Layout.ROW_MAJOR)
    assert_same(call, IntFormat(4, symmetric=order < 4), *rest, backend="triton")


@INTERPRET
@WARNS_OF_NAN
def test_triton_new_tokens():
    call = attention_call(((140, 9), (0, 1), (17, 2)), Hkv=1, unowned=1)
    assert_same(call, IntFormat(8), 4, 64, new=new_tokens(call), backend="triton")


@INTERPRET
@WARNS_OF_NAN
@pytest.mark.parametrize("sizes", [(3, 1, 64), (9, 3, 64), (8, 1, 80), (2, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_triton_heads(dtype, sizes):
    Hq, Hkv, D = sizes
    call = attention_call(((20, 1), (5, 5)), dtype, Hq, Hkv, D, bits=8)
    matrix = None if Hq != 9 else torch.linalg.qr(torch.randn(9, 9)).Q
    order, inner = (Hq * D, 1) if matrix is None else (9, 64)
    assert_same(call, IntFormat(8), order, inner, matrix, backend="triton")


@INTERPRET
def test_triton_reasons():
    for change, reason in (
        ({"q": torch.zeros(13, 4, 64).double()}, "computes in fp32, q is fp64"),
        ({"bits": 3, "packed": True}, "does not pack 3-bit codes"),
    ):
        with pytest.raises(RuntimeError, match=f"triton: .*{reason}"):
            KV_ATTENTION_QUANT(*op_arguments(**change), backend="triton")
