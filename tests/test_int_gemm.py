"""int_gemm against sums in fp64, which hold every int32 exactly; scales are powers of two there."""

import importlib
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, assert_registered, poison
from packed import pretend_cuda

from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import dequantize, int_gemm, kernel_layouts, quantize, to_layout
from lowbit.ops.dispatch import Backend

module = importlib.import_module("lowbit.ops.int_gemm")  # lowbit.ops.int_gemm is the function

W_BITS, X_BITS = (2, 3, 4, 6, 8), (4, 6, 8)
INT32_MAX = 2**31 - 1


class Shape(NamedTuple):
    M: int
    N: int
    K: int


SHAPES = {
    "one": (Shape(1, 1, 1), 8),
    "primes": (Shape(17, 13, 577), 8),
    "odd": (Shape(33, 31, 1538), 4),
    "smollm2 q_proj, decode": (Shape(1, 576, 576), 4),
    "smollm2 gate_proj": (Shape(3, 1536, 576), 4),
    "smollm2 down_proj": (Shape(2, 576, 1536), 4),
    "past a row chunk": (Shape(module.ROW_CHUNK + 1, 3, 64), 4),
}


def power_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-2, 2, shape)


def random_codes(shape: tuple[int, ...], format: IntFormat) -> torch.Tensor:
    return torch.randint(format.qmin, format.qmax + 1, shape).to(format.code_dtype)


def exact_x(shape: tuple[int, ...], bits: int, symmetric: bool) -> PackedTensor:
    format, rows = IntFormat(bits, symmetric), (*shape[:-1], 1)
    zero_point = None if symmetric else random_codes(rows, format)
    codes = random_codes(shape, format)
    return PackedTensor(
        codes, power_of_two(*rows), zero_point, format, Layout.BYTES, torch.Size(shape)
    )


def exact_w(N: int, K: int, bits: int, group_size: int | None = None) -> PackedTensor:
    format = IntFormat(bits, True, group_size)
    scale = power_of_two(N, format.num_groups(K))
    scale = scale if group_size is None else scale.half()
    codes = random_codes((N, K), format)
    return to_layout(
        PackedTensor(codes, scale, None, format, Layout.BYTES, torch.Size((N, K))),
        Layout.ROW_MAJOR,
    )


def centered(t: PackedTensor) -> torch.Tensor:
    """fp64 [..., K]: code - zero_point."""
    codes = to_layout(t, Layout.BYTES).codes.double()
    return codes if t.zero_point is None else codes - t.zero_point.double()


def expected_y(x: PackedTensor, w: PackedTensor, bias=None, out_dtype=torch.float32):
    """int_gemm in fp64, every number of which fits fp32 for the operands above."""
    G = w.scale.shape[1]
    groups = [t.unflatten(-1, (G, -1)) for t in (centered(x), centered(w))]
    acc = torch.einsum("...gk,ngk->...ng", *groups)
    y = (acc * w.scale.double()).sum(-1) * x.scale.double()
    y = y if bias is None else y + bias.double()
    assert_bitwise(y.float().double(), y)
    return y.float().to(out_dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["int8 dot", "fp32 sums"])
def has_int8_dot(request, monkeypatch):
    """Both ways the reference multiplies; the first is exact on CPUs that have VNNI only."""
    if request.param and not module._has_int8_dot():
        pytest.skip("this CPU has no int8 dot product")
    monkeypatch.setattr(module, "_has_int8_dot", lambda: request.param)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("x_bits", X_BITS)
@pytest.mark.parametrize("w_bits", W_BITS)
def test_every_format_is_exact(w_bits, x_bits, symmetric, group_size, has_int8_dot):
    x, w = exact_x((5, 384), x_bits, symmetric), exact_w(7, 384, w_bits, group_size)
    expected = expected_y(x, w)
    assert_bitwise(int_gemm(x, w, out_dtype=torch.float32), expected)
    rows = to_layout(x, Layout.ROW_MAJOR)
    assert_bitwise(int_gemm(rows, w, out_dtype=torch.float32), expected)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("shape", "bits"), SHAPES.values(), ids=SHAPES)
