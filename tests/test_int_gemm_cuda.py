"""int_gemm by mma.sync, in the emulator or on a GPU: the bits of the reference, always."""

import ctypes
import re
import subprocess
from dataclasses import replace
from typing import NamedTuple

import emulator
import pytest
import sass
import torch
from gemm_operands import assert_same, launch_plan, random_operands
from helpers import assert_bitwise

from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import int_gemm, to_layout
from lowbit.ops.dispatch import NoBackendError
from lowbit.ops.int_gemm import CUDA_INT4_SM, LONGEST_X16, OUT_DTYPES
from lowbit.ops.kernel_layouts import input_layout

on_sm80 = pytest.mark.emulate(80)
from_sm80 = pytest.mark.emulate(80, later=True)


class Codes(NamedTuple):
    """What a kernel multiplies: widths, and the layout of the weights."""

    w_bits: int
    x_bits: int
    layout: Layout = Layout.FRAGMENT


CODES = {
    "w4a8": Codes(4, 8),
    "w4a4, bytes": Codes(4, 4),
    "w8a8": Codes(8, 8),
    "w6a6": Codes(6, 6),
    "w4a4, int4": Codes(4, 4, Layout.FRAGMENT_INT4),
}
ALL_CODES = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
GRIDS = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
TOKENS = (1, 2, 7, 16, 17, 33, 64, 120, 130, 250)
TILES = {"64x16", "64x64", "128x128"}
FEW_SMS = 2  # so that large tiles pay with few channels


def operands(
    shape: tuple[int, int, int],
    codes: Codes,
    symmetric: bool = True,
    group_size: int | None = None,
    extreme: bool = False,
) -> tuple[PackedTensor, PackedTensor]:
    """x [M, K] and w [N, K], as the kernel reads them; with a group_size, of two levels.

    Skips the test where the architecture has no 4-bit matrix units for such weights.
    """
    if codes.layout is Layout.FRAGMENT_INT4 and cuda.sm() not in CUDA_INT4_SM:
        pytest.skip(f"sm_{cuda.sm()} has no 4-bit matrix units")
    x_format = IntFormat(codes.x_bits, symmetric)
    w_format = IntFormat(codes.w_bits, True, group_size, two_level=group_size is not None)
    x, w = random_operands(shape, x_format, w_format, extreme)
    return to_layout(x, input_layout(codes.layout)), to_layout(w, codes.layout)


def stand_for(num_sms: int):
    """Of the emulator; a GPU has the SMs it has."""
    if cuda.LIBRARY.device_type == "cpu":
        emulator.stand_for(80, num_sms)


def plan(shape: tuple[int, int, int], codes: Codes, num_sms: int) -> str:
    """What the launcher chooses, such as "64x16: 2 tiles x 3 splits of 4 stages"."""
    return launch_plan(shape, int(codes.layout is Layout.FRAGMENT_INT4), 80, num_sms)


@from_sm80
@ALL_CODES
@GRIDS
@pytest.mark.parametrize("M", TOKENS)
def test_tokens(M, symmetric, codes):
    """Every tile; N and K are multiples of none: 3 tiles of 64 channels and 8, 3 stages and 32."""
    stand_for(FEW_SMS)
    assert_same(*operands((M, 200, 416), codes, symmetric))


@from_sm80
def test_tokens_reach_every_tile():
    for codes in CODES.values():
        plans = [plan((M, 200, 416), codes, FEW_SMS) for M in TOKENS]
        assert {chosen.split(":")[0] for chosen in plans} == TILES


@from_sm80
@ALL_CODES
@pytest.mark.parametrize(("N", "K"), [(8, 32), (64, 64), (72, 96), (128, 128), (200, 608)])
def test_channels_and_columns(N, K, codes):
    for M in (3, 70):
        assert_same(*operands((M, N, K), codes))
        assert_same(*operands((M, N, K), codes, symmetric=False))


@from_sm80
def test_rows_of_16_bytes():
    for K in (16, 48, 80, 1104):
        assert_same(*operands((5, 24, K), CODES["w4a8"], symmetric=False))
        assert_same(*operands((5, 24, K), CODES["w8a8"]))


