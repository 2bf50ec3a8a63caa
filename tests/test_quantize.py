"""quantize, dequantize: against a quantizer that takes one number at a time, bit for bit."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_registered, poison, slow_quantize

from lowbit.formats import MIN_SCALE, IntFormat, Layout, PackedTensor
from lowbit.ops import dequantize, pack, quantize
from lowbit.ops.dispatch import NoBackendError
from lowbit.ops.quantize import DEQUANTIZE, FLOAT_DTYPES, QUANTIZE

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
BITS = pytest.mark.parametrize("bits", range(2, 9))
DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


def slow(x, format: IntFormat, clip=1.0, scale_dtype=torch.float32) -> PackedTensor:
    """slow_quantize over the groups of x [M, K]."""
    groups = x.float().reshape(-1, format.group_size or x.shape[-1]).tolist()
    results = [
        slow_quantize(g, format.bits, format.symmetric, clip, NUMPY[scale_dtype]) for g in groups
    ]
    codes, scale, zero = (np.array(values) for values in zip(*results, strict=True))
    scale_shape = (*x.shape[:-1], format.num_groups(x.shape[-1]))
    return PackedTensor(
        torch.tensor(codes, dtype=format.code_dtype).view(x.shape),
        torch.tensor(scale, dtype=scale_dtype).view(scale_shape),
        None if format.symmetric else torch.tensor(zero, dtype=torch.uint8).view(scale_shape),
        format,
        Layout.BYTES,
        x.shape,
    )


def random_rows(M: int, K: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    """Rows of different size and mean, so that zero points differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator)
    spread, mean = torch.randn(2, M, 1, generator=generator)
    return (x * spread.exp() + mean).to(dtype)


@BITS
@SYMMETRIC
@DTYPES
def test_exact_inputs(bits, symmetric, dtype):
    """All codes of the grid times a power of two, in a row that has its ends: nothing to round."""
    format = IntFormat(bits, symmetric)
    codes = torch.arange(format.qmin, format.qmax + 1)
    codes = codes[1:] if symmetric else codes  # symmetric: the largest magnitude is qmax
    for exponent, zero in itertools.product((-3, 0, 5), (0, 1, format.qmax)):
        zero = 0 if symmetric else zero
        x = ((codes - zero) * 2.0**exponent).to(dtype).expand(2, -1)
        got = quantize(x, format)
        assert_bitwise(got.codes, codes.to(format.code_dtype).expand(2, -1))
        assert_bitwise(got.scale, torch.full((2, 1), 2.0**exponent))
        if not symmetric:
            assert_bitwise(got.zero_point, torch.full((2, 1), zero, dtype=torch.uint8))
        assert_bitwise(dequantize(got, dtype), x)


@BITS
@SYMMETRIC
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize(
    "group_size,scale_dtype", [(None, torch.float32), (32, torch.float16), (16, torch.float32)]
)
def test_random_against_slow(bits, symmetric, clip, group_size, scale_dtype):
    """Every operation is IEEE and in a fixed order, so even random inputs agree bit for bit."""
    format = IntFormat(bits, symmetric, group_size)
    x = random_rows(6, 96, seed=bits)
    got = quantize(x, format, clip, scale_dtype=scale_dtype)
    assert_bitwise(got, slow(x, format, clip, scale_dtype))


@SYMMETRIC
@pytest.mark.parametrize("K", [1, 3, 576, 1536])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_of_real_models(symmetric, K, dtype):
    format = IntFormat(4, symmetric)
    x = random_rows(2, K, seed=K, dtype=dtype)
    assert_bitwise(quantize(x, format, 0.9), slow(x, format, 0.9))