def test_every_shape_is_exact(shape, bits, symmetric, has_int8_dot):
    x, w = exact_x((shape.M, shape.K), bits, symmetric), exact_w(shape.N, shape.K, bits)
    assert_bitwise(int_gemm(x, w, out_dtype=torch.float32), expected_y(x, w))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_bias_and_output_are_narrowed_once(bias_dtype, out_dtype):
    x, w = exact_x((5, 64), 8, False), exact_w(7, 64, 4, 32)
    bias = None if bias_dtype is None else torch.randint(-9, 10, (7,)).to(bias_dtype)
    got = int_gemm(x, w, bias, out_dtype)
    assert_bitwise(got, expected_y(x, w, bias, out_dtype))


KERNEL_LAYOUTS = [(Layout.FRAGMENT, 4), (Layout.FRAGMENT, 8), (Layout.FRAGMENT_INT4, 4)]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("layout", "bits"), [*KERNEL_LAYOUTS, (Layout.FRAGMENT, 6)])
@pytest.mark.parametrize(("N", "K"), [(7, 96), (64, 64), (65, 160)])
def test_kernel_layouts_are_the_same_weight(N, K, layout, bits, symmetric, group_size):
    """N and K short of whole tiles: y has N columns, whatever lies in the padding."""
    x, w = exact_x((5, K), bits, symmetric), exact_w(N, K, bits, group_size)
    y = int_gemm(to_layout(x, Layout.ROW_MAJOR), to_layout(w, layout), out_dtype=torch.float32)
    assert_bitwise(y, expected_y(x, w))


