"""int_gemm with two-level scales: integers to the end, so whole bits are known in fp64."""

import importlib
from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, assert_registered, poison

from lowbit.formats import GROUP_SCALE_MAX, GROUP_SIZES, IntFormat, Layout, PackedTensor
from lowbit.ops import dequantize, int_gemm, quantize, to_layout
from lowbit.rounding import RTN

module = importlib.import_module("lowbit.ops.int_gemm")  # lowbit.ops.int_gemm is the function

INT32_MAX = 2**31 - 1
U8 = torch.uint8


def two_level(bits: int = 4, group_size: int = 32) -> IntFormat:
    return IntFormat(bits, True, group_size, two_level=True)


def random_codes(shape: tuple[int, ...], format: IntFormat) -> torch.Tensor:
    return torch.randint(format.qmin, format.qmax + 1, shape).to(format.code_dtype)


def power_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-2, 2, shape)


def random_x(M: int, K: int, bits: int = 8, symmetric: bool = True) -> PackedTensor:
    """One code per byte; scales are powers of two."""
    format = IntFormat(bits, symmetric)
    zero_point = None if symmetric else random_codes((M, 1), format)
    codes = random_codes((M, K), format)
    return PackedTensor(codes, power_of_two(M, 1), zero_point, format, Layout.BYTES, codes.shape)


def random_w(N: int, K: int, bits: int = 4, group_size: int = 32) -> PackedTensor:
    """Packed, every group scale as often; channel scales are powers of two."""
    format = two_level(bits, group_size)
    scale = torch.randint(1, GROUP_SCALE_MAX + 1, (N, format.num_groups(K))).to(U8)
    codes = random_codes((N, K), format)
    t = PackedTensor(codes, scale, None, format, Layout.BYTES, codes.shape, power_of_two(N, 1))
    return to_layout(t, Layout.ROW_MAJOR)


def random_scales(t: PackedTensor) -> PackedTensor:
    """t with fp32 scales that are no powers of two."""
    name = "channel_scale" if t.format.two_level else "scale"
    return replace(t, **{name: torch.rand_like(getattr(t, name)).add_(0.01)})


def expected_y(x: PackedTensor, w: PackedTensor, bias=None, out_dtype=torch.float32):
    """The contract in fp64, which holds every sum; the operands' scales are powers of two."""
    x_codes = to_layout(x, Layout.BYTES).codes.double()
    x_codes = x_codes if x.zero_point is None else x_codes - x.zero_point.double()
    w_codes = to_layout(w, Layout.BYTES).codes.double()
    groups = [t.unflatten(-1, (w.scale.shape[1], -1)) for t in (x_codes, w_codes)]
    acc = torch.einsum("mgk,ngk->mng", *groups)
    acc = (acc * w.scale.double()).sum(-1)
    assert acc.abs().max() <= INT32_MAX
    y = acc.float() * w.channel_scale.T * x.scale  # acc may take more than 24 bits: rounded once
    return (y if bias is None else y + bias.float()).to(out_dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["int8 dot", "fp32 sums"])
def has_int8_dot(request, monkeypatch):
    """Both ways the reference multiplies; the first is exact on CPUs that have VNNI only."""
    if request.param and not module._has_int8_dot():
        pytest.skip("this CPU has no int8 dot product")
    monkeypatch.setattr(module, "_has_int8_dot", lambda: request.param)


@pytest.mark.parametrize("layout", [Layout.ROW_MAJOR, Layout.BYTES], ids=["packed", "bytes"])
@pytest.mark.parametrize("group_size", [8, 64, 384])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize("w_bits", [2, 3, 4])
def test_every_format_is_exact(w_bits, x_bits, symmetric, group_size, layout, has_int8_dot):
    x = to_layout(random_x(5, 384, x_bits, symmetric), layout)
    w, bias = random_w(7, 384, w_bits, group_size), torch.randint(-9, 10, (7,)).float()
    assert_bitwise(int_gemm(x, w, bias, torch.float32), expected_y(x, w, bias))


@pytest.mark.parametrize("out_dtype", module.OUT_DTYPES, ids=str)
def test_scales_multiply_in_the_order_of_the_contract(out_dtype):
    """(acc channel_scale) x_scale + bias, each rounded to fp32, narrowed once."""
    x, w, bias = random_scales(random_x(30, 256)), random_scales(random_w(50, 256)), torch.randn(50)
    assert_bitwise(int_gemm(x, w, bias, out_dtype), expected_y(x, w, bias, out_dtype))


def largest(w_bits: int, x_bits: int, symmetric: bool) -> int:
    """Of |x_code - x_zero| * w_scale * |w_code|."""
    return GROUP_SCALE_MAX * 2 ** (w_bits - 1) * (2 ** (x_bits - 1) if symmetric else 2**x_bits - 1)


