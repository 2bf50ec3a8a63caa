"""kv_append in Triton against the reference, pages poisoned: what is not stored is compared too."""

import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_no_worse_than_torch, poison
from test_kv_append import (
    FLOATS,
    NUM_PAGES,
    PAGE_SIZE,
    SLOT,
    Inputs,
    exact_inputs,
    inputs,
    poisoned,
)

from lowbit.ops import KVPages, kv_append
from lowbit.ops.dispatch import NoBackendError
from lowbit.transforms.online import hartley_matrix

pytestmark = pytest.mark.interpret
ROTATED = pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
# every kind of base, no base, padding of either, pairs, all of a head turned and nearly nothing
HEADS = [(64, 64), (80, 32), (96, 2), (128, 128), (256, 64), (20, 20), (2, 2)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(backend: str, x: Inputs, slot=SLOT, bits=4, **options) -> tuple[torch.Tensor, ...]:
    """q_out and the six tensors."""
    pages = poisoned(x.k.shape[1], x.q.shape[-1], bits)
    with poison():
        q = kv_append(*x, slot, pages, **options, backend=backend)
    return q, *pages.tensors


def assert_same(x: Inputs, slot=SLOT, bits=4, **options):
    got, expected = (run(name, x, slot, bits, **options) for name in ("triton", "reference"))
    assert_bitwise(got, expected)


def narrowed(x: Inputs, dtype: torch.dtype) -> Inputs:
    return x._replace(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))


@pytest.mark.parametrize(("D", "R"), HEADS)
def test_exact_inputs(D, R):
    """bf16 only where nothing is rounded: the interpreter truncates."""
    x, bits = exact_inputs(D=D, R=R), 4 if D > 2 else 8
    assert_same(narrowed(x, torch.bfloat16), bits=bits)
    assert_same(narrowed(x, torch.float16), bits=bits, rotate=True, clip=0.9)
    matrix = torch.randint(-3, 4, (D, D))
    assert_same(x, bits=bits, rotate=True, matrix=matrix.bfloat16())
    x = x._replace(cos=x.cos.double(), sin=x.sin.bfloat16())
    assert_same(x, bits=bits, rotate=True, matrix=matrix.double().T)


@ROTATED
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_exact_bits(dtype, bits, rotate):
    assert_same(narrowed(exact_inputs(D=80, R=32), dtype), bits=bits, rotate=rotate, clip=0.95)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kind", ["plain", "hadamard", "matrix"])
@pytest.mark.parametrize(("D", "R"), [(64, 64), (80, 32)])
def test_random_inputs(D, R, kind, dtype):
    """All but the sums of the rotation is in the contract's order: the same bits."""
    x, slot = inputs(T=8, D=D, R=R, dtype=dtype), torch.arange(8)
    matrix = hartley_matrix(D).float() if kind == "matrix" else None
    options = {"bits": 8, "rotate": kind != "plain", "matrix": matrix}
    got, expected = (run(name, x, slot, **options) for name in ("triton", "reference"))
    assert_bitwise(got[4:], expected[4:])  # v
    if kind == "plain":
        assert_bitwise(got[1:4], expected[1:4])
    else:
        assert_codes(*(token_codes(t, slot) for t in (got, expected)))
    if dtype != torch.bfloat16:  # which the interpreter truncates
        exact = run("reference", narrowed(x, torch.float64), slot, **options)[0]
        assert_no_worse_than_torch(got[0], expected[0], exact, floor=2.0**-22)