def test_half_rounds_to_even_and_then_clamps():
    x = torch.tensor([[-7.0, -6.5, -5.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.0]])
    expected = torch.tensor([[-7, -6, -6, 0, 0, 2, 2, 6, 7]], dtype=torch.int8)
    assert_bitwise(quantize(x, IntFormat(4)).codes, expected)
    x = torch.tensor([[-8.0, -7.6, -7.4, 7.4, 7.6, 8.0, 14.0]])  # clip 0.5 of 14: scale 1
    expected = torch.tensor([[-8, -8, -7, 7, 7, 7, 7]], dtype=torch.int8)
    assert_bitwise(quantize(x, IntFormat(4), clip=0.5).codes, expected)


@SYMMETRIC
def test_fp64_against_fp32(symmetric):
    """fp64 arithmetic finds the same codes but for numbers that lie on the edge of two.

    Of fp32 numbers: among fp16 and bf16 ones exact halves of a step are not rare.
    """
    format = IntFormat(8, symmetric)
    x = random_rows(64, 512, seed=1)
    assert_codes(quantize(x.float(), format), quantize(x.double(), format))


@BITS
@SYMMETRIC
def test_error_is_at_most_half_a_step(bits, symmetric):
    """Asymmetric: rounding the zero point may cost the ends of the range another half."""
    x = random_rows(32, 256, seed=bits).double()
    t = quantize(x, IntFormat(bits, symmetric))
    steps = (dequantize(t, torch.float64) - x).abs() / t.scale.double()
    assert steps.max() <= (0.5 if symmetric else 1.0) + 1e-6
    assert steps.median() <= 0.3


@SYMMETRIC
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_edge_rows(bits, symmetric, scale_dtype):
    """Zeros, one outlier, the largest finite numbers, denormals, one sign, -0: all finite rows."""
    big, tiny = torch.finfo(torch.float32).max, 2.0**-149
    rows = torch.tensor(
        [
            [0.0] * 8,
            [1e4, *[1e-3] * 7],
            [-1e4, *[1e-3] * 7],
            [big, -big, 1.0, *[0.0] * 5],
            [big, big / 2, *[1.0] * 6],
            [65504.0 * 300, -65504.0, *[1.0] * 6],
            [tiny, -tiny, 2 * tiny, *[0.0] * 5],
            [2.0**-24, -(2.0**-25), *[0.0] * 6],
            [3.0, 5.0, 7.0, *[9.0] * 5],
            [-3.0, -5.0, -7.0, *[-9.0] * 5],
            [-0.0] * 8,
        ]
    )
    format = IntFormat(bits, symmetric)
    got = quantize(rows, format, scale_dtype=scale_dtype)
    assert_bitwise(got, slow(rows, format, scale_dtype=scale_dtype))
    assert got.scale.isfinite().all() and (got.scale >= MIN_SCALE).all()
    for zeros in (0, -1):
        assert got.scale[zeros] == MIN_SCALE
        assert not dequantize(got)[zeros].any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@DTYPES
def test_largest_finite_number_of_each_dtype(dtype, scale_dtype):
    x = torch.tensor([[1.0, -1.0, 0.25, 0.0]], dtype=torch.float64) * torch.finfo(dtype).max
    got = quantize(x.to(dtype), IntFormat(4), scale_dtype=scale_dtype)
    largest = torch.finfo(scale_dtype).max
    expected = min(torch.finfo(dtype).max / 7, largest)
    assert got.scale.item() == pytest.approx(expected, rel=2 * torch.finfo(scale_dtype).eps)
    assert got.codes.tolist()[0] == ([7, -7, 2, 0] if expected < largest else [7, -8, 7, 0])


@SYMMETRIC
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@DTYPES
def test_a_non_finite_number_spoils_its_group_only(symmetric, bad, dtype):
    format = IntFormat(4, symmetric, group_size=4)
    x = random_rows(2, 12, seed=0, dtype=dtype)
    expected = quantize(x, format)
    x[1, 5] = bad
    got = quantize(x, format)
    assert got.scale[1, 1].isnan() and not got.codes[1, 4:8].any()
    assert symmetric or got.zero_point[1, 1] == 0
    assert dequantize(got)[1, 4:8].isnan().all()
    got.scale[1, 1], got.codes[1, 4:8] = expected.scale[1, 1], expected.codes[1, 4:8]
    if not symmetric:
        got.zero_point[1, 1] = expected.zero_point[1, 1]
    assert_bitwise(got, expected)


