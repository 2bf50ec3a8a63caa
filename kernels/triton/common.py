"""What the Triton kernels share: rounding, the integer grid, packing.

The contracts are in lowbit/ops/quantize.py and lowbit/ops/pack.py. Everything computes in fp32:
load, then `.to(tl.float32)` at once, as the interpreter has no bf16 arithmetic. Kernels that
quantize are launched with enable_fp_fusion=False, so that hi * clip - lo * clip rounds both
products.
"""

import contextlib

import torch
import triton
import triton.language as tl

from lowbit import formats
from lowbit.ops.dispatch import interpreted

MIN_SCALE = tl.constexpr(formats.MIN_SCALE)
# fp32 counts in steps of 1 from 2^23 to 2^24, so adding and taking away 1.5 * 2^23 rounds every
# |x| <= 2^22 to an integer, halves to even, as the addition itself does.
ROUNDER = tl.constexpr(1.5 * 2**23)
ROUNDED_LIMIT = tl.constexpr(2.0**21)
FP32_MAX = tl.constexpr((2 - 2**-23) * 2.0**127)
INTERPRETED = tl.constexpr(interpreted())  # no inline assembly; the same arithmetic in tl instead
INTERPRETED_PROCESSORS = 16
FP16_MAX = tl.constexpr(65504.0)


def device_of(x: torch.Tensor):
    """Launches go to the current device: makes it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def processors_of(device: torch.device) -> int:
    """Multiprocessors to fill; of a small number of them, the interpreter runs every split."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_PROCESSORS


