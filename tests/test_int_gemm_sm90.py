"""int_gemm by wgmma, in the emulator or on a Hopper GPU: the bits of the reference, always."""

import itertools
import re
from typing import NamedTuple

import emulator
import pytest
import torch
from gemm_operands import assert_same, launch_plan, random_operands
from helpers import assert_bitwise
from sass import built, kernels_sass

from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import int_gemm, to_layout

pytestmark = pytest.mark.emulate(90)
INT4, INT8 = IntFormat(4), IntFormat(8)


class Shape(NamedTuple):
    M: int
    N: int
    K: int


def operands(
    shape: Shape, x_format: IntFormat, w_format: IntFormat, extreme: bool = False
) -> tuple[PackedTensor, PackedTensor]:
    x, w = random_operands(shape, x_format, w_format, extreme)
    return x, to_layout(w, Layout.FRAGMENT)


def multiply(
    shape: Shape,
    x_format: IntFormat = INT8,
    w_format: IntFormat = INT4,
    *,
    with_bias: bool = False,
    with_residual: bool = False,
    extreme: bool = False,
    dtype: torch.dtype = torch.bfloat16,
):
    x, w = operands(shape, x_format, w_format, extreme)
    bias = torch.randn(shape.N) if with_bias else None
    residual = torch.randn(shape.M, shape.N).to(dtype) if with_residual else None
    assert_same(x, w, bias, dtype, residual)


# Ends of the tiles: 16, 32, 64, 128 and 256 tokens, 128 or 256 channels, 128 columns.
@pytest.mark.parametrize("M", [1, 8, 16, 17, 33, 64, 65, 129, 257])
def test_tokens(M):
    multiply(Shape(M, 136, 272))


@pytest.mark.parametrize("N", [8, 64, 120, 128, 264, 520])
def test_channels(N):
    multiply(Shape(5, N, 144))
    multiply(Shape(130, N, 144), with_residual=True)


@pytest.mark.parametrize("K", [16, 64, 80, 128, 192, 208, 1040])
def test_columns(K):
    multiply(Shape(3, 72, K))
    multiply(Shape(70, 72, K), IntFormat(8, symmetric=False))


@pytest.mark.parametrize(
    "x_format", [INT4, INT8, IntFormat(4, False), IntFormat(8, False)], ids=str
)
@pytest.mark.parametrize(
    "w_format",
    [INT4, INT8, IntFormat(6), IntFormat(4, True, 64, True), IntFormat(4, True, 128, True)],
    ids=str,
)
@pytest.mark.parametrize("extreme", [False, True])
def test_formats(x_format, w_format, extreme):
    for M in (6, 140):
        multiply(Shape(M, 200, 384), x_format, w_format, extreme=extreme)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [3, 150])
def test_epilogue(M, dtype):
    for bias, residual in itertools.product((False, True), repeat=2):
        shape = Shape(M, 328, 160)
        multiply(shape, with_bias=bias, with_residual=residual, dtype=dtype)


def test_nan_inf_and_minus_zero():
    x, w = operands(Shape(4, 64, 64), INT8, INT4)
    x.scale[0], x.scale[1] = float("nan"), float("inf")
    x.codes[2] = 0
    w.scale[3] = -1.0  # -0 * ... + nothing stays -0
    got = int_gemm(x, w, None, torch.bfloat16, backend="cuda")
    expected = int_gemm(x, w, None, torch.bfloat16, backend="reference")
    assert_bitwise(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("num_sms", [1, 2, 4, 8, 132])
@pytest.mark.parametrize("shape", [Shape(2, 264, 2064), Shape(40, 128, 4096), Shape(300, 300, 144)])
def test_any_number_of_sms(shape, num_sms):
    """Persistent blocks, and clusters that split K, however many there are."""
    if cuda.LIBRARY.device_type == "cuda":
        pytest.skip("a GPU has the SMs it has")
    shape = shape._replace(N=shape.N // 8 * 8)
    emulator.stand_for(90, num_sms)
    multiply(shape, IntFormat(8, symmetric=False), with_residual=True)


@pytest.mark.gpu
@pytest.mark.sm(90)
@pytest.mark.parametrize("K", [400, 528])  # as many stages as the ring has slots, and one more
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_several_tiles_a_cluster(dtype, symmetric, K):
    """More pairs of tiles than 66 clusters, the last of them one tile and a part: what the emulator
    runs with few SMs, of which no GPU of this architecture has as few."""
    for bias, residual in itertools.product((False, True), repeat=2):
        multiply(
            Shape(4096, 6152, K),
            IntFormat(8, symmetric),
            with_bias=bias,
            with_residual=residual,
            dtype=dtype,
        )


@pytest.mark.parametrize(
    "shape, kind, expected",
    [
        (Shape(1, 8192, 8192), 0, "wgmma 1x16: 128 blocks in clusters of 2, K in 2 parts"),
        (Shape(16, 4096, 4096), 2, "wgmma 1x16: 128 blocks in clusters of 4, K in 4 parts"),
        (Shape(64, 4096, 14336), 0, "wgmma 1x64: 128 blocks in clusters of 4, K in 4 parts"),
        (Shape(2048, 4096, 4096), 0, "wgmma 2x128: 132 blocks in clusters of 2, K in 1 parts"),
        (Shape(2048, 4096, 4096), 3, "wgmma 1x256: 132 blocks in clusters of 2, K in 1 parts"),
    ],
)
def test_plan_on_132_sms(shape, kind, expected):
    assert launch_plan(shape, kind, 90, 132) == expected


def test_longest_rows():
    """Sums of 16 times a nibble reach the end of int32."""
    x, w = operands(Shape(1, 8, 65792), INT8, INT4)
    x.codes.fill_(-128)
    w = to_layout(w, Layout.BYTES)
    w.codes.fill_(-8)
    w = to_layout(w, Layout.FRAGMENT)
    assert_same(x, w, out_dtype=torch.bfloat16)


def test_no_tokens():
    multiply(Shape(0, 128, 128))


@pytest.mark.slow
def test_machine_code():
    """wgmma of bytes, bulk copies both ways, and nothing in local memory."""
    kernels = {
        name: code
        for name, code in kernels_sass(built()[0], "90a").items()
        if "int_gemm_wgmma_kernel" in name
    }
    assert len(kernels) == 2 * 16
    for name, code in kernels.items():
        tokens, is_asymmetric = re.search(r"WgmmaTile<.*?, \d+, (\d+), (\w+)>", name).groups()
        activations = "U8" if is_asymmetric == "true" else "S8"
        assert f"IGMMA.64x{tokens}x32.S8.{activations}" in code, name
        for wanted in ("UTMALDG.2D", "UTMASTG.2D", "UBLKCP"):
            assert wanted in code, (wanted, name)
        assert not re.search(r"\b(LDL|STL)\b", code), name