@BITS
@SYMMETRIC
def test_row_major_is_the_packed_codes(bits, symmetric):
    format = IntFormat(bits, symmetric)
    x = random_rows(3, 64, seed=0)
    in_bytes, packed = quantize(x, format), quantize(x, format, layout=Layout.ROW_MAJOR)
    assert_bitwise(packed.codes, pack(in_bytes.codes, format.storage_bits))
    assert_bitwise((packed.scale, packed.zero_point), (in_bytes.scale, in_bytes.zero_point))
    assert_bitwise(dequantize(packed), dequantize(in_bytes))


def test_shapes_and_strides():
    """Any leading dimensions; a transposed and a sliced x give the bits of its copy."""
    x = random_rows(24, 64, seed=0)
    expected = quantize(x, IntFormat(4, group_size=32))
    got = quantize(x.view(2, 3, 4, 64), IntFormat(4, group_size=32))
    assert got.codes.shape == (2, 3, 4, 64) and got.scale.shape == (2, 3, 4, 2)
    assert_bitwise(got.codes.view(24, 64), expected.codes)
    assert quantize(x[0], IntFormat(4)).scale.shape == (1,)
    assert quantize(x[:0], IntFormat(4)).codes.shape == (0, 64)
    for strided in (x.T, x[:, 1:33], x[::3]):
        got = quantize(strided, IntFormat(4))
        assert_bitwise(got, quantize(strided.contiguous(), IntFormat(4)))
        assert got.codes.is_contiguous()  # as the fake says
    columns = replace(expected, codes=expected.codes.T.contiguous().T)
    assert_bitwise(dequantize(columns), dequantize(expected))
    assert dequantize(columns).is_contiguous()


@DTYPES
@SYMMETRIC
def test_dequantize_by_hand(symmetric, dtype):
    """fp32 arithmetic, narrowed once."""
    format = IntFormat(8, symmetric, group_size=2)
    codes = torch.tensor([[-128, 127, 0, 3]] if symmetric else [[0, 255, 128, 3]])
    scale = torch.tensor([[0.1, 3.0]], dtype=torch.float16)
    zero = None if symmetric else torch.tensor([[7, 200]], dtype=torch.uint8)
    t = PackedTensor(
        codes.to(format.code_dtype), scale, zero, format, Layout.BYTES, torch.Size((1, 4))
    )
    offsets = [0] * 4 if symmetric else [7, 7, 200, 200]
    values = [
        (c - o) * s
        for c, o, s in zip(
            codes[0].tolist(), offsets, scale[0].double().repeat_interleave(2).tolist(), strict=True
        )
    ]  # exact in fp64, and, 8 bits times 11, in fp32
    assert_bitwise(dequantize(t, dtype), torch.tensor([values], dtype=torch.float64).to(dtype))


def test_two_runs_and_argument_untouched():
    x = random_rows(4, 64, seed=0)
    before = x.clone()
    first = quantize(x, IntFormat(4, symmetric=False))
    assert_bitwise(quantize(x, IntFormat(4, symmetric=False)), first)
    dequantize(first)
    assert_bitwise(x, before)
    assert_bitwise(quantize(x, IntFormat(4, symmetric=False)), first)


@SYMMETRIC
@pytest.mark.parametrize("packed", [True, False])
def test_registered(symmetric, packed):
    x = random_rows(4, 64, seed=0, dtype=torch.bfloat16)
    args = (x, 4, 32, symmetric, 0.9, packed, torch.float16)
    assert_registered(QUANTIZE, *args)
    codes, scale, zero = QUANTIZE(*args)
    zero = None if symmetric else zero
    assert_registered(DEQUANTIZE, codes, scale, zero, 4, packed, torch.bfloat16)


