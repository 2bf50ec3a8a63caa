"""hadamard_quant: exact sums, so that one number at a time gives the same bits."""

import math

import pytest
import torch
from helpers import assert_bitwise, assert_registered, slow_quantize

from lowbit.formats import IntFormat, Layout
from lowbit.hadamard import HadamardOrderError, hadamard_matrix
from lowbit.ops import dequantize, hadamard, hadamard_quant, quantize, to_layout
from lowbit.ops.hadamard_quant import HADAMARD_QUANT

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
LOW_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str
)
ROTATIONS = [(64, 64, 1), (96, 12, 4), (40, 1, 1), (576, 576, 1), (576, 64, 1), (1536, 1536, 1)]


def integers(M: int, K: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (M, K), generator=generator)


def dense(x: torch.Tensor, matrix: torch.Tensor, inner: int) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, len(matrix), inner))
    return torch.einsum("maki,kj->maji", blocks, matrix).flatten(1)


def assert_slow(got, rows: torch.Tensor, clip: float):
    """got is what slow_quantize makes of the fp32 rows."""
    results = [slow_quantize(r, got.format.bits, got.format.symmetric, clip) for r in rows.tolist()]
    codes, scale, zero = zip(*results, strict=True)
    assert_bitwise(got.codes, torch.tensor(codes, dtype=got.format.code_dtype))
    assert_bitwise(got.scale, torch.tensor([[float(s)] for s in scale]))
    if not got.format.symmetric:
        assert_bitwise(got.zero_point, torch.tensor([[z] for z in zero], dtype=torch.uint8))


@SYMMETRIC
@LOW_DTYPES
@pytest.mark.parametrize("K,order,inner", ROTATIONS)
@pytest.mark.parametrize("bits,clip", [(4, 0.9), (8, 1.0)])
def test_exact_inputs(K, order, inner, symmetric, dtype, bits, clip):
    x = integers(2, K, seed=K)
    sums = dense(x, hadamard_matrix(order).long(), inner)
    rows = sums.float() * torch.tensor(1 / math.sqrt(order), dtype=torch.float32)
    got = hadamard_quant(x.to(dtype), IntFormat(bits, symmetric), order, inner, clip=clip)
    assert_slow(got, rows, clip)


@SYMMETRIC
def test_exact_matrix(symmetric):
    matrix = integers(9, 9, seed=1)
    x = integers(3, 144, seed=2)
    got = hadamard_quant(x.half(), IntFormat(4, symmetric), 9, 4, matrix.float(), clip=0.9)
    assert_slow(got, dense(x, matrix, 4).float(), 0.9)


@LOW_DTYPES
def test_not_narrowed_in_between(dtype):
    """The codes are those of the fp32 rotation; those of the narrowed one are others."""
    x = torch.randn(8, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = hadamard_quant(x, IntFormat(8))
    assert_bitwise(got, quantize(hadamard(x.float()), IntFormat(8)))
    if dtype != torch.float32:
        assert not torch.equal(got.codes, quantize(hadamard(x), IntFormat(8)).codes)


def test_rotation_spreads_an_outlier():
    """What the op is for: one element of 100 times the others costs far less after rotation."""
    x = torch.randn(4, 1536, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 100.0
    plain = dequantize(quantize(x, IntFormat(4)))
    rotated = hadamard(dequantize(hadamard_quant(x, IntFormat(4))))
    assert (rotated - x).norm() < 0.3 * (plain - x).norm()


@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_layouts(bits, symmetric):
    x = integers(2, 64).bfloat16()
    in_bytes = hadamard_quant(x, IntFormat(bits, symmetric))
    packed = hadamard_quant(x, IntFormat(bits, symmetric), layout=Layout.ROW_MAJOR)
    assert_bitwise(packed, to_layout(in_bytes, Layout.ROW_MAJOR))


def test_edge_rows():
    """Zeros; one element; the largest finite numbers, whose sum is not; inf and nan."""
    big = torch.finfo(torch.float32).max
    x = torch.zeros(5, 16)
    x[1, 3], x[2], x[3, 0], x[4, 0] = 4.0, big, float("inf"), float("nan")
    got = hadamard_quant(x, IntFormat(4))
    assert got.scale[0] == 2.0**-24 and not got.codes[0].any()
    assert got.scale[1] == torch.tensor(1.0) / 7 and (got.codes[1].abs() == 7).all()
    assert got.scale[2:].isnan().all() and not got.codes[2:].any()
    assert hadamard_quant(x[2:3].double(), IntFormat(4)).scale.isfinite().all()


def test_shapes_and_argument_untouched():
    x = integers(24, 64).half()
    before = x.clone()
    expected = hadamard_quant(x, IntFormat(4))
    got = hadamard_quant(x.view(2, 3, 4, 64), IntFormat(4))
    assert got.shape == (2, 3, 4, 64) and got.scale.shape == (2, 3, 4, 1)
    assert_bitwise(got.codes.view(24, 64), expected.codes)
    assert_bitwise(
        hadamard_quant(x.T, IntFormat(4), 24), hadamard_quant(x.T.contiguous(), IntFormat(4), 24)
    )
    assert_bitwise(x, before)


@SYMMETRIC
@pytest.mark.parametrize("packed", [True, False])
def test_registered(symmetric, packed):
    x = integers(3, 48).bfloat16()
    assert_registered(HADAMARD_QUANT, x, 12, 2, None, 4, symmetric, 0.9, packed)
    assert_registered(HADAMARD_QUANT, x, 3, 1, torch.eye(3), 4, symmetric, 0.9, packed)


def test_public_function_compiles():
    x = integers(3, 48).bfloat16()
    compiled = torch.compile(hadamard_quant, fullgraph=True, backend="eager")
    assert_bitwise(compiled(x, IntFormat(4)), hadamard_quant(x, IntFormat(4)))


X, INT4 = torch.zeros(2, 36), IntFormat(4)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: hadamard_quant(X.int(), INT4), "hadamard_quant: x must be .* got torch.int32"),
        (lambda: hadamard_quant(X, INT4, 8), "hadamard_quant: order . inner must divide .* 36"),
        (lambda: hadamard_quant(X, INT4, 4, 0), "got order 4 and inner 0"),
        (lambda: hadamard_quant(X, INT4, 4, matrix=X), r"matrix must be .* shape \(2, 36\)"),
        (lambda: hadamard_quant(X, INT4, clip=0.0), r"hadamard_quant: clip must be in \(0, 1\]"),
        (
            lambda: hadamard_quant(X, IntFormat(4, group_size=4)),
            "hadamard_quant: format must have one scale per row, got group_size 4",
        ),
        (
            lambda: hadamard_quant(X, IntFormat(3), layout=Layout.ROW_MAJOR),
            "hadamard_quant: the row length must be a multiple of 8 to pack 3-bit codes, got 36",
        ),
        (lambda: HADAMARD_QUANT(X, 4, 1, None, 1, True, 1.0, False), "bits must be in .* got 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_order_without_a_matrix():
    with pytest.raises(HadamardOrderError, match="no Hadamard matrix of order 9 exists"):
        hadamard_quant(X, INT4, 9)