@from_sm80
@GRIDS
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("M", [1, 33, 120])
def test_two_levels(M, group_size, symmetric):
    """Every tile, an odd number of groups; 200 channels, whose scales end inside a tile."""
    stand_for(FEW_SMS)
    for codes in (CODES["w4a8"], CODES["w4a4, bytes"]):
        assert_same(*operands((M, 200, 5 * group_size), codes, symmetric, group_size))


SPLITS = {  # tile -> how many SMs make it split, and M, N, K
    "64x16": (108, (3, 72, 2080)),
    "64x64": (27, (40, 72, 2080)),
    "128x128": (3, (120, 128, 8224)),
}


@from_sm80
@ALL_CODES
@pytest.mark.parametrize("tile", SPLITS)
def test_split_k(tile, codes):
    """The last block of a tile adds what the others left."""
    num_sms, shape = SPLITS[tile]
    stand_for(num_sms)
    chosen, (M, N, _) = plan(shape, codes, num_sms), shape
    assert chosen.startswith(f"{tile}:") and "x 1 splits" not in chosen
    x, w = operands(shape, codes, symmetric=False)
    assert_same(x, w, torch.randn(N), torch.float16, torch.randn(M, N).half())
    if codes.w_bits == 4 and codes.layout is Layout.FRAGMENT:
        assert_same(*operands(shape, codes, False, group_size=32))


@from_sm80
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *OUT_DTYPES], ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
def test_epilogue(has_residual, bias_dtype, out_dtype):
    for M in (5, 150):
        x, w = operands((M, 72, 64), CODES["w4a8"])
        bias = None if bias_dtype is None else torch.randn(72).mul(99).to(bias_dtype)
        residual = torch.randn(M, 72).mul(99).to(out_dtype) if has_residual else None
        assert_same(x, w, bias, out_dtype, residual)


@from_sm80
def test_edges_of_floats():
    x, w = operands((6, 72, 64), CODES["w8a8"])
    x.scale[0], x.scale[1], x.scale[2] = 3e38, 65504.0, 2.0**-140
    w.scale[3] = -1.0
    x.codes[3] = 0  # its y are zeros, of both signs, and stay what they are
    for out_dtype in OUT_DTYPES:
        assert_same(x, w, None, out_dtype)
    x.scale[4] = float("nan")
    got = int_gemm(x, w, None, torch.float16, backend="cuda")
    assert got[4].isnan().all() and not got[5].isnan().any()


@from_sm80
@ALL_CODES
@GRIDS
def test_ends_of_the_ranges(symmetric, codes):
    stand_for(FEW_SMS)
    for M in (4, 120):
        assert_same(*operands((M, 256, 128), codes, symmetric, extreme=True))
        if codes.w_bits == 4 and codes.layout is Layout.FRAGMENT:
            assert_same(*operands((M, 256, 128), codes, symmetric, 64, extreme=True))