def test_public_functions_compile():
    def round_trip(x):
        return dequantize(quantize(x, IntFormat(4, False, 32), layout=Layout.ROW_MAJOR), x.dtype)

    x = random_rows(4, 64, seed=0)
    compiled = torch.compile(round_trip, fullgraph=True, backend="eager")
    assert_bitwise(compiled(x), round_trip(x))


X = torch.zeros(2, 12)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: quantize(X.int(), IntFormat(4)), "quantize: x must be fp64.* got torch.int32"),
        (lambda: quantize(X[0, 0], IntFormat(4)), r"quantize: x must be .* of shape \(\)"),
        (lambda: quantize(X[:, :0], IntFormat(4)), r"quantize: x must be .* of shape \(2, 0\)"),
        (lambda: quantize(X, IntFormat(4, group_size=8)), "divide the row length 12, got 8"),
        (lambda: quantize(X, IntFormat(4), clip=0.0), r"clip must be in \(0, 1\], got 0.0"),
        (lambda: quantize(X, IntFormat(4), clip=1.5), r"clip must be in \(0, 1\], got 1.5"),
        (lambda: quantize(X, IntFormat(4), clip=float("nan")), "clip must be in .* got nan"),
        (
            lambda: quantize(X, IntFormat(4), scale_dtype=torch.bfloat16),
            "scale_dtype must be fp32 or fp16, got torch.bfloat16",
        ),
        (
            lambda: quantize(X, IntFormat(3), layout=Layout.ROW_MAJOR),
            "quantize: the row length must be a multiple of 8 to pack 3-bit codes, got 12",
        ),
        (lambda: QUANTIZE(X, 9, 0, True, 1.0, False, torch.float32), r"bits must be in 2\.\.8"),
        (lambda: QUANTIZE(X, 4, -1, True, 1.0, False, torch.float32), "group_size .* got -1"),
        (
            lambda: DEQUANTIZE(X, X[:, :1], None, 4, False, torch.float32),
            "codes must be int8 or uint8, got torch.float32",
        ),
        (
            lambda: DEQUANTIZE(X.char(), X[:, :5], None, 4, False, torch.float32),
            r"scale must have shape \[\.\.\., G\] with G dividing 12, got \(2, 5\)",
        ),
        (
            lambda: DEQUANTIZE(X.byte(), X[:, :2], X[:, :1].byte(), 4, False, torch.float32),
            r"zero_point must have scale's shape \(2, 2\), got \(2, 1\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


INTERPRET = pytest.mark.interpret
# bf16 results are left to a GPU: the interpreter truncates where it should round


@INTERPRET
@SYMMETRIC
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    "K,group_size,dtype,scale_dtype",
    [
        (1, None, torch.float32, torch.float32),
        (7, None, torch.float16, torch.float32),
        (96, 24, torch.bfloat16, torch.float16),
        (130, 26, torch.float32, torch.float16),
        (576, None, torch.bfloat16, torch.float32),
    ],
)
def test_triton_gives_the_bits_of_the_reference(bits, symmetric, K, group_size, dtype, scale_dtype):
    """IEEE operations in a fixed order, so random inputs agree too; both clips, both layouts."""
    format = IntFormat(bits, symmetric, group_size)
    x = random_rows(5, K, seed=K, dtype=dtype)
    layouts = [Layout.BYTES]
    if format.storage_bits != 3 and (group_size or K) * format.storage_bits % 8 == 0:
        layouts.append(Layout.ROW_MAJOR)
    for layout, clip in itertools.product(layouts, (1.0, 0.9)):
        args = (x, format, clip, layout, scale_dtype)
        with poison():
            got = quantize(*args, backend="triton")
        expected = quantize(*args, backend="reference")
        assert_bitwise(got, expected)
        for out in (torch.float32, torch.float16):
            with poison():
                back = dequantize(got, out, backend="triton")
            assert_bitwise(back, dequantize(expected, out, backend="reference"))