@pytest.mark.parametrize("out_dtype", module.OUT_DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_residual_is_added_last_in_fp32(has_bias, out_dtype):
    x, w = exact_x((2, 3, 64), 8, True), exact_w(7, 64, 4, 32)
    bias = torch.randint(-9, 10, (7,)).float() if has_bias else None
    residual = torch.randint(-9, 10, (2, 3, 7)).to(out_dtype)
    got = int_gemm(x, w, bias, out_dtype, residual=residual)
    exact = expected_y(x, w, bias).double() + residual.double()
    assert_bitwise(got, exact.float().to(out_dtype))


def rounding_case():
    """(x, w, bias, residual): 2^-24 per step, so that each order of additions rounds otherwise."""
    ones = torch.ones(1, 8, dtype=torch.int8)
    x = PackedTensor(ones, torch.full((1, 1), 1 / 8), None, IntFormat(4), Layout.BYTES, ones.shape)
    w = PackedTensor(ones, torch.ones(1, 1), None, IntFormat(4), Layout.BYTES, ones.shape)
    return x, to_layout(w, Layout.ROW_MAJOR), torch.tensor([2.0**-24]), torch.tensor([[2.0**-24]])


def test_bias_comes_before_residual():
    """1 + 2^-24 rounds to 1 and so does the next; the other way round they make 2^-23 together."""
    x, w, bias, residual = rounding_case()
    assert int_gemm(x, w, bias, torch.float32, residual=residual).item() == 1.0
    assert (1.0 + (bias + residual)).item() > 1.0
    minus_one = torch.full((1, 1), -1.0)  # 1 + 2^-24 is 1 again; 1 - 1 + 2^-24 would not be 0
    assert int_gemm(x, w, bias, torch.float32, residual=minus_one).item() == 0.0


GROUPED, TWO_LEVEL = IntFormat(4, True, 64), IntFormat(4, True, 64, True)


@pytest.mark.parametrize(
    ("w", "x", "N", "K", "sm", "expected"),
    [
        (IntFormat(4), IntFormat(4), 64, 64, 80, Layout.FRAGMENT_INT4),
        (IntFormat(4), IntFormat(4, False), 8, 16, 89, Layout.FRAGMENT_INT4),
        (TWO_LEVEL, IntFormat(4), 64, 64, 86, Layout.FRAGMENT_INT4),
        (IntFormat(4), IntFormat(4), 64, 64, 90, Layout.FRAGMENT),
        (IntFormat(4), IntFormat(4), 64, 64, 120, Layout.FRAGMENT),
        (IntFormat(4), IntFormat(8), 64, 64, 80, Layout.FRAGMENT),
        (IntFormat(4), IntFormat(3), 64, 64, 80, Layout.FRAGMENT),
        (IntFormat(8), IntFormat(4), 64, 64, 80, Layout.FRAGMENT),
        (IntFormat(6), IntFormat(6, False), 64, 64, 80, Layout.FRAGMENT),
        (TWO_LEVEL, IntFormat(8), 64, 128, 90, Layout.FRAGMENT),
        (IntFormat(4, True, 32, True), IntFormat(8), 64, 64, 90, None),
        (GROUPED, IntFormat(8), 64, 64, 90, None),
        (IntFormat(4, False), IntFormat(8), 64, 64, 90, None),
        (IntFormat(3), IntFormat(4), 64, 64, 80, None),
        (IntFormat(2), IntFormat(8), 64, 64, 90, None),
        (IntFormat(4), IntFormat(4), 60, 64, 80, None),
        (IntFormat(4), IntFormat(4), 64, 72, 80, None),
        (IntFormat(4), None, 8, 8, 80, Layout.FRAGMENT_FLOAT),
        (IntFormat(6, False), None, 64, 72, 90, Layout.FRAGMENT_FLOAT),
        (IntFormat(4, False, 32), None, 64, 64, 120, Layout.FRAGMENT_FLOAT),
        (IntFormat(4, True, 16), None, 64, 64, 90, None),
        (TWO_LEVEL, None, 64, 64, 90, None),
        (IntFormat(3), None, 64, 64, 90, Layout.FRAGMENT_FLOAT),
        (IntFormat(2, False, 64), None, 8, 64, 80, Layout.FRAGMENT_FLOAT),
        (IntFormat(4), None, 60, 64, 90, None),
        (IntFormat(4), None, 64, 60, 90, None),
    ],
)
def test_layout_that_the_cuda_kernels_want(w, x, N, K, sm, expected):
    assert kernel_layouts.cuda_layout(w, x, K, N, sm) is expected


def test_weights_are_laid_out_where_the_cuda_kernel_takes_them(monkeypatch):
    w, formats = exact_w(8, 64, 4), (IntFormat(4), torch.float16)
    assert kernel_layouts.laid_out_for_device(w, *formats) is w  # on a CPU
    pretend_cuda(monkeypatch, 90)
    assert_bitwise(kernel_layouts.laid_out_for_device(w, *formats), to_layout(w, Layout.FRAGMENT))
    prepared = to_layout(w, Layout.FRAGMENT_INT4)  # for another device
    assert_bitwise(
        kernel_layouts.laid_out_for_device(prepared, *formats), to_layout(w, Layout.FRAGMENT)
    )
    for N in (7, 12):  # N % 8
        assert (
            kernel_layouts.laid_out_for_device(exact_w(N, 64, 4), *formats).layout
            is Layout.ROW_MAJOR
        )
    refusing = Backend(lambda *args: "not fp32" if args[9] == torch.float32 else None)
    monkeypatch.setitem(module.INT_GEMM.backends, "cuda", refusing)
    assert kernel_layouts.laid_out_for_device(w, *formats).layout is Layout.FRAGMENT
    assert kernel_layouts.laid_out_for_device(w, IntFormat(4), torch.float32) is w
    prepared = to_layout(w, Layout.FRAGMENT)
    assert_bitwise(kernel_layouts.laid_out_for_device(prepared, IntFormat(4), torch.float32), w)


def test_output_is_fp16_by_default():
    assert int_gemm(exact_x((1, 8), 4, True), exact_w(1, 8, 4)).dtype == torch.float16


def test_sum_past_fp16_is_scaled_before_it_is_narrowed():
    ones = torch.full((1, 4096), 7, dtype=torch.int8)  # 7 * 7 * 4096 = 200704 > 65504
    x = PackedTensor(
        ones, torch.full((1, 1), 2.0**-10), None, IntFormat(4), Layout.BYTES, ones.shape
    )
    w = to_layout(
        PackedTensor(ones, torch.ones(1, 1), None, IntFormat(4), Layout.BYTES, ones.shape),
        Layout.ROW_MAJOR,
    )
    assert int_gemm(x, w).item() == 196.0


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 2), (0,), (2, 0)], ids=str)
def test_leading_dimensions_are_kept(leading):
    x, w = exact_x((*leading, 64), 4, False), exact_w(6, 64, 4)
    got = int_gemm(x, w, out_dtype=torch.float32)
    assert got.shape == (*leading, 6)
    assert_bitwise(got, expected_y(x, w))


