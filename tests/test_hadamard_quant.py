"""hadamard_quant: exact sums, so that one number at a time gives the same bits."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    assert_bitwise,
    assert_codes,
    assert_no_worse_than_torch,
    assert_registered,
    poison,
    slow_quantize,
)

from lowbit.formats import IntFormat, Layout
from lowbit.hadamard import HadamardOrderError, hadamard_matrix
from lowbit.ops import dequantize, hadamard, hadamard_quant, quantize, to_layout
from lowbit.ops.dispatch import NoBackendError
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


INTERPRET = pytest.mark.interpret
# whole rows of every kind of factor, blocks, mixed heads of a head_dim that is no power of two
TRITON_ROTATIONS = pytest.mark.parametrize(
    "K,order,inner",
    [(64, 64, 1), (96, 12, 4), (40, 1, 1), (48, 48, 1), (576, 64, 1), (1536, 1536, 1)]
    + [(768, 12, 64), (960, 12, 80), (320, 4, 80), (12, 2, 2), (8, 8, 1), (60, 12, 1)],
)


@INTERPRET
@SYMMETRIC
@LOW_DTYPES
@TRITON_ROTATIONS
def test_triton_exact_inputs(K, order, inner, symmetric, dtype):
    """Sums are exact, everything after them is IEEE and in a fixed order; both layouts."""
    x = integers(3, K, seed=K).to(dtype)
    for bits, layout in [(4, Layout.ROW_MAJOR), (8, Layout.BYTES), (2, Layout.ROW_MAJOR)]:
        args = (x, IntFormat(bits, symmetric), order, inner, None, 0.9, layout)
        with poison():
            got = hadamard_quant(*args, backend="triton")
        assert_bitwise(got, hadamard_quant(*args, backend="reference"))


@INTERPRET
@SYMMETRIC
def test_triton_exact_matrix(symmetric):
    matrix, x = integers(9, 9, seed=1).float(), integers(3, 144, seed=2).half()
    for layout in (Layout.BYTES, Layout.ROW_MAJOR):
        args = (x, IntFormat(4, symmetric), 9, 4, matrix, 0.9, layout)
        got = hadamard_quant(*args, backend="triton")
        assert_bitwise(got, hadamard_quant(*args, backend="reference"))


@INTERPRET
@SYMMETRIC
def test_triton_random_inputs(symmetric):
    """Sums in another order move the scale by some ulps, and a few codes with it."""
    x = torch.randn(16, 1536, generator=torch.Generator().manual_seed(0)).half()
    args = (x, IntFormat(4, symmetric))
    got = hadamard_quant(*args, backend="triton")
    expected = hadamard_quant(*args, backend="reference")
    exact = hadamard(x.double())
    span = exact.abs().amax(-1) / 7 if symmetric else (exact.amax(-1) - exact.amin(-1)) / 15
    assert_no_worse_than_torch(got.scale, expected.scale, span.unsqueeze(-1), floor=2.0**-25)
    assert_codes(replace(got, scale=expected.scale), expected)


@INTERPRET
def test_triton_edge_rows():
    big = torch.finfo(torch.float32).max
    x = torch.zeros(5, 24)
    x[1, 3], x[2], x[3, 0], x[4, 0] = 4.0, big, float("inf"), float("nan")
    for symmetric, order in itertools.product((True, False), (8, 24)):
        args = (x, IntFormat(4, symmetric), order)
        got = hadamard_quant(*args, backend="triton")
        assert_bitwise(got, hadamard_quant(*args, backend="reference"))


@INTERPRET
def test_triton_shapes():
    x = integers(24, 64).half()
    for view in (x.view(2, 3, 4, 64), x[0], x[:0], x[:, 8:32]):
        args = (view, IntFormat(4, False), 8)
        got = hadamard_quant(*args, layout=Layout.ROW_MAJOR, backend="triton")
        expected = hadamard_quant(*args, layout=Layout.ROW_MAJOR, backend="reference")
        assert_bitwise(got, expected)


@INTERPRET
@pytest.mark.parametrize(
    "K,order,inner,bits,dtype,reason",
    [
        (64, 64, 1, 4, torch.float64, "x is fp64"),
        (64, 64, 1, 3, torch.float32, "does not pack 3-bit codes"),
        (24, 4, 6, 2, torch.float32, "cannot pack 2-bit codes of inner 6"),
        (40960, 4096, 1, 4, torch.float32, "32768 elements at once, here 65536 with padding"),
    ],
)
def test_triton_reasons(K, order, inner, bits, dtype, reason):
    x = torch.zeros(1, K, dtype=dtype)
    with pytest.raises(NoBackendError, match=reason):
        hadamard_quant(x, IntFormat(bits), order, inner, layout=Layout.ROW_MAJOR, backend="triton")