@INTERPRET
@SYMMETRIC
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_triton_edge_rows(bits, symmetric, scale_dtype):
    big, tiny, inf = torch.finfo(torch.float32).max, 2.0**-149, float("inf")
    rows = torch.tensor(
        [
            [0.0] * 5,
            [-0.0] * 5,
            [1e4, *[1e-3] * 4],
            [-1e4, *[1e-3] * 4],
            [big, -big, 1.0, 0.0, 0.0],
            [big, big / 2, 1.0, 1.0, 1.0],
            [65504.0 * 300, -65504.0, 1.0, 1.0, 1.0],
            [tiny, -tiny, 2 * tiny, 0.0, 0.0],
            [3.0, 5.0, 7.0, 9.0, 9.0],
            [-3.0, -5.0, -7.0, -9.0, -9.0],
            [1.0, inf, 2.0, 3.0, 4.0],
            [1.0, 2.0, -inf, 3.0, 4.0],
            [float("nan"), 1.0, 2.0, 3.0, 4.0],
        ]
    )
    format = IntFormat(bits, symmetric)
    got = quantize(rows, format, 0.9, scale_dtype=scale_dtype, backend="triton")
    expected = quantize(rows, format, 0.9, scale_dtype=scale_dtype, backend="reference")
    assert_bitwise(got, expected)
    # which of its NaNs a product gives, IEEE does not say
    back = [dequantize(got, backend=b).nan_to_num(-0.5) for b in ("triton", "reference")]
    assert_bitwise(*back)


@INTERPRET
def test_triton_rounds_half_to_even_and_then_clamps():
    x = torch.tensor([[-7.0, -6.5, -5.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.0]])
    expected = torch.tensor([[-7, -6, -6, 0, 0, 2, 2, 6, 7]], dtype=torch.int8)
    assert_bitwise(quantize(x, IntFormat(4), backend="triton").codes, expected)


@INTERPRET
def test_triton_shapes_and_strides():
    x = random_rows(24, 64, seed=0)
    format = IntFormat(4, False, 32)
    for view in (x.view(2, 3, 4, 64), x[0], x[:0], x[::3], x[:, 32:]):
        got = quantize(view, format, layout=Layout.ROW_MAJOR, backend="triton")
        expected = quantize(view, format, layout=Layout.ROW_MAJOR, backend="reference")
        assert_bitwise(got, expected)
        assert_bitwise(dequantize(got, backend="triton"), dequantize(got, backend="reference"))
    columns = replace(got, codes=got.codes.T.contiguous().T, scale=got.scale.T.contiguous().T)
    assert_bitwise(dequantize(columns, backend="triton"), dequantize(got, backend="reference"))


@INTERPRET
@pytest.mark.parametrize(
    "call,reason",
    [
        (lambda: quantize(X.double(), IntFormat(4), backend="triton"), "x is fp64"),
        (
            lambda: quantize(X[:, :8], IntFormat(3), layout=Layout.ROW_MAJOR, backend="triton"),
            "does not pack 3-bit codes",
        ),
        (
            lambda: quantize(
                X, IntFormat(4, group_size=3), layout=Layout.ROW_MAJOR, backend="triton"
            ),
            "groups of 3 do not fill whole bytes of 4-bit codes",
        ),
        (
            lambda: quantize(torch.zeros(1, 32769), IntFormat(4), backend="triton"),
            "a group must not be longer than 32768, it is 32769",
        ),
        (
            lambda: dequantize(quantize(X, IntFormat(4)), torch.float64, backend="triton"),
            "the result torch.float64",
        ),
    ],
)
def test_triton_reasons(call, reason):
    with pytest.raises(NoBackendError, match=reason):
        call()