@pytest.mark.parametrize(
    ("K", "symmetric", "x_code", "zero_point", "w_code", "acc"),
    [
        (131071, True, -128, None, -128, 131071 * 2**14),
        (131071, True, 127, None, -128, -131071 * 127 * 128),
        (131071, True, 127, None, 127, 131071 * 127 * 127),  # odd: past 2^24 every sum rounds
        (65793, False, 255, 0, -128, -65793 * 255 * 128),
        (65793, False, 255, 0, 127, 65793 * 255 * 127),
        (65793, False, 0, 255, -128, 65793 * 255 * 128),
    ],
)
def test_largest_codes_at_the_largest_K(
    K, symmetric, x_code, zero_point, w_code, acc, has_int8_dot
):
    assert abs(acc) <= INT32_MAX
    format = IntFormat(8, symmetric)
    x = torch.full((1, K), x_code, dtype=format.code_dtype)
    zero_point = None if symmetric else torch.tensor([[zero_point]], dtype=torch.uint8)
    x = PackedTensor(x, torch.ones(1, 1), zero_point, format, Layout.BYTES, x.shape)
    w = torch.full((1, K), w_code, dtype=torch.int8)
    w = PackedTensor(
        w.view(torch.uint8), torch.ones(1, 1), None, IntFormat(8), Layout.ROW_MAJOR, w.shape
    )
    got = int_gemm(x, w, out_dtype=torch.float32)
    assert_bitwise(got, torch.tensor([[acc]], dtype=torch.int32).float())


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("x_bits", X_BITS)
@pytest.mark.parametrize("w_bits", W_BITS)
def test_int32_bound_is_refused_one_step_past_it(w_bits, x_bits, symmetric, G):
    largest = 2 ** (w_bits - 1) * (2 ** (x_bits - 1) if symmetric else 2**x_bits - 1)
    longest = INT32_MAX // largest // 8 * 8  # whole bytes of packed codes

    def run(group):
        t = {"device": "meta"}
        code_dtype = torch.int8 if symmetric else torch.uint8
        w_row = group * G * IntFormat(w_bits).storage_bits // 8
        return module.INT_GEMM(
            torch.empty(2, group * G, dtype=code_dtype, **t),
            torch.empty(2, 1, **t),
            None if symmetric else torch.empty(2, 1, dtype=torch.uint8, **t),
            torch.empty(3, w_row, dtype=torch.uint8, **t),
            torch.empty(3, G, **t),
            None,
            x_bits,
            False,
            w_bits,
            torch.float16,
        )

    assert run(longest).shape == (2, 3)
    with pytest.raises(ValueError, match=f"overflow past {INT32_MAX // largest} elements"):
        run(longest + 8)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("w_format", [IntFormat(4), IntFormat(4, True, 64)], ids=["row", "g64"])