LONGEST = {  # in whole rows of 16 bytes, or groups
    "w4a8": (CODES["w4a8"], True, LONGEST_X16 // 16 * 16, None),
    "w4a8, asym": (CODES["w4a8"], False, LONGEST_X16 // 16 * 16, None),
    "w8a8": (CODES["w8a8"], True, 131056, None),
    "w8a8, asym": (CODES["w8a8"], False, 65792, None),
    "two levels": (CODES["w4a8"], True, 139776, 128),
    "two levels, asym": (CODES["w4a8"], False, 70144, 64),
    "int4": (CODES["w4a4, int4"], False, 1 << 17, None),
}


@from_sm80
@pytest.mark.parametrize(("codes", "symmetric", "K", "group_size"), LONGEST.values(), ids=LONGEST)
def test_longest_rows(codes, symmetric, K, group_size):
    """Sums that reach the ends of int32, or of it by 16."""
    x, w = operands((2, 8, K), codes, symmetric, group_size)
    x_grid, w_grid = x.format, w.format
    x_codes = torch.full((2, K), x_grid.qmin if symmetric else x_grid.qmax).to(x_grid.code_dtype)
    zero_point = None if symmetric else torch.tensor([[0], [x_grid.qmax]], dtype=torch.uint8)
    if not symmetric:
        x_codes[1] = 0
    w_codes = torch.full((8, K), w_grid.qmin, dtype=torch.int8)
    scale = torch.full_like(w.scale, 15) if group_size else torch.ones_like(w.scale)
    one_each = {"scale": scale, "layout": Layout.BYTES, "codes": w_codes}
    w = to_layout(replace(w, **one_each), codes.layout)
    x = replace(x, codes=x_codes, zero_point=zero_point, layout=Layout.BYTES)
    assert_same(to_layout(x, input_layout(codes.layout)), w)


@from_sm80
def test_many_tiles():
    """More tiles of tokens than share weights, the last few fewer; neighbours in N between."""
    assert_same(*operands((1250, 264, 32), CODES["w4a8"], symmetric=False))
    x, w = operands((6, 64, 64), CODES["w4a8"])
    x = replace(x, codes=x.codes.view(2, 3, 64), scale=x.scale.view(2, 3, 1), shape=(2, 3, 64))
    assert_same(x, w)


@from_sm80
def test_no_tokens():
    x, w = operands((0, 64, 64), CODES["w4a8"])
    assert int_gemm(x, w, backend="cuda").shape == (0, 64)


@pytest.mark.emulate(89)
@GRIDS
def test_sm89_has_4_bit_units(symmetric):
    assert_same(*operands((20, 64, 128), CODES["w4a4, int4"], symmetric))


@pytest.mark.emulate(100)
@pytest.mark.parametrize("codes", ["w4a8", "w4a4, bytes", "w8a8"])
def test_sm100_multiplies_bytes(codes):
    assert_same(*operands((20, 64, 128), CODES[codes]))


@pytest.mark.emulate(100)
def test_sm100_has_no_4_bit_units():
    with pytest.raises(NoBackendError, match="sm_100 has no 4-bit matrix units"):
        x, w = random_operands((20, 64, 128), IntFormat(4), IntFormat(4))
        w = to_layout(w, Layout.FRAGMENT_INT4)
        int_gemm(to_layout(x, input_layout(w.layout)), w, backend="cuda")


def row_major(x, w):
    return x, to_layout(w, Layout.ROW_MAJOR)


def packed_x(x, w):
    return to_layout(x, Layout.ROW_MAJOR), w


def unaligned_x(x, w):
    codes = torch.empty(x.codes.numel() + 1, dtype=x.codes.dtype)[1:]
    return replace(x, codes=codes.view(x.codes.shape).copy_(x.codes)), w


def half_scale(x, w):
    return x, replace(w, scale=w.scale.half(), format=IntFormat(4, True, 64))


def strided_scale(x, w):
    return replace(x, scale=x.scale.repeat(1, 2)[:, :1]), w


def no_change(x, w):
    return x, w


@on_sm80
@pytest.mark.parametrize(
    ("shape", "codes", "change", "message"),
    [
        ((3, 64, 64), "w4a8", row_major, "w is row_major"),
        ((3, 64, 64), "w4a4, bytes", packed_x, "x of 8 bits a code, these are 4"),
        ((3, 60, 64), "w4a8", no_change, "8 columns of y, got 64 and 60"),
        ((3, 64, 72), "w8a8", no_change, "multiples of 16 bytes of x"),
        ((3, 64, 48), "w4a4, int4", no_change, "multiples of 16 bytes of x"),
        ((1, 8, LONGEST_X16 // 16 * 16 + 16), "w4a8", no_change, "up to 65793 products"),
        ((3, 64, 64), "w4a8", half_scale, "one fp32 scale a channel, got 1 of torch.float16"),
        ((3, 64, 64), "w4a8", unaligned_x, "multiples of 16 bytes"),
        ((3, 64, 64), "w4a8", strided_scale, "must be contiguous"),
    ],
)
def test_why_not(shape, codes, change, message):
    x, w = change(*operands(shape, CODES[codes]))
    with pytest.raises(NoBackendError, match=message):
        int_gemm(x, w, backend="cuda")


@on_sm80
def test_why_not_these_scales_and_biases():
    x, w = operands((3, 64, 96), CODES["w4a8"], group_size=32)
    bytes_x, int4 = operands((3, 64, 96), CODES["w4a4, int4"], group_size=32)
    with pytest.raises(NoBackendError, match="two-level scales with layout fragment, w has"):
        int_gemm(bytes_x, int4, backend="cuda")
    odd = replace(w, scale=w.scale[:, :2].contiguous(), format=IntFormat(4, True, 48, True))
    with pytest.raises(NoBackendError, match="groups of .*, got 48"):
        int_gemm(x, odd, backend="cuda")
    with pytest.raises(NoBackendError, match="bias of fp32, fp16 or bf16, got torch.float64"):
        int_gemm(x, w, torch.zeros(64, dtype=torch.float64), backend="cuda")


NIBBLES = """
#include "common/nibbles.cuh"
extern "C" void expand(int64_t n, const uint32_t* words, uint32_t scale0, uint32_t scale1,
                       uint32_t* x16, uint32_t* scaled) {
  for (int64_t i = 0; i < n; ++i) {
    lowbit::expand_x16(words[i], x16[2 * i], x16[2 * i + 1]);
    lowbit::expand_two_level(words[i], scale0, scale1, scaled[2 * i], scaled[2 * i + 1]);
  }
}
"""


@pytest.fixture(scope="module")
def nibbles(tmp_path_factory):
    """common/nibbles.cuh as the host compiles it."""
    if emulator.why_not():
        pytest.skip(emulator.why_not())
    folder = tmp_path_factory.mktemp("nibbles")
    (folder / "nibbles.cpp").write_text(NIBBLES)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DLOWBIT_EMULATE"]
    command += [f"-I{emulator.ROOT / 'csrc'}", f"-I{emulator.cuda_include()}"]
    subprocess.run([*command, "nibbles.cpp", "-o", "nibbles.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "nibbles.so"))


@pytest.mark.parametrize("scale", range(1, 16))
def test_every_pair_of_bytes_expands(scale, nibbles):
    """Carries could only pass between neighbours: all 2^16 pairs, in each place of a word."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    words = pairs.repeat(1, 2).contiguous()  # [2^16, 4] bytes: a b a b, so b a in the middle
    x16, scaled = torch.empty(2, len(words), 2, 4, dtype=torch.int8)
    other = 16 - scale
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (words, x16, scaled)]
    nibbles.expand(ctypes.c_int64(len(words)), pointers[0], scale, other, *pointers[1:])
    as_int = words.view(torch.int8).to(torch.int32)
    high, low = as_int >> 4, (as_int << 28) >> 28
    nibble_pairs = torch.stack([high, low], 1)
    assert_bitwise(x16, (16 * nibble_pairs).to(torch.int8))
    scales = torch.tensor([scale, other]).view(1, 2, 1)
    assert_bitwise(scaled, (nibble_pairs * scales).to(torch.int8))


# (weights are fragment_int4, x is asymmetric) -> the matrix instruction
PRODUCTS = {
    (False, False): "IMMA.16832.S8.S8",
    (False, True): "IMMA.16832.S8.U8",
    (True, False): "IMMA.16864.S4.S4",
    (True, True): "IMMA.16864.S4.U4",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_matrix_instructions(architecture):
    """Native ones: of 4 bits up to sm_89, and no other architecture emulates them."""
    has_int4 = int(architecture.rstrip("a")) in CUDA_INT4_SM
    operands_of = re.compile(r"int_gemm_kernel<.*Operands<\(.*?\)(\d), (\w+), ")
    seen = set()
    for name, code in sass.kernels_sass(sass.built()[0], architecture).items():
        if found := operands_of.search(name):
            kind = (found[1] == "2", found[2] in ("true", "1"))
            expected = {PRODUCTS[kind]} if has_int4 or not kind[0] else set()
            assert set(re.findall(r"IMMA[.\w]*", code)) == expected, name
            seen.add(kind)
    assert seen == PRODUCTS.keys()
