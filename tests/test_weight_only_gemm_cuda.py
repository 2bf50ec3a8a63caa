"""weight_only_gemm by mma.sync, in the emulator or on a GPU.

On exact inputs, small integers times powers of two, the bits of the product in fp64; on random ones
no worse than torch. Twice the same bits, whichever block of a split is the last.
"""

import ctypes
import re
from dataclasses import replace

import emulator
import pytest
import sass
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, poison

from lowbit import cuda
from lowbit.formats import FRAGMENT_BITS, PACKED_BITS, IntFormat, Layout, PackedTensor
from lowbit.ops import dequantize, quantize, to_layout, weight_only_gemm
from lowbit.ops.dispatch import NoBackendError
from lowbit.ops.int_gemm import OUT_DTYPES
from lowbit.ops.weight_only_gemm import CUDA_DTYPES

on_sm80 = pytest.mark.emulate(80)
from_sm80 = pytest.mark.emulate(80, later=True)
DTYPES = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
BITS = pytest.mark.parametrize("bits", PACKED_BITS)
STORED = [(bits, layout) for layout, widths in FRAGMENT_BITS.items() for bits in widths]
GRIDS = [(IntFormat(bits), layout) for bits, layout in STORED]
GRIDS += [(IntFormat(bits, False), Layout.FRAGMENT_FLOAT) for bits in PACKED_BITS]
RUNS = {Layout.FRAGMENT_FLOAT: 2, Layout.FRAGMENT: 4, Layout.FRAGMENT_INT4: 8}  # of the planner
FLOAT = Layout.FRAGMENT_FLOAT


def each(names: str, of: list[tuple]):
    ids = ["-".join(str(part).removeprefix("Layout.") for part in case) for case in of]
    return pytest.mark.parametrize(names, of, ids=ids)


EACH_GRID, EACH_STORED = each("format, layout", GRIDS), each("bits, layout", STORED)
IN_GROUPS = pytest.mark.parametrize(
    "format", [g for g, layout in GRIDS if layout is FLOAT], ids=str
)
TOKENS = (1, 2, 8, 9, 16, 33, 120, 130)
TILES = {"64x8", "64x16", "64x64", "128x128"}


def random_codes(shape: tuple[int, ...], format: IntFormat, extreme: bool) -> torch.Tensor:
    if extreme:
        ends = torch.tensor([format.qmin, format.qmax], dtype=format.code_dtype)
        return ends[torch.randint(0, 2, shape)]
    return torch.randint(format.qmin, format.qmax + 1, shape).to(format.code_dtype)


def weight(N: int, K: int, format: IntFormat, extreme: bool = False) -> PackedTensor:
    """One code a byte; scales are powers of two."""
    groups = (N, format.num_groups(K))
    scale = (2.0 ** torch.randint(-2, 2, groups)).to(format.weight_scale_dtype)
    zero_point = None if format.symmetric else random_codes(groups, format, extreme)
    codes = random_codes((N, K), format, extreme)
    return PackedTensor(codes, scale, zero_point, format, Layout.BYTES, torch.Size((N, K)))


def in_fp64(x: torch.Tensor, w: PackedTensor, bias=None) -> torch.Tensor:
    """Of weights rebuilt here from codes, one byte each."""
    groups = w.codes.double().unflatten(-1, (w.scale.shape[1], -1))
    if w.zero_point is not None:
        groups = groups - w.zero_point.double().unsqueeze(-1)
    y = x.double() @ (groups * w.scale.double().unsqueeze(-1)).flatten(-2).T
    return y if bias is None else y + bias.double()


def on_cuda(
    x: torch.Tensor, w: PackedTensor, bias=None, layout=FLOAT, residual=None
) -> torch.Tensor:
    with poison():
        return weight_only_gemm(x, to_layout(w, layout), bias, "cuda", residual)


