"""quantize in CUDA: every tile, every grid, edge rows; to the bit what the reference gives."""

import pytest
import torch
from helpers import assert_bitwise, poison

from lowbit.formats import IntFormat, Layout
from lowbit.ops import quantize
from lowbit.ops.dispatch import NoBackendError

pytestmark = pytest.mark.emulate
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LENGTHS = (8, 64, 264, 1000, 2056, 4096, 8200, 32768)  # around the ends of tiles


def rows(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(K)).to(dtype)


def assert_same(*args, **options):
    with poison():
        got = quantize(*args, backend="cuda", **options)
    assert_bitwise(got, quantize(*args, backend="reference", **options))


@DTYPES
@pytest.mark.parametrize("K", LENGTHS)
def test_rows(K, dtype):
    x = rows(3, K, dtype)
    assert_same(x, IntFormat(4), layout=Layout.ROW_MAJOR)
    assert_same(x, IntFormat(8, symmetric=False), 0.9)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_grids(bits, symmetric):
    x = rows(9, 64, torch.bfloat16)  # 9: not a whole block of warps
    for scale_dtype in (torch.float32, torch.float16):
        assert_same(x, IntFormat(bits, symmetric), 0.8, scale_dtype=scale_dtype)
        if bits > 3:
            assert_same(x, IntFormat(bits, symmetric), layout=Layout.ROW_MAJOR)
        assert_same(x, IntFormat(bits, symmetric, group_size=32), scale_dtype=scale_dtype)


@pytest.mark.parametrize("K", [64, 4096])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_edge_rows(K, symmetric):
    x = torch.zeros(8, K)
    x[1, 5] = 3e4
    x[2] = torch.finfo(torch.float32).max
    x[3], x[3, 1] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min
    x[4, 7] = float("inf")
    x[5, K - 1] = float("nan")
    x[6] = torch.arange(K) % 2 - 0.5  # halves of a step: to even
    x[7] = 2.0**-140
    for scale_dtype in (torch.float32, torch.float16):
        assert_same(x, IntFormat(4, symmetric), scale_dtype=scale_dtype)


@pytest.mark.parametrize("amax", [7.0, 3e-5, 2.0**70, 3e38])
def test_halves_of_a_step(amax):
    """Numbers at and beside every half step of scales of all mantissas: quotients are IEEE's."""
    generator = torch.Generator().manual_seed(0)
    amaxes = amax * (0.5 + 0.5 * torch.rand(256, 1, generator=generator))
    x = amaxes / 7 * (torch.arange(-7, 8) - 0.5).repeat_interleave(7).clamp(-7, 7)
    ulps = (torch.arange(105) % 7 - 3).int()
    x = (x.view(torch.int32) + ulps).view(torch.float32).clamp(-amaxes, amaxes)
    x = torch.cat([amaxes, x, torch.zeros(256, 6)], 1)
    assert_same(x, IntFormat(4))
    assert_same(x, IntFormat(8, False), 0.7)


def test_shapes():
    x = rows(6, 64, torch.float16)
    assert_same(x.view(2, 3, 64), IntFormat(4))
    assert_same(x[:0], IntFormat(4))
    assert_same(x.view(-1), IntFormat(8))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, **o: quantize(x.double(), IntFormat(4), **o), "x is fp64"),
        (lambda x, **o: quantize(x[:, :12], IntFormat(4), **o), "multiple of 8"),
        (lambda x, **o: quantize(x.new_zeros(1, 32776), IntFormat(4), **o), "at most 32768"),
        (lambda x, **o: quantize(x[:, ::2], IntFormat(4), **o), "contiguous"),
        (lambda x, **o: quantize(x.view(-1)[2:66], IntFormat(4), **o), "16 bytes"),
        (lambda x, **o: quantize(x, IntFormat(4), 1e-7, **o), "clip must be at least 1e-06"),
        (lambda x, **o: quantize(x, IntFormat(3), layout=Layout.ROW_MAJOR, **o), "4 or 8 bits"),
    ],
)
def test_why_not(call, message):
    with pytest.raises(NoBackendError, match=message):
        call(rows(2, 64, torch.float32), backend="cuda")