def token_codes(outputs, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes, scale, zero_point) of k at `slot`."""
    codes, scale, zero_point = (t.flatten(0, 1)[slot] for t in outputs[1:4])
    return codes, scale.unsqueeze(-1), zero_point.unsqueeze(-1)


@ROTATED
def test_slots(rotate):
    """Negative slots are not stored; neither are those past the cache, which break the contract."""
    x, slot = exact_inputs(), torch.tensor([-1, 9, -7, 3, -(2**40)])
    assert_same(x, slot, rotate=rotate)
    past = torch.where(slot < 0, NUM_PAGES * PAGE_SIZE - 1 - slot, slot)
    assert_bitwise(run("triton", x, past, rotate=rotate), run("reference", x, slot, rotate=rotate))
    assert_same(x, SLOT - 2**40, rotate=rotate)


@ROTATED
@pytest.mark.parametrize(("T", "Hq", "Hkv"), [(0, 4, 2), (1, 1, 1), (7, 9, 3), (11, 8, 1)])
def test_heads_and_tokens(T, Hq, Hkv, rotate):
    """Tiles that begin and end inside a token, and one alone."""
    x = exact_inputs(T, Hq, Hkv, D=64, R=32)
    slot = torch.randperm(NUM_PAGES * PAGE_SIZE)[:T]
    assert_same(x, slot, rotate=rotate)


@pytest.mark.parametrize(("D", "matrix"), [(64, None), (80, None), (80, torch.eye(80))])
def test_edge_rows(D, matrix):
    """A token each: zeros, one outlier, the largest numbers, inf, nan, far below MIN_SCALE."""
    big = torch.finfo(torch.float32).max
    x = Inputs(*(torch.zeros(6, H, D) for H in (2, 1, 1)), torch.ones(6, D), torch.zeros(6, D))
    for t in x[:3]:
        t[1, 0, 3], t[3, 0, 0], t[4, 0, 0], t[5] = 4.0, float("inf"), float("nan"), 2.0**-99
        t[2, 0, 0], t[2, 0, 1] = big, -big
    slot = torch.tensor([11, 0, 4, 7, 2, 3])
    for rotate in (False, True) if matrix is None else (True,):
        options = {"rotate": rotate, "matrix": matrix}
        got, expected = (run(name, x, slot, **options) for name in ("triton", "reference"))
        assert_bitwise(got[1:], expected[1:])
        q, q_expected = got[0], expected[0]
        assert torch.equal(q.isnan(), q_expected.isnan())
        assert torch.equal(q.nan_to_num(7.0), q_expected.nan_to_num(7.0))


@ROTATED
def test_strides(rotate):
    """Views of one projection, heads before tokens, heads apart, transposed heads; angles alike."""
    x, D = exact_inputs(R=32), 64
    qkv = torch.cat([t.flatten(1) for t in x[:3]], 1)
    views = (t.unflatten(1, (-1, D)) for t in qkv.split((4 * D, 2 * D, 2 * D), 1))
    heads_first = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in x[:3])
    elements_first = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in x[:3])
    one_position = [t[:1].expand(5, -1) for t in x[3:]]
    apart = (torch.cat([t] * n, 2)[..., :D] for t, n in zip(x[:3], (2, 3, 4), strict=True))
    wide = [torch.cat([t] * n, 1)[:, :32] for t, n in zip(x[3:], (2, 3), strict=True)]
    strided_slot = torch.stack((SLOT, SLOT), 1)[:, 0]
    for y in (views, one_position), (heads_first, wide), (apart, wide), (elements_first, x[3:]):
        y = Inputs(*y[0], *y[1])
        kept = Inputs(*(t.clone() for t in y))
        assert not all(t.is_contiguous() for t in y)
        assert_same(y, strided_slot, rotate=rotate)
        assert_bitwise(y, kept)


def test_overflow_of_fp16():
    """q_out is inf where it is out of range; scales are clamped."""
    x = exact_inputs(D=64)
    x = x._replace(**{name: getattr(x, name).sign().half() * 60000 for name in ("q", "k", "v")})
    assert run("triton", x, rotate=True)[0].isinf().any()
    assert_same(x, rotate=True)


def test_reasons():
    x, pages = inputs(), poisoned()
    strided = [t.repeat_interleave(2, 1)[:, ::2] for t in pages.tensors]

    def refused(reason: str, x: Inputs, pages: KVPages, **options):
        with pytest.raises(NoBackendError, match=reason):
            kv_append(*x, SLOT, pages, **options, backend="triton")

    refused("it computes in fp32, x is fp64", narrowed(x, torch.float64), pages)
    refused("does not pack 3-bit codes", x, poisoned(bits=3))
    refused("head_dim must be at most 256, it is 264", inputs(D=264), poisoned(D=264))
    refused("contiguous pages only, not those of k_codes, .* v_zero_", x, KVPages(*strided, 4))
    assert_bitwise(pages.tensors, poisoned().tensors)