@pytest.mark.parametrize("x_format", [IntFormat(4), IntFormat(8, False)], ids=["sym4", "asym8"])
def test_random_operands(x_format, w_format, out_dtype):
    x = quantize(torch.randn(40, 576), x_format)
    w = quantize(torch.randn(48, 576), w_format, layout=Layout.ROW_MAJOR)
    bias = torch.randn(48)
    numbers = [dequantize(t, torch.float64) for t in (x, w)]
    in_fp64 = numbers[0] @ numbers[1].T + bias.double()
    a, b = (t.to(out_dtype) for t in numbers)
    in_torch = a @ b.T + bias.to(out_dtype)
    assert_no_worse_than_torch(int_gemm(x, w, bias, out_dtype), in_torch, in_fp64, floor=0.0)


def op_arguments(symmetric: bool = True, packed: bool = False) -> dict:
    """A valid call of the op: M 3, N 5, K 64, 4 x 4 bits, two groups."""
    x, w = exact_x((3, 64), 4, symmetric), exact_w(5, 64, 4, 32)
    x = to_layout(x, Layout.ROW_MAJOR) if packed else x
    return {
        "x_codes": x.codes,
        "x_scale": x.scale,
        "x_zero_point": x.zero_point,
        "w_codes": w.codes,
        "w_scale": w.scale,
        "bias": torch.ones(5),
        "x_bits": 4,
        "x_packed": packed,
        "w_bits": 4,
        "out_dtype": torch.float16,
        "w_channel_scale": None,
        "w_layout": "row_major",
        "residual": torch.ones(3, 5).half(),
    }


U8 = torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_bits": 1}, r"x_bits must be in 2\.\.8, got 1"),
        ({"w_bits": 9}, r"w_bits must be in 2\.\.8, got 9"),
        ({"x_codes": torch.zeros(3, 64, dtype=U8)}, r"x_codes must be torch.int8 \[M, K\]"),
        ({"x_codes": torch.zeros(64, dtype=torch.int8)}, r"x_codes must be .* got .* \(64,\)"),
        ({"x_packed": True}, r"x_codes must be torch.uint8 .*packed=True"),
        ({"x_zero_point": torch.zeros(3, 1, dtype=U8)}, "x_codes must be torch.uint8 .*=False"),
        ({"x_scale": torch.ones(3, 1).half()}, r"x_scale must be fp32 \[3, 1\]"),
        ({"x_scale": torch.ones(3)}, r"x_scale must be fp32 \[3, 1\]"),
        ({"w_codes": torch.zeros(5, 31, dtype=U8)}, r"w_codes must be uint8 \[N, 32\] for K = 64"),
        ({"w_codes": torch.zeros(5, 32, dtype=torch.int8)}, "w_codes must be uint8"),
        ({"w_scale": torch.ones(5, 2).bfloat16()}, "w_scale must be fp32 or fp16"),
        ({"w_scale": torch.ones(4, 2)}, r"w_scale must have shape \[5, G\] with G dividing 64"),
        ({"w_scale": torch.ones(5, 3)}, r"w_scale must have shape \[5, G\] with G dividing 64"),
        ({"w_scale": torch.ones(5, 0)}, r"w_scale must have shape \[5, G\] with G dividing 64"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[5\]"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, "bias must be"),
        ({"out_dtype": torch.float64}, "out_dtype must be fp32, fp16 or bf16"),
        ({"out_dtype": torch.bfloat16}, r"residual must be torch.bfloat16 \[3, 5\], .*float16"),
        ({"residual": torch.ones(5).half()}, r"residual must be torch.float16 \[3, 5\], .* \(5,\)"),
        ({"residual": torch.ones(5, 3).half()}, r"residual must be torch.float16 \[3, 5\]"),
        ({"w_layout": "bytes"}, r"w_layout must be one of \['row_major', .*, got 'bytes'"),
        ({"w_layout": "swizzled"}, r"w_layout must be one of .*, got 'swizzled'"),
        ({"w_layout": "fragment"}, r"w_codes must be uint8 \(1, 1, 2048\) for .* \(5, 32\)"),
        (
            {"w_layout": "fragment", "w_codes": torch.zeros(1, 1, 2048, dtype=torch.int8)},
            r"w_codes must be uint8 \(1, 1, 2048\) .* 'fragment', got torch.int8",
        ),
        ({"w_layout": "fragment", "w_scale": torch.ones(5)}, r"w_scale must have shape \[N, G\]"),
        ({"w_layout": "fragment", "w_bits": 3}, "layout 'fragment' .* 4 or 8 stored bits"),
        ({"w_layout": "fragment_int4", "w_bits": 8}, "layout 'fragment_int4' .* 4 stored bits"),
    ],
)
def test_wrong_argument(change, message):
    with pytest.raises(ValueError, match=f"int_gemm: {message}"):
        module.INT_GEMM(*(op_arguments() | change).values())


