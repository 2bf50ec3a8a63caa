"""kv_append in CUDA and in Triton against the reference."""

from itertools import product

import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_no_worse_than_torch
from kv_operands import (
    FLOATS,
    NUM_PAGES,
    PAGE_SIZE,
    ROTATED,
    SLOT,
    Inputs,
    append,
    assert_same,
    exact_inputs,
    inputs,
    kernels,
    narrowed,
)

from lowbit.transforms.online import hartley_matrix

pytestmark = pytest.mark.usefixtures("seed")
SHAPES = [(64, 64), (64, 16), (80, 32), (80, 80), (96, 96), (96, 48)]


@ROTATED
@kernels(
    "dtype,bits",
    cuda=product([torch.float32], [4, 5, 6, 7, 8]),
    triton=product([torch.float32, torch.float16], [2, 4, 5, 6, 7, 8]),
)
def test_exact_bits(backend, dtype, bits, rotate):
    x = narrowed(exact_inputs(D=80, R=32), dtype)
    assert_same(backend, x, bits=bits, rotate=rotate, clip=0.95)


@kernels(
    "D,R,kind,dtype",
    cuda=[(*shape, "hadamard", dtype) for shape in SHAPES for dtype in FLOATS[1:]],
    triton=[
        (*shape, kind, dtype)
        for shape in [(64, 64), (80, 32)]
        for kind in ("plain", "hadamard", "matrix")
        for dtype in FLOATS[1:]
    ],
)
def test_random_inputs(backend, D, R, kind, dtype):
    """All but the sums of the rotation is in the contract's order: the same bits."""
    x, slot = inputs(T=8, D=D, R=R, dtype=dtype), torch.arange(8)
    matrix = hartley_matrix(D).float() if kind == "matrix" else None
    options = {"bits": 8, "rotate": kind != "plain", "matrix": matrix}
    got, expected = (append(name, x, slot, **options) for name in (backend, "reference"))
    assert_bitwise(got[4:], expected[4:])  # v
    if kind == "plain":
        assert_bitwise(got[1:4], expected[1:4])
    else:
        assert_codes(*(token_codes(t, slot) for t in (got, expected)))
    if backend != "triton" or dtype != torch.bfloat16:  # which the interpreter truncates
        exact = append("reference", narrowed(x, torch.float64), slot, **options)[0]
        assert_no_worse_than_torch(got[0], expected[0], exact, floor=2.0**-22)


def token_codes(outputs, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes, scale, zero_point) of k at `slot`."""
    codes, scale, zero_point = (t.flatten(0, 1)[slot] for t in outputs[1:4])
    return codes, scale.unsqueeze(-1), zero_point.unsqueeze(-1)


@ROTATED
@kernels()
def test_slots(backend, rotate):
    """Negative slots are not stored; neither are those past the cache, which break the contract."""
    x, slot = exact_inputs(), torch.tensor([-1, 9, -7, 3, -(2**40)])
    assert_same(backend, x, slot, rotate=rotate)
    past = torch.where(slot < 0, NUM_PAGES * PAGE_SIZE - 1 - slot, slot)
    expected = append("reference", x, slot, rotate=rotate)
    assert_bitwise(append(backend, x, past, rotate=rotate), expected)
    assert_same(backend, x, SLOT - 2**40, rotate=rotate)


@ROTATED
@kernels("D", cuda=[64, 80, 128, 256], triton=[64])
@pytest.mark.parametrize(("T", "Hq", "Hkv"), [(0, 4, 2), (1, 1, 1), (7, 9, 3), (11, 8, 1)])
def test_heads_and_tokens(backend, T, Hq, Hkv, D, rotate):
    """Blocks and tiles that begin and end inside a token, and one alone."""
    x = exact_inputs(T, Hq, Hkv, D=D, R=32)
    slot = torch.randperm(NUM_PAGES * PAGE_SIZE)[:T]
    assert_same(backend, x, slot, rotate=rotate)


EDGES = list(product([64, 80], ["plain", "hadamard"]))


@kernels("D,kind", cuda=EDGES, triton=[*EDGES, (80, "matrix")])
def test_edge_rows(backend, D, kind):
    """A token each: zeros, one outlier, the largest numbers, inf, nan, far below MIN_SCALE."""
    big = torch.finfo(torch.float32).max
    x = Inputs(*(torch.zeros(6, H, D) for H in (2, 1, 1)), torch.ones(6, D), torch.zeros(6, D))
    for t in x[:3]:
        t[1, 0, 3], t[3, 0, 0], t[4, 0, 0], t[5] = 4.0, float("inf"), float("nan"), 2.0**-99
        t[2, 0, 0], t[2, 0, 1] = big, -big
    slot = torch.tensor([11, 0, 4, 7, 2, 3])
    options = {"rotate": kind != "plain", "matrix": torch.eye(D) if kind == "matrix" else None}
    got, expected = (append(name, x, slot, **options) for name in (backend, "reference"))
    assert_bitwise(got[1:], expected[1:])
    q, q_expected = got[0], expected[0]
    assert torch.equal(q.isnan(), q_expected.isnan())
    assert torch.equal(q.nan_to_num(7.0), q_expected.nan_to_num(7.0))


@ROTATED
@kernels()
def test_strides(backend, rotate):
    """Views of one projection, heads before tokens, heads apart; angles alike.

    In Triton, elements before tokens and every other slot too.
    """
    x, D, slot = exact_inputs(R=32), 64, SLOT
    qkv = torch.cat([t.flatten(1) for t in x[:3]], 1)
    views = (t.unflatten(1, (-1, D)) for t in qkv.split((4 * D, 2 * D, 2 * D), 1))
    heads_first = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in x[:3])
    one_position = [t[:1].expand(5, -1) for t in x[3:]]
    apart = (torch.cat([t] * n, 2)[..., :D] for t, n in zip(x[:3], (2, 3, 4), strict=True))
    wide = [torch.cat([t] * n, 1)[:, :32] for t, n in zip(x[3:], (2, 3), strict=True)]
    cases = [(views, one_position), (heads_first, wide), (apart, wide)]
    if backend == "triton":
        cases.append(((t.transpose(0, 2).contiguous().transpose(0, 2) for t in x[:3]), x[3:]))
        slot = torch.stack((SLOT, SLOT), 1)[:, 0]
    for heads, angles in cases:
        y = Inputs(*heads, *angles)
        kept = Inputs(*(t.clone() for t in y))
        assert not all(t.is_contiguous() for t in y)
        assert_same(backend, y, slot, rotate=rotate)
        assert_bitwise(y, kept)


@kernels()
def test_overflow_of_fp16(backend):
    """q_out is inf where it is out of range; scales are clamped."""
    x = exact_inputs(D=64)
    x = x._replace(**{name: getattr(x, name).sign().half() * 60000 for name in ("q", "k", "v")})
    assert append(backend, x, rotate=True)[0].isinf().any()
    assert_same(backend, x, rotate=True)