def assert_exact(
    M: int, N: int, K: int, format: IntFormat, dtype, bias=None, extreme=False, layout=FLOAT
):
    torch.manual_seed(M + N + K)
    x = torch.randint(-4, 5, (M, K)).to(dtype)
    if dtype == torch.float16 and format.bits == 8:
        x[:, 64:] = 0  # sums stay below fp16's largest number
    w = weight(N, K, format, extreme)
    expected = in_fp64(x, w, bias)
    assert_bitwise(expected.float().double(), expected)
    assert_bitwise(on_cuda(x, w, bias, layout), expected.float().to(dtype))


def stand_for(num_sms: int) -> int:
    """Of the emulator; a GPU has the SMs it has. How many there are."""
    if cuda.LIBRARY.device_type == "cpu":
        emulator.stand_for(80, num_sms)
        return num_sms
    return torch.cuda.get_device_properties(0).multi_processor_count


def plan(M: int, N: int, K: int, bits: int, num_sms: int, layout=FLOAT) -> str:
    """What the launcher chooses, such as "64x8: 2 tiles x 3 splits of 4 stages"."""
    function = ctypes.CDLL(str(cuda.LIBRARY.path)).lowbit_plan
    function.restype = ctypes.c_char_p
    numbers = (ctypes.c_int64 * 5)(M, N, K, bits, RUNS[layout])
    return function(b"weight_only_gemm", numbers, 5, 80, num_sms).decode()


def tiles_of(bits: int, layout: Layout) -> set[str]:
    """Of 2 and 3 bits and of int_gemm's layouts there is none of 128 x 128."""
    return TILES - {"128x128"} if bits < 4 or layout is not FLOAT else TILES


@from_sm80
@DTYPES
@EACH_GRID
@pytest.mark.parametrize("M", TOKENS)
def test_tokens(M, format, layout, dtype):
    """Every tile; N and K are multiples of none: 3 tiles of 64 channels and 8, 3 stages and 8."""
    stand_for(1)
    assert_exact(M, 200, 392, format, dtype, layout=layout)


@from_sm80
def test_tokens_reach_every_tile():
    for bits, layout in STORED:
        plans = [plan(M, 200, 392, bits, 1, layout) for M in TOKENS]
        assert {chosen.split(":")[0] for chosen in plans} == tiles_of(bits, layout)


@from_sm80
@pytest.mark.parametrize("bits, layout", [(6, FLOAT), (3, Layout.FRAGMENT)])
def test_plan_of_bits_that_are_not_stored(bits, layout):
    assert "stored bits of the weights: 2, 3, 4 or 8" in plan(1, 64, 64, bits, 1, layout)


@from_sm80
@DTYPES
@IN_GROUPS
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("M", [1, 12, 40, 120])
def test_groups(M, group_size, format, dtype):
    """Every tile; an odd number of groups, which are parts of a stage, one, and two."""
    stand_for(1)
    grouped = replace(format, group_size=group_size)
    assert_exact(M, 200, 5 * group_size, grouped, dtype)


@from_sm80
@EACH_STORED
@pytest.mark.parametrize(("N", "K"), [(8, 8), (64, 64), (72, 96), (128, 136), (24, 1104)])
def test_channels_and_columns(N, K, bits, layout):
    for M, symmetric in ((3, True), (12, layout is not FLOAT), (70, layout is not FLOAT)):
        for dtype in CUDA_DTYPES:
            assert_exact(M, N, K, IntFormat(bits, symmetric), dtype, layout=layout)


@from_sm80
@DTYPES
@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_in_bytes(bits, dtype):
    for symmetric in (True, False):
        assert_exact(5, 72, 160, IntFormat(bits, symmetric, 32), dtype)


@from_sm80
@DTYPES
@EACH_GRID
def test_extreme_codes(format, layout, dtype):
    format = replace(format, group_size=64 if layout is FLOAT else None)
    for M in (2, 20):
        assert_exact(M, 64, 256, format, dtype, extreme=True, layout=layout)