@pytest.mark.parametrize("zero_point", [torch.zeros(3, dtype=U8), torch.zeros(3, 1)])
def test_wrong_zero_point(zero_point):
    arguments = op_arguments(symmetric=False) | {"x_zero_point": zero_point}
    with pytest.raises(ValueError, match=r"int_gemm: x_zero_point must be uint8 \[3, 1\]"):
        module.INT_GEMM(*arguments.values())


def test_wrong_packed_tensor():
    x, w = exact_x((3, 64), 4, True), exact_w(5, 64, 4)
    with pytest.raises(ValueError, match="int_gemm: w must .* 'row_major' or 'fragment' .*'bytes'"):
        int_gemm(x, to_layout(w, Layout.BYTES))
    with pytest.raises(ValueError, match="x must have layout 'row_major' or 'bytes', got 'fragm"):
        int_gemm(to_layout(x, Layout.FRAGMENT), w)
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 5\), got \(1, 3, 5\)"):
        int_gemm(x, w, residual=torch.ones(1, 3, 5).half())
    with pytest.raises(ValueError, match=r"int_gemm: w must have shape \[N, 64\]"):
        int_gemm(x, exact_w(5, 32, 4))
    with pytest.raises(ValueError, match="one scale per row, got group_size 32"):
        int_gemm(quantize(torch.ones(3, 64), IntFormat(4, True, 32)), w)
    asymmetric = quantize(torch.ones(5, 64), IntFormat(4, False), layout=Layout.ROW_MAJOR)
    with pytest.raises(ValueError, match="int_gemm: w must be symmetric"):
        int_gemm(x, asymmetric)


def test_backend_without_a_kernel_says_so():
    with pytest.raises(RuntimeError, match="cuda: the CUDA kernel reads weights in"):
        int_gemm(exact_x((3, 64), 4, True), exact_w(5, 64, 4), backend="cuda")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bytes"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_registered(symmetric, packed):
    assert_registered(module.INT_GEMM, *op_arguments(symmetric, packed).values())


@pytest.mark.parametrize(("layout", "bits"), KERNEL_LAYOUTS)
def test_registered_with_a_kernel_layout(layout, bits):
    w = to_layout(exact_w(70, 64, bits, 32), layout)
    changes = {"w_codes": w.codes, "w_scale": w.scale, "w_bits": bits, "w_layout": layout.value}
    changes |= {"bias": None, "residual": None}
    assert_registered(module.INT_GEMM, *(op_arguments() | changes).values())


# Triton's kernel. Every sum is an integer and no product is fused, so all its bits are the
# reference's. The interpreter truncates to bf16, so numbers stored there are exact in bf16.