@pytest.mark.parametrize(
    ("symmetric", "x_code", "zero_point", "w_code"),
    [(True, -128, None, -8), (True, 127, None, -8), (True, 127, None, 7)]
    + [(False, 255, 0, -8), (False, 255, 0, 7), (False, 0, 255, -8)],
)
def test_largest_codes_at_the_largest_K(symmetric, x_code, zero_point, w_code, has_int8_dot):
    K = INT32_MAX // largest(4, 8, symmetric) // 2 * 2
    assert K == (139810 if symmetric else 70178)
    format = IntFormat(8, symmetric)
    x = torch.full((1, K), x_code, dtype=format.code_dtype)
    zero_point = None if symmetric else torch.tensor([[zero_point]], dtype=U8)
    x = PackedTensor(x, torch.ones(1, 1), zero_point, format, Layout.BYTES, x.shape)
    w = torch.full((1, K), w_code, dtype=torch.int8)
    scale = torch.full((1, 2), GROUP_SCALE_MAX, dtype=U8)
    w_format = two_level(4, K // 2)
    w = PackedTensor(w, scale, None, w_format, Layout.BYTES, w.shape, torch.ones(1, 1))
    got = int_gemm(x, to_layout(w, Layout.ROW_MAJOR), out_dtype=torch.float32)
    acc = K * (x_code - (0 if symmetric else int(zero_point))) * GROUP_SCALE_MAX * w_code
    assert abs(acc) <= INT32_MAX
    assert_bitwise(got, torch.tensor([[acc]], dtype=torch.int32).float())


@pytest.mark.parametrize("layout", [Layout.FRAGMENT, Layout.FRAGMENT_INT4], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_kernel_layouts_and_a_residual(symmetric, layout):
    x, w = random_x(3, 192, 4, symmetric), random_w(70, 192, 4, 64)
    residual = torch.randint(-9, 10, (3, 70)).float()
    got = int_gemm(x, to_layout(w, layout), None, torch.float32, residual=residual)
    exact = expected_y(x, w).double() + residual.double()
    assert_bitwise(got.double(), exact)


def op_arguments(symmetric: bool = True, packed: bool = False) -> dict:
    """A valid call of the op: M 3, N 5, K 64, 4 x 4 bits, two groups."""
    x, w = random_x(3, 64, 4, symmetric), random_w(5, 64)
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
        "w_channel_scale": w.channel_scale,
        "w_layout": "row_major",
        "residual": torch.ones(3, 5).half(),
    }


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize("w_bits", [2, 4])
def test_int32_bound_is_refused_one_step_past_it(w_bits, x_bits, symmetric):
    longest = INT32_MAX // largest(w_bits, x_bits, symmetric)

    def run(K):
        meta = {"device": "meta"}
        changes = {
            "x_codes": torch.empty(3, K, dtype=torch.int8 if symmetric else U8, **meta),
            "x_scale": torch.empty(3, 1, **meta),
            "x_zero_point": None if symmetric else torch.empty(3, 1, dtype=U8, **meta),
            "w_codes": torch.empty(5, K * w_bits // 8, dtype=U8, **meta),
            "w_scale": torch.empty(5, 4, dtype=U8, **meta),
            "bias": None,
            "x_bits": x_bits,
            "w_bits": w_bits,
            "w_channel_scale": torch.empty(5, 1, **meta),
            "residual": None,
        }
        return module.INT_GEMM(*(op_arguments() | changes).values())

    whole = longest // 4 * 4  # whole bytes
    assert run(whole).shape == (3, 5)
    with pytest.raises(
        ValueError, match=f"overflow past {longest} elements a row, got {whole + 4}"
    ):
        run(whole + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_bits": 6}, r"w_bits must be in 2\.\.4, got 6"),
        ({"w_bits": 8}, r"w_bits must be in 2\.\.4, got 8"),
        ({"w_scale": torch.ones(5, 2)}, "w_scale must be uint8, as w_channel_scale is given"),
        ({"w_scale": torch.ones(5, 3, dtype=U8)}, r"w_scale must have shape \[5, G\]"),
        ({"w_channel_scale": None}, "w_scale must be fp32 or fp16, got torch.uint8"),
        ({"w_channel_scale": torch.ones(5)}, r"w_channel_scale must be fp32 \[5, 1\]"),
        ({"w_channel_scale": torch.ones(5, 2)}, r"w_channel_scale must be fp32 \[5, 1\]"),
        ({"w_channel_scale": torch.ones(4, 1)}, r"w_channel_scale must be fp32 \[5, 1\]"),
        ({"w_channel_scale": torch.ones(5, 1).half()}, r"w_channel_scale must be fp32 \[5, 1\]"),
    ],
)
def test_wrong_argument(change, message):
    with pytest.raises(ValueError, match=f"int_gemm: {message}"):
        module.INT_GEMM(*(op_arguments() | change).values())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bytes"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_registered(symmetric, packed):
    assert_registered(module.INT_GEMM, *op_arguments(symmetric, packed).values())


@pytest.mark.parametrize("out_dtype", module.OUT_DTYPES, ids=str)
@pytest.mark.parametrize("x_format", [IntFormat(4), IntFormat(8, False)], ids=["sym4", "asym8"])
def test_rounded_weights(x_format, out_dtype):
    x = quantize(torch.randn(40, 576), x_format)
    w, _ = RTN().round(torch.randn(48, 576), two_level(4, 64))
    bias = torch.randn(48)
    numbers = [dequantize(t, torch.float64) for t in (x, w)]
    in_fp64 = numbers[0] @ numbers[1].T + bias.double()
    a, b = (t.to(out_dtype) for t in numbers)
    in_torch = a @ b.T + bias.to(out_dtype)
    assert_no_worse_than_torch(int_gemm(x, w, bias, out_dtype), in_torch, in_fp64, floor=0.0)


# Triton's kernel: bits of the reference in every split, as no sum is rounded.


def assert_triton_is_bitwise(x, w, bias=None, out_dtype=torch.float32, residual=None):
    arguments = (x, w, bias, out_dtype)
    expected = int_gemm(*arguments, backend="reference", residual=residual)
    with poison():
        assert_bitwise(int_gemm(*arguments, backend="triton", residual=residual), expected)


@pytest.mark.interpret
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("layout", [Layout.ROW_MAJOR, Layout.BYTES], ids=["packed", "bytes"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("x_bits", [4, 8])
def test_triton_every_format(x_bits, symmetric, layout, group_size):
    x, w = to_layout(random_x(3, 256, x_bits, symmetric), layout), random_w(5, 256, 4, group_size)
    got = int_gemm(x, w, out_dtype=torch.float32, backend="triton")
    assert_bitwise(got, expected_y(x, w))
    assert_triton_is_bitwise(random_scales(x), random_scales(w), torch.randn(5), torch.float16)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("M", "N", "K", "group_size"),
    [
        (0, 3, 64, 32),
        (1, 1, 32, 32),
        (1, 33, 64, 64),
        (17, 65, 128, 128),
        (65, 63, 160, 32),
        (129, 1025, 32, 32),
    ],
)
def test_triton_every_shape(M, N, K, group_size):
    """One group alone has two levels too; every tile, and a row and column past it."""
    x, w = random_x(M, K, 8, False), random_w(N, K, 4, group_size)
    assert_triton_is_bitwise(random_scales(x), random_scales(w))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("M", "K", "group_size", "parts"),
    [(1, 1536, 128, 3), (3, 1056, 32, 3), (64, 1088, 64, 3), (2, 640, 128, 2), (65, 1088, 64, 1)],
)
@pytest.mark.parametrize(("x_bits", "symmetric"), [(4, False), (8, True)])
def test_triton_split_k(x_bits, symmetric, M, K, group_size, parts, monkeypatch):
    """Every split gives the bits of one program, parts that end in a shorter one included."""
    from lowbit.kernels import int_gemm as triton_int_gemm

    seen = []

    class Counting:
        def __getitem__(self, grid):
            seen.append(grid[2])
            return kernel[grid]

    kernel = triton_int_gemm.int_gemm_kernel
    monkeypatch.setattr(triton_int_gemm, "processors_of", lambda device: 4)
    monkeypatch.setattr(triton_int_gemm, "int_gemm_kernel", Counting())
    x = to_layout(random_x(M, K, x_bits, symmetric), Layout.ROW_MAJOR)
    x, w, bias = random_scales(x), random_scales(random_w(40, K, 4, group_size)), torch.randn(40)
    residual = torch.randn(M, 40).half()
    assert_triton_is_bitwise(x, w, bias, torch.float16, residual)
    assert seen == [parts]


@pytest.mark.interpret
@pytest.mark.parametrize("processors", [0, 4], ids=["whole", "in parts"])
@pytest.mark.parametrize("x_code", [0, 255])
def test_triton_large_sums(x_code, processors, monkeypatch):
    """They fit int32, but 16 times as much, as a nibble is expanded, would not."""
    from lowbit.kernels import int_gemm as triton_int_gemm

    monkeypatch.setattr(triton_int_gemm, "processors_of", lambda device: processors)
    K = 8192
    assert INT32_MAX / 16 < K * largest(4, 8, False) < INT32_MAX
    x = torch.full((1, K), x_code, dtype=U8)
    zero_point = torch.tensor([[255 - x_code]], dtype=U8)
    x = PackedTensor(x, torch.ones(1, 1), zero_point, IntFormat(8, False), Layout.BYTES, x.shape)
    w = random_w(1, K, 4, 128)
    w.codes.fill_(0x88)  # -8
    w.scale.fill_(GROUP_SCALE_MAX)
    assert_triton_is_bitwise(x, w)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("w_bits", "K", "group_size", "message"),
    [
        (3, 64, 32, "reads codes packed in 4 or 8 bits, w_bits is 3"),
        (4, 64, 16, r"takes groups of \(32, 64, 128\) or one a row, got 16"),
        (4, 96, 96, r"takes groups of \(32, 64, 128\) or one a row, got 96"),
    ],
)
def test_triton_reasons(w_bits, K, group_size, message):
    with pytest.raises(RuntimeError, match=f"triton: the Triton kernel {message}"):
        int_gemm(random_x(3, K), random_w(5, K, w_bits, group_size), backend="triton")