@from_sm80
@BITS
@DTYPES
def test_every_code_with_every_zero_point(dtype, bits):
    """Column k of x picks code k - 1 of a channel whose zero point is its number."""
    count = 1 << bits
    N, K = max(count, 8), max(count, 8) + 8
    codes = torch.cat([torch.zeros(8), torch.arange(K - 8) % count])
    codes = codes.to(torch.uint8).expand(N, K)
    zeros = (torch.arange(N) % count).to(torch.uint8).view(N, 1)
    format, size = IntFormat(bits, False), torch.Size((N, K))
    w = PackedTensor(codes, torch.ones(N, 1), zeros, format, Layout.BYTES, size)
    x = torch.eye(K).to(dtype)
    assert_bitwise(on_cuda(x, w), in_fp64(x, w).to(dtype))


@from_sm80
@pytest.mark.parametrize(("bits", "M"), [(2, 8), (2, 64), (3, 8), (3, 64), (4, 64)])
@DTYPES
def test_every_code_in_every_place(dtype, bits, M):
    """Of a tile, so of every word; with every zero point, and symmetric. M: a tile of few, of many.

    Tiles for each zero point: random codes r, to which s = 0 .. 2^b - 1 is added, modulo 2^b: so
    neighbours, which another order would take for each other, differ. x picks columns.
    """
    count = 1 << bits
    torch.manual_seed(bits)
    tiles = torch.randint(count, (64, 64)) + torch.arange(count).view(count, 1, 1)
    codes = tiles.remainder(count).flatten(0, 1)
    zeros = torch.arange(count).repeat_interleave(len(codes)).view(-1, 1).to(torch.uint8)
    asymmetric = codes.repeat(count, 1).to(torch.uint8)
    x = torch.eye(64).to(dtype)
    for w_codes, w_zeros in ((asymmetric, zeros), ((codes - count // 2).to(torch.int8), None)):
        format, scale = IntFormat(bits, w_zeros is None), torch.ones(len(w_codes), 1)
        w = PackedTensor(w_codes, scale, w_zeros, format, Layout.BYTES, w_codes.shape)
        fragments = to_layout(w, Layout.FRAGMENT_FLOAT)
        got = [weight_only_gemm(rows, fragments, backend="cuda") for rows in x.split(M)]
        assert_bitwise(torch.cat(got), in_fp64(x, w).to(dtype))


@from_sm80
@each("bits, layout", [stored for stored in STORED if stored[1] is not FLOAT])
@pytest.mark.parametrize("M", [8, 64])
@DTYPES
def test_every_code_in_every_place_for_int_gemm(dtype, M, bits, layout):
    """As above: 16 shifts of random codes of 4 bits, and of 8 bits those of both nibbles."""
    torch.manual_seed(bits)
    codes = torch.randint(1 << bits, (64, 64)) + torch.arange(16).view(16, 1, 1) * (1 << bits - 4)
    if bits == 8:
        codes = torch.cat((codes, codes + torch.arange(16).view(16, 1, 1)))
    codes = codes.remainder(1 << bits).sub(1 << bits - 1).flatten(0, 1).to(torch.int8)
    scale = torch.ones(len(codes), 1)
    w = PackedTensor(codes, scale, None, IntFormat(bits), Layout.BYTES, codes.shape)
    x, fragments = torch.eye(64).to(dtype), to_layout(w, layout)
    got = [weight_only_gemm(rows, fragments, backend="cuda") for rows in x.split(M)]
    assert_bitwise(torch.cat(got), in_fp64(x, w).to(dtype))


SPLITS = {  # tile -> M, N, and SMs of which it takes several with few tiles
    "64x8": (3, 72, 108),
    "64x16": (12, 200, 8),
    "64x64": (60, 264, 12),
    "128x128": (120, 128, 3),
}


@from_sm80
@DTYPES
@EACH_STORED
@pytest.mark.parametrize(("tile", "shape"), SPLITS.items(), ids=SPLITS)
def test_split_k(tile, shape, bits, layout, dtype):
    """The last block of a tile adds what the others left."""
    M, N, num_sms = shape
    stand_for(num_sms)
    chosen = plan(M, N, 2080, bits, num_sms, layout)
    if tile not in tiles_of(bits, layout):
        assert chosen.startswith("64x64:")
        return
    assert chosen.startswith(f"{tile}:") and "x 1 splits" not in chosen
    for format in (IntFormat(bits), *([IntFormat(bits, False, 32)] if layout is FLOAT else [])):
        bias = torch.randint(-9, 10, (N,)).half()
        assert_exact(M, N, 2080, format, dtype, bias, layout=layout)


@from_sm80
def test_splits_are_added_in_order():
    """fp32 sums that depend on it: 2^24 + 1 - 2^24 is 0 from the left, and 1 in other orders."""
    chosen = plan(1, 64, 1536, 4, stand_for(108))
    splits, stages = map(int, re.search(r"(\d+) splits of (\d+) stages", chosen).groups())
    assert splits >= 3
    columns = 256 * stages
    x = torch.zeros(1, 1536, dtype=torch.bfloat16)
    x[0, 0], x[0, columns], x[0, 2 * columns] = 2.0**24, 1, -(2.0**24)
    w = weight(64, 1536, IntFormat(4))
    w = replace(w, codes=torch.ones_like(w.codes), scale=torch.ones_like(w.scale))
    assert_bitwise(on_cuda(x, w), torch.zeros(1, 64, dtype=torch.bfloat16))
    x[0, 1536 - 1] = 1  # of the last split, or of the third
    assert_bitwise(on_cuda(x, w)[0, 0].float(), torch.tensor(1.0 if splits > 3 else 0.0))


@from_sm80
@DTYPES
@pytest.mark.parametrize("bias_dtype", [None, *OUT_DTYPES], ids=str)
def test_bias_is_added_before_y_is_narrowed(bias_dtype, dtype):
    for M in (5, 150):
        x, w = torch.randint(-8, 9, (M, 64)).to(dtype), weight(72, 64, IntFormat(4, False, 32))
        x[:, 0] += 256  # sums that fp16 and bf16 would round
        bias = None if bias_dtype is None else torch.randint(-9, 10, (72,)).to(bias_dtype)
        assert_bitwise(on_cuda(x, w, bias), in_fp64(x, w, bias).float().to(dtype))


@from_sm80
@DTYPES
@pytest.mark.parametrize("layout", FRAGMENT_BITS)
def test_residual_is_added_before_y_is_narrowed(layout, dtype):
    """Of every tile, and of rows and channels past the last."""
    stand_for(108)
    for M in (5, 12, 45, 150):
        x, w = torch.randint(-8, 9, (M, 136)).to(dtype), weight(72, 136, IntFormat(4))
        x[:, 0] += 256
        bias = torch.randint(-9, 10, (72,)).float()
        residual = (torch.randint(-9, 10, (M, 72)) / 16).to(dtype)
        sums = in_fp64(x, w, bias) + residual.double()
        assert_bitwise(on_cuda(x, w, bias, layout, residual), sums.float().to(dtype))
        assert_bitwise(on_cuda(x, w, None, layout, residual), (sums - bias).float().to(dtype))


def random_weight(N: int, K: int, format: IntFormat) -> PackedTensor:
    dtype = format.weight_scale_dtype
    return quantize(torch.randn(N, K), format, scale_dtype=dtype, backend="reference")


RANDOM = {
    "w2 asym g32": (IntFormat(2, False, 32), FLOAT),
    "w3 g128": (IntFormat(3, True, 128), FLOAT),
    "w4": (IntFormat(4), FLOAT),
    "w4 asym g128": (IntFormat(4, False, 128), FLOAT),
    "w8": (IntFormat(8), FLOAT),
    "w8 asym": (IntFormat(8, False), FLOAT),
    "w8 asym g32": (IntFormat(8, False, 32), FLOAT),
    "w4 fragment": (IntFormat(4), Layout.FRAGMENT),
    "w8 fragment": (IntFormat(8), Layout.FRAGMENT),
    "w4 fragment_int4": (IntFormat(4), Layout.FRAGMENT_INT4),
}


@from_sm80
@DTYPES
@pytest.mark.parametrize("format, layout", RANDOM.values(), ids=RANDOM)
def test_random_operands(format, layout, dtype):
    torch.manual_seed(0)
    w = random_weight(72, 768, format)
    exact_w = dequantize(w, torch.float64, backend="reference")
    for M in (1, 13, 40):
        stand_for(108 if M == 1 else 2)
        x, bias = torch.randn(M, 768).to(dtype), torch.randn(72)
        exact = x.double() @ exact_w.T + bias.double()
        in_torch = (x.float() @ exact_w.float().T + bias).to(dtype)  # weights are not narrowed
        assert_no_worse_than_torch(on_cuda(x, w, bias, layout), in_torch, exact, floor=0.0)


@from_sm80
@DTYPES
def test_the_same_bits_twice(dtype):
    torch.manual_seed(0)
    for M, N, num_sms in SPLITS.values():
        stand_for(num_sms)
        w = random_weight(N, 2080, IntFormat(4, False, 32))
        assert "x 1 splits" not in plan(M, N, 2080, 4, num_sms)
        x = torch.randn(M, 2080).to(dtype)
        assert_bitwise(on_cuda(x, w), on_cuda(x, w))


@from_sm80
def test_weights_are_not_narrowed_to_the_dtype_of_x():
    # 1 + 2^-10 is no bf16 number: 512 of it minus 512 is 0.5, and 0 if the weight was narrowed.
    w = weight(8, 1024, IntFormat(8, True, 128))
    scale = torch.ones_like(w.scale)
    scale[:, :4] = 1 + 2.0**-10
    w = replace(w, codes=torch.ones_like(w.codes), scale=scale)
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    x[:, 512:] = -1
    assert_bitwise(on_cuda(x, w), torch.full((1, 8), 0.5, dtype=torch.bfloat16))


@from_sm80
@DTYPES
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_extreme_row_leaves_the_others_alone(value, dtype):
    for M in (3, 16, 70):
        x, w = torch.randint(-8, 9, (M, 64)).to(dtype), weight(72, 64, IntFormat(4))
        expected = in_fp64(x, w).to(dtype)
        x[1, 0] = value
        got = on_cuda(x, w)
        assert_bitwise(got[0], expected[0])
        assert_bitwise(got[2:], expected[2:])
        assert not got[1][w.codes[:, 0] != 0].isfinite().any()


@from_sm80
def test_one_extreme_channel_leaves_the_others_alone():
    w = weight(72, 64, IntFormat(4, True, 32))
    x = torch.randint(1, 9, (5, 64)).half()
    expected = in_fp64(x, w).half()
    w.scale[3, 1], w.scale[70, 0] = float("inf"), float("nan")
    got = on_cuda(x, w)
    others = [n for n in range(72) if n not in (3, 70)]
    assert_bitwise(got[:, others], expected[:, others])
    assert not got[:, [3, 70]].isfinite().any()


@from_sm80
def test_no_tokens_and_no_channels():
    w = weight(64, 64, IntFormat(4))
    assert on_cuda(torch.empty(0, 64).half(), w).shape == (0, 64)
    assert on_cuda(torch.empty(3, 64).half(), weight(0, 64, IntFormat(4))).shape == (3, 0)


@pytest.mark.emulate(90)
def test_fp32_scales_of_groups_and_other_architectures():
    w = weight(72, 192, IntFormat(4, False, 64))
    w, x = replace(w, scale=w.scale.float()), torch.randint(-8, 9, (3, 192)).half()
    assert_bitwise(on_cuda(x, w), in_fp64(x, w).half())


def fp32_x(x, w):
    return x.float(), w


def row_major(x, w):
    return x, to_layout(w, Layout.ROW_MAJOR)


def unaligned_x(x, w):
    codes = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return codes.view(x.shape).copy_(x), w


def strided_scale(x, w):
    return x, replace(w, scale=w.scale.repeat(1, 2)[:, :1])


def as_int_gemm_has_it(x, w):
    return x, to_layout(w, Layout.FRAGMENT)


def no_change(x, w):
    return x, w


@on_sm80
@pytest.mark.parametrize(
    ("shape", "format", "change", "message"),
    [
        ((64, 64), IntFormat(4), fp32_x, "x of fp16 or bf16, got torch.float32"),
        ((64, 64), IntFormat(4), row_major, "reads weights in a kernel layout, w is row_major"),
        ((64, 64), IntFormat(3), row_major, "reads weights in a kernel layout, w is row_major"),
        ((60, 64), IntFormat(4), no_change, "multiples of 8 elements, got 64 and 60"),
        ((64, 68), IntFormat(8), no_change, "multiples of 8 elements, got 68 and 64"),
        ((64, 64), IntFormat(4, True, 16), no_change, r"groups of \(32, 64, 128\) .*, got 16"),
        ((64, 64), IntFormat(4, True, 32), as_int_gemm_has_it, "takes one scale a channel, got 2"),
        ((64, 64), IntFormat(4), unaligned_x, "start at multiples of 16 bytes"),
        ((64, 64), IntFormat(4), strided_scale, "must be contiguous"),
    ],
)
def test_why_not(shape, format, change, message):
    w = weight(*shape, format)
    w = w if change is row_major else to_layout(w, Layout.FRAGMENT_FLOAT)
    x, w = change(torch.ones(3, shape[1]).half(), w)
    with pytest.raises(NoBackendError, match=message):
        weight_only_gemm(x, w, backend="cuda")


@on_sm80
def test_why_not_this_bias_or_residual():
    x, w = torch.ones(3, 64).half(), to_layout(weight(64, 64, IntFormat(4)), Layout.FRAGMENT_FLOAT)
    with pytest.raises(NoBackendError, match="bias of fp32, fp16 or bf16, got torch.float64"):
        weight_only_gemm(x, w, torch.zeros(64).double(), backend="cuda")
    with pytest.raises(NoBackendError, match="multiples of 16 bytes"):
        weight_only_gemm(x, w, torch.zeros(65)[1:], backend="cuda")
    unaligned = torch.zeros(3 * 64 + 1).half()[1:].view(3, 64)
    with pytest.raises(NoBackendError, match="multiples of 16 bytes"):
        weight_only_gemm(x, w, None, "cuda", unaligned)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_matrix_instructions(architecture):
    """Of fp16 or bf16, summed in fp32; weights become floats in pairs, by no conversion."""
    seen = set()
    for name, code in sass.kernels_sass(sass.built()[0], architecture).items():
        if found := re.search(r"weight_only_gemm_kernel<.*Operands<(__half|__nv_bfloat16), ", name):
            half = found[1] == "__half"
            products = set(re.findall(r"HMMA[.\w]*", code))
            assert products == {f"HMMA.16816.F32{'' if half else '.BF16'}"}, name
            assert not re.search(r"\bI2F(?![.\w]*RP)", code), name  # RP: of an integer division
            seen.add(half)
    assert seen == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_a_register_of_codes_is_one_lop3(architecture):
    """Mask and exponent in one, four for a product; of 3 bits one more joins the planes."""
    of_64x8 = r"weight_only_gemm_kernel<.*Operands<\w+, (?:\(int\))?([234]), .*Tile<\D*64, \D*8, "
    seen = set()
    for name, code in sass.kernels_sass(sass.built()[0], architecture).items():
        if found := re.search(of_64x8, name):
            bits, products = int(found[1]), len(re.findall(r"HMMA", code))
            ones = f"{(1 << bits) - 1:x}"
            masks = rf"LOP3\.LUT .*, 0x{ones}000{ones}0?, "
            assert len(re.findall(masks, code)) == 4 * products, name
            joined = len(re.findall(r"LOP3\.LUT .*, 0x(?:33333333|cccccccc), ", code))
            assert joined == products * (bits == 3), name
            seen.add(bits)
    assert seen == {2, 3, 4}
