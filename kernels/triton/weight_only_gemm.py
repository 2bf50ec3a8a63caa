"""Triton weight_only_gemm. The contract is in lowbit/ops/weight_only_gemm.py.

One program computes a BLOCK_M x BLOCK_N tile of y, or BLOCK_N numbers of it when M is 1:

1. Load BLOCK_K columns of x and of packed w; take the codes out of the bytes.
2. code - zero_point, exactly, through fp32: fp32 counts in steps of 1 from 2^23 to 2^24, so the
   bits of 2^23 | code are the number 2^23 + code, and 2^23 + zero_point is taken from it. A signed
   code is one with its top bit flipped and a zero point of 2^(b-1).
3. Multiply by x, sum over a group (BLOCK_K divides it; per channel, over K) in fp32. The integers
   of step 2 fit fp16 and bf16, so fp16 and bf16 x use the matrix units, without rounding w.
4. The sum times w_scale in fp32, so that no weight is ever narrowed to x's dtype. (The GEMV has no
   use for the matrix units, and with groups multiplies each number by w_scale at once.)

Large M is bound by the matrix units and by step 2, M = 1 by reading w. fp32 x runs
on fp32 units, as TF32 would round it. Eight codes of 3 bits are three bytes, loaded one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.kernels.common import device_of
from lowbit.kernels.tiles import WEIGHT_ONLY_FP32_TILES, WEIGHT_ONLY_TILES
from lowbit.ops.dispatch import interpreted

INTERPRETED = tl.constexpr(interpreted())  # it has no bf16 arithmetic: everything is fp32 in it
TWO_23 = tl.constexpr(0x4B000000)  # the bits of 2^23


@triton.jit
def halve(t, BITS: tl.constexpr):
    """[R, 2C] of [R, C]: every number cut into its lowest BITS bits, then the others."""
    low = t & (2**BITS - 1)
    return tl.reshape(tl.join(low, t >> BITS), [t.shape[0], 2 * t.shape[1]])


@triton.jit
def load_codes(w_rows, valid, start, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [R, BLOCK_K]: the bits of the codes from element `start` on of R rows; 0 past K."""
    PER_WORD: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # codes that fill whole bytes
    word = start // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    mask = valid[:, None] & (word < K // PER_WORD)[None, :]
    at = w_rows[:, None] + (word * (PER_WORD * BITS // 8))[None, :]
    code = tl.load(at, mask=mask, other=0).to(tl.int32)
    if BITS == 3:
        code |= tl.load(at + 1, mask=mask, other=0).to(tl.int32) << 8
        code |= tl.load(at + 2, mask=mask, other=0).to(tl.int32) << 16
        code = halve(halve(halve(code, 12), 6), 3)
    elif BITS == 2:
        code = halve(halve(code, 4), 2)
    elif BITS == 4:
        code = halve(code, 4)
    return code


@triton.jit
def load_centered(
    w_rows, zero_point, valid, start, K, BITS: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 [R, BLOCK_K]: code - zero_point; step 2."""
    code = load_codes(w_rows, valid, start, K, BITS, BLOCK_K)
    if SIGNED:
        code ^= 2 ** (BITS - 1)
    number = (code | TWO_23).to(tl.float32, bitcast=True)
    return number - (8388608.0 + zero_point)[:, None]


@triton.jit
def load_zero_point(
    w_zero_point, at, valid, BITS: tl.constexpr, SIGNED: tl.constexpr, R: tl.constexpr
):
    """fp32 [R]."""
    if SIGNED:
        zero_point = tl.full([R], 2 ** (BITS - 1), tl.float32)
    else:
        zero_point = tl.load(w_zero_point + at, mask=valid, other=0).to(tl.float32)
    return zero_point


@triton.jit
def load_scale(w_scale, at, valid):
    return tl.load(w_scale + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def add_columns(
    acc, x_rows, w_rows, zero_point, m_valid, n_valid, start, K,
    BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] with the products of BLOCK_K columns from `start` added."""
    k = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_rows[:, None] + k[None, :], m_valid[:, None] & (k < K)[None, :], other=0.0)
    w = load_centered(w_rows, zero_point, n_valid, start, K, BITS, SIGNED, BLOCK_K)
    if INTERPRETED:
        x = x.to(tl.float32)
    return tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")


@triton.jit
def weight_only_gemm_kernel(
    x,  # [M, K]
    w,  # [N, K * BITS / 8]
    w_scale,  # [N, G]
    w_zero_point,  # [N, G] or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    M,
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # elements of a row that share a w_scale; 0: all K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SIGNED: tl.constexpr = w_zero_point is None
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_valid, n_valid = m < M, n < N
    x_rows = x + m.to(tl.int64) * K
    w_rows = w + n.to(tl.int64) * (K * BITS // 8)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GROUP == 0:
        zero_point = load_zero_point(w_zero_point, n, n_valid, BITS, SIGNED, BLOCK_N)
        for start in range(0, K, BLOCK_K):
            out = add_columns(
                out, x_rows, w_rows, zero_point, m_valid, n_valid, start, K, BITS, SIGNED, BLOCK_K
            )
        out *= load_scale(w_scale, n, n_valid)[None, :]
    else:
        G = K // GROUP
        for g in range(0, G):
            at = n.to(tl.int64) * G + g
            zero_point = load_zero_point(w_zero_point, at, n_valid, BITS, SIGNED, BLOCK_N)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for part in tl.static_range(GROUP // BLOCK_K):
                acc = add_columns(
                    acc, x_rows, w_rows, zero_point, m_valid, n_valid, g * GROUP + part * BLOCK_K,
                    K, BITS, SIGNED, BLOCK_K,
                )  # fmt: skip
            out += acc * load_scale(w_scale, at, n_valid)[None, :]
    if bias is not None:
        out += load_scale(bias, n, n_valid)[None, :]
    at, valid = m.to(tl.int64)[:, None] * N + n[None, :], m_valid[:, None] & n_valid[None, :]
    if residual is not None:
        out += load_scale(residual, at, valid)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def weight_only_gemv_kernel(
    x,  # [K]
    w,  # [N, K * BITS / 8]
    w_scale,  # [N, G]
    w_zero_point,  # [N, G] or None
    bias,  # [N] or None
    residual,  # [N] or None
    y,  # [N]
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # GROUP, where there are groups
):
    SIGNED: tl.constexpr = w_zero_point is None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < N
    w_rows = w + n.to(tl.int64) * (K * BITS // 8)
    G = 1 if GROUP == 0 else K // GROUP
    row = n.to(tl.int64) * G
    zero_point = load_zero_point(w_zero_point, row, valid, BITS, SIGNED, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)  # summed over K once, at the end
    for start in range(0, K, BLOCK_K):
        if GROUP > 0:
            at = row + start // GROUP
            zero_point = load_zero_point(w_zero_point, at, valid, BITS, SIGNED, BLOCK_N)
        k = start + tl.arange(0, BLOCK_K)
        numbers = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        centered = load_centered(w_rows, zero_point, valid, start, K, BITS, SIGNED, BLOCK_K)
        if GROUP > 0:
            centered *= load_scale(w_scale, at, valid)[:, None]
        acc += centered * numbers[None, :]
    out = tl.sum(acc, axis=1)
    if GROUP == 0:
        out *= load_scale(w_scale, n, valid)
    if bias is not None:
        out += load_scale(bias, n, valid)
    if residual is not None:
        out += load_scale(residual, n, valid)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=valid)


def weight_only_gemm(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
) -> Tensor:
    (M, K), N, G = x.shape, w_codes.shape[0], w_scale.shape[1]
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    group = 0 if G == 1 else K // G
    tiles = WEIGHT_ONLY_FP32_TILES if x.dtype == torch.float32 else WEIGHT_ONLY_TILES
    tile = next(t for t in tiles if M <= t.max_M and N <= t.max_N)
    zero_point = None if w_zero_point is None else w_zero_point.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    operands = (x.contiguous(), w_codes.contiguous(), w_scale.contiguous(), zero_point)
    tensors = (*operands, bias, residual, y)
    constants = {
        "BITS": IntFormat(w_bits).storage_bits,
        "GROUP": group,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": min(tile.BLOCK_K, group or tile.BLOCK_K),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    with device_of(x):
        if tile.BLOCK_M == 1:
            grid = (triton.cdiv(N, tile.BLOCK_N),)
            weight_only_gemv_kernel[grid](*tensors, N, K, **constants)
        else:
            grid = (triton.cdiv(M, tile.BLOCK_M), triton.cdiv(N, tile.BLOCK_N))
            weight_only_gemm_kernel[grid](*tensors, M, N, K, BLOCK_M=tile.BLOCK_M, **constants)
    return y
