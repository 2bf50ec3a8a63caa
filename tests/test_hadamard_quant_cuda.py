"""hadamard_quant in CUDA: every tile and kind of stride; exact sums, to the bit."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_no_worse_than_torch, poison
from test_hadamard_quant import integers

from lowbit import hadamard as orders
from lowbit.formats import IntFormat, Layout
from lowbit.ops import hadamard, hadamard_quant
from lowbit.ops.cuda_rotation import dense_for_cuda, signs_for_cuda
from lowbit.ops.dispatch import NoBackendError

pytestmark = pytest.mark.emulate
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SMALL = [
    (8, 1, 1),  # nothing to rotate
    (40, 2, 1),
    (264, 8, 1),
    (64, 64, 1),
    (256, 128, 1),  # no dense factor, but an exchange
    (1536, 128, 1),
    (96, 96, 1),  # 12 x 8: one unit of columns
    (192, 96, 1),
    (576, 576, 1),  # 36 x 16
    (960, 480, 1),
    (512, 4, 128),  # heads: butterflies alone
    (2048, 32, 64),  # dense 8, made 16
    (1536, 12, 128),
    (960, 12, 80),
    (1600, 20, 80),
    (896, 28, 32),
    (3072, 24, 128),
]
# rows of models: o_proj and down_proj inputs
LARGE = [
    (4096, 4096, 1),
    (4096, 32, 128),
    (5120, 5120, 1),
    (5120, 40, 128),
    (8192, 64, 128),
    (8960, 8960, 1),
    (11008, 11008, 1),
    (11008, 128, 1),
    (14336, 14336, 1),
    (18944, 18944, 1),
    (28672, 28672, 1),
    (29568, 29568, 1),
    (32768, 32768, 1),
    (32768, 256, 1),
]


def assert_same(*args):
    with poison():
        got = hadamard_quant(*args, backend="cuda")
    assert_bitwise(got, hadamard_quant(*args, backend="reference"))


@DTYPES
@pytest.mark.parametrize("K,order,inner", SMALL)
def test_exact_inputs(K, order, inner, dtype):
    x = integers(3, K, seed=K).to(dtype)
    assert_same(x, IntFormat(4), order, inner, None, 0.9, Layout.ROW_MAJOR)
    assert_same(x, IntFormat(8, False), order, inner)


@pytest.mark.parametrize("K,order,inner", LARGE)
def test_exact_rows_of_models(K, order, inner):
    x = integers(1, K, seed=K).bfloat16()
    assert_same(x, IntFormat(4), order, inner, None, 1.0, Layout.ROW_MAJOR)


@SYMMETRIC
@pytest.mark.parametrize("K,order,inner", [(1536, 1536, 1), (2304, 2304, 1), (1536, 12, 128)])
def test_random_inputs(K, order, inner, symmetric):
    """Sums in another order move the scale by some ulps, and a few codes with it."""
    x = torch.randn(8, K, generator=torch.Generator().manual_seed(0)).half()
    args = (x, IntFormat(4, symmetric), order, inner)
    got = hadamard_quant(*args, backend="cuda")
    expected = hadamard_quant(*args, backend="reference")
    exact = hadamard(x.double(), order, inner)
    span = exact.abs().amax(-1) / 7 if symmetric else (exact.amax(-1) - exact.amin(-1)) / 15
    assert_no_worse_than_torch(got.scale, expected.scale, span.unsqueeze(-1), floor=2.0**-25)
    assert_codes(replace(got, scale=expected.scale), expected)


@DTYPES
@pytest.mark.parametrize("K,order", [(64, 8), (96, 96), (512, 256), (1152, 1152), (4096, 4096)])
def test_edge_rows(K, order, dtype):
    """Zeros; one element; the largest finite numbers; the smallest; inf and nan."""
    x = torch.zeros(6, K, dtype=dtype)
    x[1, 3], x[2], x[3, K - 1], x[4, 0] = 4.0, torch.finfo(dtype).max, float("inf"), float("nan")
    x[5, K // 2] = torch.finfo(dtype).tiny
    for symmetric in (True, False):
        assert_same(x, IntFormat(4, symmetric), order)


@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_layouts(bits, symmetric):
    x = integers(2, 96).bfloat16()
    assert_same(x, IntFormat(bits, symmetric), 96)
    if bits != 3 and bits != 2:
        assert_same(x, IntFormat(bits, symmetric), 96, 1, None, 1.0, Layout.ROW_MAJOR)


def test_shapes():
    x = integers(24, 64).half()
    for view in (x.view(2, 3, 4, 64), x[0], x[:0]):
        assert_same(view, IntFormat(4, False), 8, 1, None, 1.0, Layout.ROW_MAJOR)


def test_every_order_of_a_model_has_a_tile():
    """Whole rows, of every length that a rotation mixes, as far as 32768 goes."""
    for K in range(1024, 32769, 128):
        if orders.exists(K) and orders.factorize(K)[0] < 1024 or K & (K - 1) == 0:
            dense = [dense_for_cuda(K, K, 1, halves) for halves in (True, False)]
            assert None not in dense or len(orders.factorize(K)) > 2, K
    for heads in (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 60, 64):
        for head_dim in (64, 80, 96, 128, 256):
            assert dense_for_cuda(heads * head_dim, heads, head_dim, True) is not None


@pytest.mark.parametrize("dense", [12, 16, 20, 100, 344])
def test_signs(dense):
    """Taken apart again, bit by bit, as the comment of csrc/common/hadamard_dense.cuh says."""
    words = signs_for_cuda(dense, torch.device("cpu")).long()
    h = orders.hadamard_matrix(dense)
    for row, column in [(0, 0), (1, 1), (dense - 1, dense - 1), (7, 11), (9, 5), (dense - 2, 6)]:
        g, k = row % 8, column % 16
        i, half, t = row // 8 % 2 + 2 * (k // 8), k // 4 % 2, k % 4
        word = words[row // 16, column // 64, 4 * g + t]
        bit = word >> (15 - (4 * (column // 16 % 4) + i) + 16 * half) & 1
        assert 1 - 2 * bit == h[row, column]


@pytest.mark.parametrize(
    "K,order,inner,matrix,bits,dtype,reason",
    [
        (64, 64, 1, None, 4, torch.float64, "x is fp64"),
        (64, 64, 1, None, 4, torch.float32, "it rotates fp16 and bf16, x is fp32"),
        (64, 64, 1, None, 3, torch.float16, "codes of 4 or 8 bits, not of 3"),
        (36, 12, 1, None, 4, torch.float16, "a row must be a multiple of 8"),
        (48, 4, 6, None, 4, torch.float16, "inner must be 1 or a multiple of 8, it is 6"),
        (24, 12, 1, None, 4, torch.float16, "no tile for order 12 in rows of 24 with inner 1"),
        (64, 4, 1, torch.eye(4), 4, torch.float16, "not by a matrix given"),
        (26752, 26752, 1, None, 4, torch.float16, "no tile for order 26752"),
    ],
)
def test_why_not(K, order, inner, matrix, bits, dtype, reason):
    x = torch.zeros(1, K, dtype=dtype)
    with pytest.raises(NoBackendError, match=reason):
        format, layout = IntFormat(bits), Layout.ROW_MAJOR
        hadamard_quant(x, format, order, inner, matrix, layout=layout, backend="cuda")


@pytest.mark.emulate(89)
def test_why_not_long_rows_of_sm_89():
    x = torch.zeros(1, 28672).half()
    with pytest.raises(NoBackendError, match="bytes of shared memory, sm_89 has 99 KB"):
        hadamard_quant(x, IntFormat(4), backend="cuda")