TILE_EDGES = {  # tiles of 16, 64 and 128 rows, 32, 64 and 128 columns; 128 and 256 deep
    "one": (Shape(1, 1, 1), 8),
    "tile": (Shape(16, 64, 128), 4),
    "tile + 1": (Shape(17, 65, 130), 4),
    "tile - 1": (Shape(63, 63, 127), 8),
    "wide": (Shape(65, 1025, 34), 4),
    "smollm2 q_proj, decode": (Shape(1, 576, 576), 4),
}


def assert_triton_is_bitwise(x, w, bias=None, out_dtype=torch.float32, residual=None):
    arguments = (x, w, bias, out_dtype)
    expected = int_gemm(*arguments, backend="reference", residual=residual)
    with poison():
        assert_bitwise(int_gemm(*arguments, backend="triton", residual=residual), expected)


def random_scales(t: PackedTensor) -> PackedTensor:
    return replace(t, scale=torch.rand_like(t.scale.float()).add_(0.01).to(t.scale.dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("layout", [Layout.ROW_MAJOR, Layout.BYTES], ids=["packed", "bytes"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("x_bits", X_BITS)
@pytest.mark.parametrize("w_bits", [4, 6, 8])
def test_triton_every_format(w_bits, x_bits, symmetric, layout, group_size):
    x, w = exact_x((3, 256), x_bits, symmetric), exact_w(5, 256, w_bits, group_size)
    x = to_layout(x, layout)
    got = int_gemm(x, w, out_dtype=torch.float32, backend="triton")
    assert_bitwise(got, expected_y(x, w))
    assert_triton_is_bitwise(random_scales(x), random_scales(w), torch.randn(5), torch.float16)


@pytest.mark.interpret
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("shape", "bits"), TILE_EDGES.values(), ids=TILE_EDGES)
def test_triton_every_shape(shape, bits, symmetric):
    x, w = exact_x((shape.M, shape.K), bits, symmetric), exact_w(shape.N, shape.K, bits)
    assert_triton_is_bitwise(
        random_scales(x), random_scales(w), residual=torch.randn(shape.M, shape.N)
    )


@pytest.mark.interpret
@pytest.mark.parametrize(("M", "K"), [(1, 1030), (3, 2500), (64, 1024), (65, 1024)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("x_bits", "w_bits"), [(4, 4), (8, 4), (8, 8)])
def test_triton_split_k(x_bits, w_bits, symmetric, M, K):
    """Long rows of few tiles: up to 64 of them in several parts, whose sums a kernel adds."""
    x, w = exact_x((M, K), x_bits, symmetric), exact_w(40, K, w_bits)
    x, w = to_layout(random_scales(x), Layout.ROW_MAJOR), random_scales(w)
    residual = torch.randn(40, M).half().T  # not contiguous
    assert_triton_is_bitwise(x, w, torch.randn(40), torch.float16, residual)


@pytest.mark.interpret
@pytest.mark.parametrize("group_size", [None, 32])
def test_triton_adds_the_residual_last(group_size):
    """Where the order of additions shows; per channel, and in groups."""
    x, w, bias, residual = rounding_case()
    if group_size:
        codes = torch.zeros(1, 64, dtype=torch.int8)
        codes[0, :8] = 1
        x = replace(x, codes=codes, shape=codes.shape)
        scale = torch.ones(1, 2, dtype=torch.float16)
        w = replace(
            w,
            codes=codes,
            scale=scale,
            format=IntFormat(4, True, 32),
            shape=codes.shape,
            layout=Layout.BYTES,
        )
        w = to_layout(w, Layout.ROW_MAJOR)
    for factor in (1, -(2.0**24)):
        assert_triton_is_bitwise(x, w, bias, residual=residual * factor)
        assert_triton_is_bitwise(x, w, bias * 2, residual=residual * factor)
    bf16 = torch.randint(-9, 10, (1, 1)).bfloat16()
    assert_triton_is_bitwise(x, w, bias, torch.bfloat16, bf16)


@pytest.mark.interpret
def test_triton_splits_only_what_leaves_a_gpu_idle(monkeypatch):
    from lowbit.kernels import int_gemm as triton_int_gemm

    monkeypatch.setattr(triton_int_gemm, "processors_of", lambda device: 132)
    columns = triton_int_gemm.columns_of_a_part
    device = torch.device("cpu")
    assert columns(4096, 1000, 256, device) == 4096  # tiles enough
    assert columns(4096, 128, 256, device) == 1024  # 528 programs wanted
    assert columns(28672, 2, 256, device) == 512  # no shorter
    assert columns(576, 18, 256, device) == 512
    assert columns(300, 1, 256, device) == 300


@pytest.mark.interpret
@pytest.mark.parametrize("out_dtype", module.OUT_DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *module.OUT_DTYPES, torch.float64], ids=str)
def test_triton_bias_and_output(bias_dtype, out_dtype):
    x, w = exact_x((3, 64), 4, True), exact_w(5, 64, 4)
    x.codes.clamp_(-1, 1)[:, 16:] = 0  # |sum| <= 128
    x.scale.fill_(1.0)
    w.scale.fill_(0.5)
    bias = None if bias_dtype is None else torch.randint(-9, 10, (5,)).to(bias_dtype)
    assert_triton_is_bitwise(x, w, bias, out_dtype)


@pytest.mark.interpret
@pytest.mark.parametrize(("w_bits", "x_code"), [(4, 0), (8, 255)])
def test_triton_longest_sums(w_bits, x_code):
    K = module.LONGEST_X16 // 2 * 2  # whole bytes
    format = IntFormat(8, False)
    x = torch.full((1, K), x_code, dtype=torch.uint8)
    zero_point = torch.tensor([[255 - x_code]], dtype=torch.uint8)
    x = PackedTensor(x, torch.ones(1, 1), zero_point, format, Layout.BYTES, x.shape)
    w = exact_w(1, K, w_bits)
    w.codes.fill_(0x88 if w_bits == 4 else 0x80)  # -8 or -128
    assert_triton_is_bitwise(x, w)


@pytest.mark.interpret
def test_triton_overflow_and_no_rows():
    x, w = exact_x((2, 64), 8, True), exact_w(3, 64, 8)
    x.scale[0] = 1e30  # inf in fp16
    x.scale[1] = float("nan")  # a row with a non-finite element
    assert_triton_is_bitwise(x, w, out_dtype=torch.float16)
    assert int_gemm(exact_x((0, 64), 4, True), w, backend="triton").shape == (0, 3)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("x_bits", "w_bits", "group_size", "message"),
    [
        (2, 4, None, "reads codes packed in 4 or 8 bits, x_bits is 2"),
        (4, 3, None, "reads codes packed in 4 or 8 bits, w_bits is 3"),
        (4, 4, 16, r"takes groups of \(32, 64, 128\) or one a row, got 16"),
    ],
)
def test_triton_reasons(x_bits, w_bits, group_size, message):
    x = to_layout(exact_x((3, 64), x_bits, True), Layout.ROW_MAJOR)
    with pytest.raises(RuntimeError, match=f"triton: the Triton kernel {message}"):
        int_gemm(x, exact_w(5, 64, w_bits, group_size), backend="triton")


@pytest.mark.interpret
def test_triton_reads_packed_rows():
    w = to_layout(exact_w(5, 64, 4), Layout.FRAGMENT)
    with pytest.raises(RuntimeError, match="reads row_major weights, w is fragment: see to_layout"):
        int_gemm(exact_x((3, 64), 4, True), w, backend="triton")


@pytest.mark.interpret
def test_triton_sums_up_to_the_longest_group():
    K = module.LONGEST_X16 + 1
    x, w = exact_x((1, K), 4, True), exact_w(1, K, 4)
    with pytest.raises(RuntimeError, match=f"sums up to {K - 1} elements, got {K}"):
        int_gemm(x, w, backend="triton")
