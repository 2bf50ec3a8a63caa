"""weight_only_gemm against fp64: small integers times powers of two make every fp32 sum exact."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, assert_registered, poison

from lowbit.formats import FRAGMENT_BITS, IntFormat, Layout, PackedTensor
from lowbit.ops import dequantize, quantize, to_layout, weight_only_gemm
from lowbit.ops.weight_only_gemm import INT_GEMM_LAYOUTS, WEIGHT_ONLY_GEMM

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Shape(NamedTuple):
    M: int
    N: int
    K: int


SHAPES = {
    "one": (Shape(1, 1, 1), 8),
    "primes": (Shape(17, 13, 577), 8),
    "odd": (Shape(33, 31, 1538), 4),
    "smollm2 q_proj, decode": (Shape(1, 576, 576), 4),
    "smollm2 gate_proj": (Shape(3, 1536, 576), 3),
    "smollm2 down_proj": (Shape(2, 576, 1536), 2),
}


def exact_w(N: int, K: int, format: IntFormat) -> PackedTensor:
    groups = (N, format.num_groups(K))
    scale = 2.0 ** torch.randint(-2, 2, groups)
    scale = scale if format.group_size is None else scale.half()
    codes, zero_point = (
        torch.randint(format.qmin, format.qmax + 1, shape).to(format.code_dtype)
        for shape in ((N, K), groups)
    )
    zero_point = None if format.symmetric else zero_point
    w = PackedTensor(codes, scale, zero_point, format, Layout.BYTES, torch.Size((N, K)))
    return to_layout(w, Layout.ROW_MAJOR)


def exact_x(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape).float()


def in_fp64(x: torch.Tensor, w: PackedTensor, bias=None) -> torch.Tensor:
    """The product in fp64 of weights rebuilt here from the codes, one byte each."""
    codes = to_layout(w, Layout.BYTES).codes.double()
    groups = codes.unflatten(-1, (w.scale.shape[1], -1))
    if w.zero_point is not None:
        groups = groups - w.zero_point.double().unsqueeze(-1)
    y = x.double() @ (groups * w.scale.double().unsqueeze(-1)).flatten(-2).T
    return y if bias is None else y + bias.double()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_format_is_exact(bits, symmetric, group_size):
    x, w = exact_x(5, 384), exact_w(7, 384, IntFormat(bits, symmetric, group_size))
    assert_bitwise(weight_only_gemm(x, w), in_fp64(x, w).float())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("shape", "bits"), SHAPES.values(), ids=SHAPES)
def test_every_shape_is_exact(shape, bits, symmetric):
    x, w = exact_x(shape.M, shape.K), exact_w(shape.N, shape.K, IntFormat(bits, symmetric))
    assert_bitwise(weight_only_gemm(x, w), in_fp64(x, w).float())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS])
def test_bias_and_output_are_narrowed_once(bias_dtype, dtype):
    x, w = exact_x(5, 64).to(dtype), exact_w(7, 64, IntFormat(4, False, 32))
    bias = None if bias_dtype is None else torch.randint(-9, 10, (7,)).to(bias_dtype)
    expected = in_fp64(x, w, bias)
    assert_bitwise(expected.float().double(), expected)
    assert_bitwise(weight_only_gemm(x, w, bias), expected.float().to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_residual_is_added_before_y_is_narrowed(dtype):
    x, w = exact_x(2, 3, 64).to(dtype), exact_w(7, 64, IntFormat(4, False, 32))
    bias, residual = torch.randint(-9, 10, (7,)).float(), (torch.randn(2, 3, 7) * 4).to(dtype)
    exact = in_fp64(x, w, bias)
    sums = (exact if dtype == torch.float64 else exact.float()) + residual
    got = weight_only_gemm(x, w, bias, residual=residual)
    assert_bitwise(got, sums.to(dtype))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 3, 7\), got \(6, 7\)"):
        weight_only_gemm(x, w, bias, residual=residual.flatten(0, 1))


def test_weights_are_not_narrowed_to_the_dtype_of_x():
    # 1 + 2^-10 is no bf16 number: 512 of it minus 512 is 0.5, and 0 if the weight was narrowed.
    codes = torch.ones(1, 1024, dtype=torch.int8)
    scale = torch.ones(1, 2).mul_(1 + 2.0**-10)
    scale[0, 1] = 1
    format = IntFormat(8, True, 512)
    w = PackedTensor(codes.view(torch.uint8), scale, None, format, Layout.ROW_MAJOR, codes.shape)
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    x[:, 512:] = -1
    assert weight_only_gemm(x, w).item() == 0.5


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 2), (0,), (2, 0)], ids=str)
def test_leading_dimensions_are_kept(leading):
    x, w = exact_x(*leading, 64), exact_w(6, 64, IntFormat(4))
    got = weight_only_gemm(x, w)
    assert got.shape == (*leading, 6)
    assert_bitwise(got, in_fp64(x, w).float())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "format", [IntFormat(4, True, 128), IntFormat(3, False, 64), IntFormat(2, False, 32)], ids=str
)
def test_random_operands(format, dtype):
    x = torch.randn(40, 768).to(dtype)
    w = quantize(torch.randn(48, 768), format, layout=Layout.ROW_MAJOR, scale_dtype=torch.float16)
    exact = x.double() @ dequantize(w, torch.float64).T
    in_torch = x @ dequantize(w, torch.float64).to(dtype).T
    assert_no_worse_than_torch(weight_only_gemm(x, w), in_torch, exact, floor=0.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 65504.0])
def test_one_extreme_row_leaves_the_others_alone(value):
    x, w = exact_x(3, 64).half(), exact_w(5, 64, IntFormat(4))
    expected = weight_only_gemm(x, w)
    x[1, 0] = value
    got = weight_only_gemm(x, w)
    assert_bitwise(got[0::2], expected[0::2])
    assert got[1].isfinite().all() == (in_fp64(x[1:2], w).abs().max() < 65520)


def op_arguments(symmetric: bool = True) -> dict:
    """A valid call of the op: M 3, N 5, K 64, 4 bits, two groups."""
    w = exact_w(5, 64, IntFormat(4, symmetric, 32))
    return {
        "x": exact_x(3, 64).half(),
        "w_codes": w.codes,
        "w_scale": w.scale,
        "w_zero_point": w.zero_point,
        "bias": torch.ones(5),
        "w_bits": 4,
        "w_layout": "row_major",
        "residual": None,
    }


U8 = torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, "x must be .* got torch.int8"),
        ({"x": torch.zeros(64)}, r"x must have shape \[M, K\], got \(64,\)"),
        ({"w_bits": 1}, r"w_bits must be in 2\.\.8, got 1"),
        ({"w_codes": torch.zeros(5, 31, dtype=U8)}, r"w_codes must be uint8 \[N, 32\] for K = 64"),
        ({"w_bits": 3}, r"w_codes must be uint8 \[N, 24\] for K = 64 and 3 bits"),
        ({"w_scale": torch.ones(5, 2).double()}, "w_scale must be fp32 or fp16"),
        ({"w_scale": torch.ones(5, 3)}, r"w_scale must have shape \[5, G\] with G dividing 64"),
        ({"w_zero_point": torch.zeros(5, 1, dtype=U8)}, r"w_zero_point must be uint8 \(5, 2\)"),
        ({"w_zero_point": torch.zeros(5, 2)}, r"w_zero_point must be uint8 \(5, 2\)"),
        ({"bias": torch.ones(1, 5)}, r"bias must have shape \[5\]"),
        ({"residual": torch.ones(3, 5)}, r"residual must be .* \(3, 5\), .* got torch.float32"),
        ({"residual": torch.ones(5).half()}, r"residual must be .*, got torch.float16 \(5,\)"),
        ({"w_layout": "bytes"}, "w_layout must be one of .*'fragment_float'.*, got 'bytes'"),
        ({"w_layout": "fragment"}, r"w_codes must be uint8 \(1, 1, 2048\) for \[N, K\]"),
        ({"w_layout": "fragment", "w_bits": 3}, "layout 'fragment' is for .* got .* 3 stored"),
        ({"w_layout": "fragment_int4", "w_bits": 8}, "layout 'fragment_int4' is for .* 8 stored"),
        ({"w_layout": "fragment_float"}, r"w_codes must be uint8 \(1, 1, 2048\) for \[N, K\]"),
        ({"w_layout": "fragment_float", "w_bits": 3}, r"w_codes must be uint8 \(1, 1, 1536\) for"),
    ],
)
def test_wrong_argument(change, message):
    with pytest.raises(ValueError, match=f"weight_only_gemm: {message}"):
        WEIGHT_ONLY_GEMM(*(op_arguments() | change).values())


def test_wrong_packed_tensor():
    w = exact_w(5, 64, IntFormat(4))
    with pytest.raises(ValueError, match="w must have layout 'row_major' or 'fragment' or .*, got"):
        weight_only_gemm(exact_x(3, 64), to_layout(w, Layout.BYTES))
    with pytest.raises(ValueError, match=r"weight_only_gemm: w must have shape \[N, 32\]"):
        weight_only_gemm(exact_x(3, 32), w)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_fragments_are_the_same_weights(bits, symmetric, group_size):
    x, w = exact_x(5, 96).half(), exact_w(70, 96, IntFormat(bits, symmetric, group_size))
    bias = torch.randn(70)
    fragments = to_layout(w, Layout.FRAGMENT_FLOAT)
    assert_bitwise(weight_only_gemm(x, fragments, bias), weight_only_gemm(x, w, bias))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(
    ("layout", "bits"),
    [(layout, bits) for layout in INT_GEMM_LAYOUTS for bits in FRAGMENT_BITS[layout]],
)
def test_weights_as_int_gemm_reads_them(layout, bits, group_size):
    """One stored weight for both."""
    x, w = exact_x(5, 96).half(), exact_w(70, 96, IntFormat(bits, True, group_size))
    bias, fragments = torch.randn(70), to_layout(w, layout)
    assert_bitwise(weight_only_gemm(x, fragments, bias), weight_only_gemm(x, w, bias))
    arguments = (x, fragments.codes, w.scale, None, bias, bits, layout.value)
    assert_registered(WEIGHT_ONLY_GEMM, *arguments)
    with pytest.raises(ValueError, match=f"w_zero_point must be None .*'{layout.value}'"):
        WEIGHT_ONLY_GEMM(*arguments[:3], w.scale.to(U8), *arguments[4:])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_registered(symmetric):
    arguments = op_arguments(symmetric)
    assert_registered(WEIGHT_ONLY_GEMM, *arguments.values())
    arguments["residual"] = torch.randn(3, 5).half()
    assert_registered(WEIGHT_ONLY_GEMM, *arguments.values())
    w = to_layout(exact_w(5, 64, IntFormat(4, symmetric, 32)), Layout.FRAGMENT_FLOAT)
    fragments = {"w_codes": w.codes, "w_scale": w.scale, "w_zero_point": w.zero_point}
    fragments["w_layout"] = w.layout.value
    assert_registered(WEIGHT_ONLY_GEMM, *(op_arguments(symmetric) | fragments).values())


# Triton's kernels: a GEMV for one row, tiles for more. The interpreter multiplies in fp32 and
# truncates to bf16; AOT compilation sees the matrix units and the rounding (test_compile.py).

TILE_EDGES = {  # tiles of 16, 64 and 128 rows, 16 and 64 columns; 64, 128 and 256 deep
    "one": (Shape(1, 1, 1), 8),
    "row + 1": (Shape(1, 17, 264), 3),
    "tile": (Shape(16, 64, 128), 4),
    "tile + 1": (Shape(17, 65, 136), 3),
    "tile - 1": (Shape(63, 63, 124), 2),
    "wide": (Shape(65, 1025, 34), 4),
    "primes": (Shape(65, 67, 127), 8),
}


def triton_gemm(x, w, bias=None, residual=None) -> torch.Tensor:
    with poison():
        return weight_only_gemm(x, w, bias, "triton", residual)


@pytest.mark.interpret
@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_triton_every_format(bits, symmetric, group_size, M):
    x, w = exact_x(M, 256), exact_w(7, 256, IntFormat(bits, symmetric, group_size))
    assert_bitwise(triton_gemm(x, w), in_fp64(x, w).float())


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("shape", "bits"), TILE_EDGES.values(), ids=TILE_EDGES)
def test_triton_every_shape(shape, bits, symmetric, dtype):
    w = exact_w(shape.N, shape.K, IntFormat(bits, symmetric))
    x = exact_x(shape.M, shape.K)
    if dtype == torch.bfloat16:  # one product a row, so that truncation is exact
        x, w = x.sign() * (torch.arange(shape.K) == shape.K - 1), replace(w, scale=w.scale.sign())
    x = x.to(dtype)
    assert_bitwise(triton_gemm(x, w), in_fp64(x, w).float().to(dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_triton_adds_the_bias_before_it_narrows(bias_dtype, M):
    x, w = exact_x(M, 64).half(), exact_w(7, 64, IntFormat(4, False, 32))
    x[:, 0] += 4096.0  # sums that fp16 would round
    bias = None if bias_dtype is None else torch.randint(-9, 10, (7,)).to(bias_dtype)
    assert_bitwise(triton_gemm(x, w, bias), in_fp64(x, w, bias).half())
    residual = torch.randint(-9, 10, (M, 7)).half() / 16  # bits that fp16 has no room for
    sums = in_fp64(x, w, bias) + residual.double()
    assert_bitwise(triton_gemm(x, w, bias, residual), sums.float().half())


@pytest.mark.interpret
@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "format", [IntFormat(4, True, 128), IntFormat(3, False, 64), IntFormat(8)], ids=str
)
def test_triton_random_operands(format, dtype, M):
    x = torch.randn(M, 768).to(dtype)
    w = quantize(torch.randn(48, 768), format, layout=Layout.ROW_MAJOR, scale_dtype=torch.float16)
    exact = x.double() @ dequantize(w, torch.float64).T
    in_torch = x @ dequantize(w, torch.float64).to(dtype).T
    assert_no_worse_than_torch(triton_gemm(x, w), in_torch, exact, floor=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 65504.0])
def test_triton_one_extreme_row_leaves_the_others_alone(value):
    x, w = exact_x(3, 64).half(), exact_w(5, 64, IntFormat(4))
    x[1, 0] = value
    expected = weight_only_gemm(x, w, backend="reference")
    got = triton_gemm(x, w)
    assert_bitwise(got[0::2], expected[0::2])
    assert_bitwise(got[1].isfinite(), expected[1].isfinite())
    assert_bitwise(triton_gemm(x[1:2], w).isfinite(), expected[1:2].isfinite())


@pytest.mark.interpret
def test_triton_no_rows_and_reasons():
    w = exact_w(5, 64, IntFormat(4))
    assert triton_gemm(exact_x(0, 64), w).shape == (0, 5)
    with pytest.raises(RuntimeError, match="triton: the Triton kernel computes in fp32"):
        triton_gemm(exact_x(3, 64).double(), w)
    with pytest.raises(RuntimeError, match=r"takes groups of \(32, 64, 128\) or one a row, got 16"):
        triton_gemm(exact_x(3, 64), exact_w(5, 64, IntFormat(4, True, 16)))
    with pytest.raises(RuntimeError, match="reads row_major weights, w is fragment_float"):
        triton_gemm(exact_x(3, 64), to_layout(w, Layout.FRAGMENT_FLOAT))