def warps_for(elements: int) -> int:
    """Warps for a tile of so many fp32 numbers in registers: 16 to 32 of them a thread."""
    return min(max(triton.next_power_of_2(elements) // 512, 1), 32)


@triton.jit
def round_half_even(x):
    """The integer nearest to fp32 x, in fp32; what lies beyond +-2^21 becomes +-2^21."""
    x = tl.minimum(tl.maximum(x, -ROUNDED_LIMIT), ROUNDED_LIMIT)
    return (x + ROUNDER) - ROUNDER


@triton.jit
def butterflies(y, LOG: tl.constexpr, STRIDE: tl.constexpr):
    """y, its numbers in order viewed as [..., 2^LOG, STRIDE]: H y over the 2^LOG, not yet divided.

    H is Sylvester's. Step k pairs p with p ^ 2^k, viewing y as [..., 2, 2^k * STRIDE].
    """
    SHAPE: tl.constexpr = y.shape
    for k in tl.static_range(LOG):
        y = tl.reshape(y, [y.numel // (2 * STRIDE << k), 2, STRIDE << k])
        low, high = tl.split(tl.permute(y, [0, 2, 1]))
        y = tl.permute(tl.join(low + high, low - high), [0, 2, 1])
    return tl.reshape(y, SHAPE)


@triton.jit
def quantize_groups(
    x, clip, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, scale_dtype: tl.constexpr
):
    """Every row of x [R, N], fp32, on its own grid: codes [R, N] int32, scale [R], zero [R] int32.

    Padding must be 0: the range of a group includes 0, or, when symmetric, does not see it.
    """
    bad = tl.max((tl.abs(x) <= FP32_MAX).to(tl.int32) ^ 1, axis=1) != 0  # inf or nan in the group
    x = tl.where(bad[:, None], 0.0, x)
    if SYMMETRIC:
        QMAX: tl.constexpr = 2 ** (BITS - 1) - 1
        QMIN: tl.constexpr = -QMAX - 1
        lo = tl.zeros([x.shape[0]], tl.float32)
        span = tl.max(tl.abs(x), axis=1) * clip
    else:
        QMAX: tl.constexpr = 2**BITS - 1
        QMIN: tl.constexpr = 0
        lo = tl.minimum(tl.min(x, axis=1), 0.0) * clip
        span = tl.maximum(tl.max(x, axis=1), 0.0) * clip - lo
    largest: tl.constexpr = FP16_MAX if scale_dtype == tl.float16 else FP32_MAX
    scale = tl.div_rn(span, tl.full([x.shape[0]], QMAX, tl.float32))
    scale = tl.minimum(tl.maximum(scale, MIN_SCALE), largest).to(scale_dtype)
    step = scale.to(tl.float32)  # rounded to the stored dtype before it is used
    codes = round_half_even(tl.div_rn(x, tl.broadcast_to(step[:, None], x.shape)))
    zero = tl.zeros([x.shape[0]], tl.float32)
    if not SYMMETRIC:
        zero = tl.minimum(round_half_even(tl.div_rn(-lo, step)), QMAX)  # -lo >= 0
        codes += zero[:, None]
    codes = tl.minimum(tl.maximum(codes, QMIN), QMAX)
    scale = tl.where(bad, tl.full([x.shape[0]], float("nan"), scale_dtype), scale)
    return codes.to(tl.int32), scale, zero.to(tl.int32)


@triton.jit
def pack_codes(codes, BITS: tl.constexpr):
    """codes [T] int32 -> [T * BITS / 8] int32, each a byte; neighbours share one, lowest first.

    BITS is 2, 4 or 8: code i of 3 bits straddles bytes.
    """
    tl.static_assert(BITS == 2 or BITS == 4 or BITS == 8)
    packed = codes & (2**BITS - 1)
    if BITS == 2:
        low, high = tl.split(tl.reshape(packed, [packed.numel // 2, 2]))
        packed = low | (high << 2)
    if BITS < 8:
        low, high = tl.split(tl.reshape(packed, [packed.numel // 2, 2]))
        packed = low | (high << 4)
    return packed


@triton.jit
def unpack_at(packed, index, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """int32: code number `index` of a bit string, from the byte in which it begins (and, of 3
    bits, the next one above it)."""
    shift = (index * BITS % 8).to(tl.int32)
    code = (packed.to(tl.int32) >> shift) & (2**BITS - 1)
    if SIGNED:
        code = (code ^ 2 ** (BITS - 1)) - 2 ** (BITS - 1)  # two's complement
    return code


@triton.jit
def quantize_row(
    y,  # [BLOCK_R, BASE_PAD, POW2 * BLOCK_I] fp32: a row [A, BASE, POW2, inner] and padding
    row,
    codes_ptr,  # [M, K], or uint8 [M, K * STORAGE_BITS / 8]
    scale_ptr,  # [M] fp32
    zero_ptr,  # [M] uint8, not written when symmetric
    clip,
    A,
    inner,
    BASE: tl.constexpr,
    POW2: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BITS: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One grid for the row; codes to their places in memory. Padding may hold anything."""
    BASE_PAD: tl.constexpr = y.shape[1]
    PER_BYTE: tl.constexpr = 8 // STORAGE_BITS if PACKED else 1
    at, valid = _places(y.numel, 1, A, inner, BASE, BASE_PAD, POW2, BLOCK_I)
    y = tl.where(valid, tl.reshape(y, [y.numel]), 0.0)
    codes, scale, zero = quantize_groups(
        tl.reshape(y, [1, y.numel]), clip, BITS, SYMMETRIC, tl.float32
    )
    one = tl.arange(0, 1)
    tl.store(scale_ptr + row + one, scale)
    if not SYMMETRIC:
        tl.store(zero_ptr + row + one, zero.to(tl.uint8))

    codes = tl.reshape(codes, [y.numel])
    if PER_BYTE > 1:
        codes = pack_codes(codes, STORAGE_BITS)
        at, valid = _places(codes.numel, PER_BYTE, A, inner, BASE, BASE_PAD, POW2, BLOCK_I)
    start = row * (A * BASE * POW2 * inner // PER_BYTE)
    tl.store(codes_ptr + start + at // PER_BYTE, codes.to(codes_ptr.dtype.element_ty), valid)


@triton.jit
def _places(
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
    A,
    inner,
    BASE: tl.constexpr,
    BASE_PAD: tl.constexpr,
    POW2: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Of every STEP-th number of the padded row: its element of the row; whether there is one."""
    index = tl.arange(0, COUNT) * STEP
    i = index % BLOCK_I
    p = index // BLOCK_I % POW2
    b = index // (BLOCK_I * POW2) % BASE_PAD
    a = index // (BLOCK_I * POW2 * BASE_PAD)
    return ((a * BASE + b) * POW2 + p) * inner + i, (a < A) & (b < BASE) & (i < inner)


@triton.jit
def expand_nibbles(t):
    """int8 [R, 2C] of packed int8 [R, C]: 16 times the signed nibbles, in their order."""
    if INTERPRETED:
        low, high = t << 4, t & -16
    else:  # one instruction for four bytes: compiled from tl, each byte is taken out and put back
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; "
            "and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=&r,=r,r",
            [t],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return tl.reshape(tl.join(low, high), [t.shape[0], 2 * t.shape[1]])


@triton.jit
def flip_top_bits(t, NIBBLES: tl.constexpr):
    """t with the top bit of every byte, or of every nibble, flipped."""
    if INTERPRETED:
        flipped = t ^ (-120 if NIBBLES else -128)  # 0x88, 0x80
    elif NIBBLES:
        flipped = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x88888888;", "=r,r", [t], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        flipped = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [t], dtype=tl.int8, is_pure=True, pack=4
        )
    return flipped
