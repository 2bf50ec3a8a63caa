"""kv_append in CUDA against the reference, pages poisoned: what is not stored is compared too."""

import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_no_worse_than_torch, poison
from test_kv_append import (
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
from lowbit.ops.kv_append import CUDA_HEAD_DIMS

pytestmark = pytest.mark.emulate
ROTATED = pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = [(64, 64), (64, 16), (80, 32), (80, 80), (96, 96), (96, 48), (128, 128), (128, 32),
         (256, 64), (256, 256)]  # fmt: skip


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
    got, expected = (run(name, x, slot, bits, **options) for name in ("cuda", "reference"))
    assert_bitwise(got, expected)


def narrowed(x: Inputs, dtype: torch.dtype) -> Inputs:
    return x._replace(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))


def token_codes(outputs, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes, scale, zero_point) of k at `slot`."""
    codes, scale, zero_point = (t.flatten(0, 1)[slot] for t in outputs[1:4])
    return codes, scale.unsqueeze(-1), zero_point.unsqueeze(-1)


def test_every_head_dim_is_tested():
    assert {D for D, _ in HEADS} == set(CUDA_HEAD_DIMS)


@ROTATED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "R"), HEADS)
def test_exact_inputs(D, R, dtype, rotate):
    """Sums are exact in fp32, whatever their order: the same bits."""
    x = narrowed(exact_inputs(D=D, R=R), dtype)
    assert_same(x, rotate=rotate, clip=0.9)
    assert_same(x, bits=8, rotate=rotate)


@ROTATED
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_exact_bits(bits, rotate):
    assert_same(exact_inputs(D=80, R=32), bits=bits, rotate=rotate, clip=0.95)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "R"), HEADS[:6])
def test_random_inputs(D, R, dtype):
    """All but the sums of the rotation is in the contract's order: the same bits."""
    x, slot = inputs(T=8, D=D, R=R, dtype=dtype), torch.arange(8)
    assert_same(x, slot)
    assert_same(x, slot, bits=8)
    got, expected = (run(name, x, slot, 8, rotate=True) for name in ("cuda", "reference"))
    assert_bitwise(got[4:], expected[4:])  # v
    assert_codes(*(token_codes(t, slot) for t in (got, expected)))
    exact = run("reference", narrowed(x, torch.float64), slot, 8, rotate=True)[0]
    assert_no_worse_than_torch(got[0], expected[0], exact, floor=2.0**-22)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_angles_of_a_narrow_dtype(dtype):
    x = inputs(D=64, R=32, dtype=dtype)
    assert_same(x._replace(cos=x.cos.to(dtype), sin=x.sin.to(dtype)))


@ROTATED
def test_slots(rotate):
    """Negative slots are not stored; neither are those past the cache, which break the contract."""
    x, slot = exact_inputs(), torch.tensor([-1, 9, -7, 3, -(2**40)])
    assert_same(x, slot, rotate=rotate)
    past = torch.where(slot < 0, NUM_PAGES * PAGE_SIZE - 1 - slot, slot)
    assert_bitwise(run("cuda", x, past, rotate=rotate), run("reference", x, slot, rotate=rotate))
    assert_same(x, SLOT - 2**40, rotate=rotate)


@ROTATED
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize(("T", "Hq", "Hkv"), [(0, 4, 2), (1, 1, 1), (7, 9, 3), (11, 8, 1)])
def test_heads_and_tokens(T, Hq, Hkv, D, rotate):
    """Blocks that begin and end inside a token, and one alone."""
    x = exact_inputs(T, Hq, Hkv, D=D, R=32)
    slot = torch.randperm(NUM_PAGES * PAGE_SIZE)[:T]
    assert_same(x, slot, rotate=rotate)


