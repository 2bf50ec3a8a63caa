"""rmsnorm_quant in CUDA: exact rows to the bit, random ones within what a sum's order moves."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_no_worse_than_torch, poison
from test_rmsnorm_quant import exact_rows, random

from lowbit.formats import IntFormat, Layout
from lowbit.ops import rmsnorm_quant
from lowbit.ops.dispatch import NoBackendError

pytestmark = pytest.mark.emulate
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LENGTHS = (8, 264, 576, 1536, 2056, 4096, 5120, 8200, 16384)  # models, and ends of tiles


def assert_same(*args):
    with poison():
        got = rmsnorm_quant(*args, backend="cuda")
    assert_bitwise(got, rmsnorm_quant(*args, backend="reference"))


@DTYPES
@pytest.mark.parametrize("K", LENGTHS)
def test_exact_inputs(K, dtype):
    """With a residual and without, a weight of either dtype or none; both layouts."""
    h = exact_rows(3, K, 0.0)
    residual = torch.randint(-4, 5, h.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = (2.0 ** (torch.arange(K) % 5 - 2)).to(dtype)
    x = (h - residual.float()).to(dtype)
    assert_same(x, IntFormat(4), residual, weight, 0.0, 0.9, Layout.ROW_MAJOR)
    assert_same(h.to(dtype), IntFormat(8, False), None, weight.float(), 0.0)
    if K < 8192:
        h = exact_rows(5, K, 1.0)  # 5: not a whole block of warps
        assert_same(h.to(dtype), IntFormat(4, False), None, None, 1.0, 0.8)


@SYMMETRIC
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [72, 576, 4096])
def test_random_inputs(K, dtype, symmetric):
    """The mean in another order moves the scale by some ulps, and a few codes with it."""
    x, residual = random(7, K, seed=1).to(dtype), (3 * random(7, K, seed=2)).to(dtype)
    weight = random(K, seed=3).to(dtype)
    args = (IntFormat(4, symmetric), residual, weight, 1e-5)
    got, new_residual = rmsnorm_quant(x, *args, backend="cuda")
    expected, sums = rmsnorm_quant(x, *args, backend="reference")
    assert_bitwise(new_residual, sums)
    h = sums.double()
    y = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    lo, hi = y.clamp(max=0).amin(-1), y.clamp(min=0).amax(-1)
    exact = torch.maximum(-lo, hi) / 7 if symmetric else (hi - lo) / 15
    floor = torch.finfo(torch.float32).eps * exact.max().item()
    assert_no_worse_than_torch(got.scale, expected.scale, exact.unsqueeze(-1), floor)
    assert_codes(replace(got, scale=expected.scale), expected)


@pytest.mark.parametrize("K", [16, 2048])
def test_edge_rows(K):
    """Zeros with eps and without, an outlier, a square out of range, inf and nan."""
    x = torch.ones(6, K)
    x[0], x[1, 5] = 0.0, 1e3
    x[2], x[3, 0], x[4, K - 1] = 2.0**100, float("inf"), float("nan")
    for symmetric in (True, False):
        for eps in (0.0, 1.0):
            args = (x, IntFormat(4, symmetric), None, None, eps)
            got, expected = (rmsnorm_quant(*args, backend=b) for b in ("cuda", "reference"))
            assert_bitwise(got[1], expected[1])
            assert_codes(got[0], expected[0])
            assert not got[0].codes[3:5].any()


def test_shapes():
    x, residual = exact_rows(6, 64, 0.0), torch.zeros(6, 64)
    assert_same(x.view(2, 3, 64), IntFormat(4), residual.view(2, 3, 64), None, 0.0)
    assert_same(x[0], IntFormat(8), None, None, 0.0)
    assert_same(x[:0], IntFormat(4, False), residual[:0], torch.ones(64))


X = torch.zeros(2, 64)


@pytest.mark.parametrize(
    "x, weight, bits, message",
    [
        (X.double(), None, 4, "x is fp64"),
        (X.half(), torch.ones(64).bfloat16(), 4, "x's dtype or fp32, it is torch.bfloat16"),
        (X, None, 3, "codes of 4 or 8 bits, not of 3"),
        (X[:, :12].contiguous(), None, 4, "multiple of 8"),
        (X[:, ::2], None, 4, "contiguous"),
        (X.new_zeros(1, 16392), None, 4, "not be longer than 16384"),
    ],
)
def test_why_not(x, weight, bits, message):
    with pytest.raises(NoBackendError, match=message):
        rmsnorm_quant(x, IntFormat(bits), None, weight, layout=Layout.ROW_MAJOR, backend="cuda")