@ROTATED
@pytest.mark.parametrize("D", [64, 80])
def test_edge_rows(D, rotate):
    """A token each: zeros, one outlier, the largest numbers, inf, nan, far below MIN_SCALE."""
    big = torch.finfo(torch.float32).max
    x = Inputs(*(torch.zeros(6, H, D) for H in (2, 1, 1)), torch.ones(6, D), torch.zeros(6, D))
    for t in x[:3]:
        t[1, 0, 3], t[3, 0, 0], t[4, 0, 0], t[5] = 4.0, float("inf"), float("nan"), 2.0**-99
        t[2, 0, 0], t[2, 0, 1] = big, -big
    slot = torch.tensor([11, 0, 4, 7, 2, 3])
    got, expected = (run(name, x, slot, rotate=rotate) for name in ("cuda", "reference"))
    assert_bitwise(got[1:], expected[1:])
    q, q_expected = got[0], expected[0]
    assert torch.equal(q.isnan(), q_expected.isnan())
    assert torch.equal(q.nan_to_num(7.0), q_expected.nan_to_num(7.0))


@ROTATED
def test_strides(rotate):
    """Views of one projection, heads before tokens, heads apart; angles alike."""
    x, D = exact_inputs(R=32), 64
    qkv = torch.cat([t.flatten(1) for t in x[:3]], 1)
    views = (t.unflatten(1, (-1, D)) for t in qkv.split((4 * D, 2 * D, 2 * D), 1))
    heads_first = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in x[:3])
    one_position = [t[:1].expand(5, -1) for t in x[3:]]
    apart = (torch.cat([t] * n, 2)[..., :D] for t, n in zip(x[:3], (2, 3, 4), strict=True))
    wide = [torch.cat([t] * n, 1)[:, :32] for t, n in zip(x[3:], (2, 3), strict=True)]
    for y in (views, one_position), (heads_first, wide), (apart, wide):
        y = Inputs(*y[0], *y[1])
        kept = Inputs(*(t.clone() for t in y))
        assert not all(t.is_contiguous() for t in y)
        assert_same(y, rotate=rotate)
        assert_bitwise(y, kept)


def test_overflow_of_fp16():
    """q_out is inf where it is out of range; scales are clamped."""
    x = exact_inputs(D=64)
    x = x._replace(**{name: getattr(x, name).sign().half() * 60000 for name in ("q", "k", "v")})
    assert run("cuda", x, rotate=True)[0].isinf().any()
    assert_same(x, rotate=True)


def test_reasons():
    x, pages = inputs(), poisoned()
    strided = [t.repeat_interleave(2, 1)[:, ::2] for t in pages.tensors]

    def refused(reason: str, x: Inputs, pages: KVPages, slot=SLOT, **options):
        with pytest.raises(NoBackendError, match=reason):
            kv_append(*x, slot, pages, **options, backend="cuda")

    refused("it computes in fp32, x is fp64", narrowed(x, torch.float64), pages)
    refused("packs codes of 4 or 8 bits, not of 3", x, poisoned(bits=3))
    refused("head_dim must be one of .*, it is 264", inputs(D=264), poisoned(D=264))
    refused("contiguous pages only, not those of k_codes, .* v_zero_", x, KVPages(*strided, 4))
    refused("by Hadamard matrices", x, pages, rotate=True, matrix=torch.eye(64))
    refused("a multiple of 16 elements, it turns 24", inputs(R=24), pages)
    refused("cos and sin must be of one dtype", x._replace(cos=x.cos.half()), pages)
    refused("cos and sin must be .* not fp64", x._replace(cos=x.cos.double(), sin=x.sin.double()),
            pages)  # fmt: skip
    apart = Inputs(*(t.transpose(0, 2).contiguous().transpose(0, 2) for t in x[:3]), *x[3:])
    refused("heads of q, k, v must be contiguous", apart, pages)
    odd = x._replace(q=torch.zeros(5, 4, 65)[..., :64])
    refused("heads of q must be .* multiples of 16 bytes", odd, pages)
    refused("slot must be contiguous", x, pages, torch.stack((SLOT, SLOT), 1)[:, 0])
    refused("clip must be at least", x, pages, clip=1e-7)
    assert_bitwise(pages.tensors, poisoned().tensors)
