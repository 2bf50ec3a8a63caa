"""Triton int_gemm. The contract is in lowbit/ops/int_gemm.py.

One program computes a BLOCK_M x BLOCK_N tile of y:

1. Load BLOCK_K columns of x and w as they lie; expand packed nibbles to int8, in registers.
2. Multiply on the int8 matrix units, sum in int32. After each group (BLOCK_K divides a group; per
   channel, after the last column) shift out the factors of step 1, convert, times w_scale.
3. Times x_scale, plus bias, plus residual, narrowed once. FP fusion is off: each product and sum is
   rounded, so that fp32 arithmetic gives the bits of the reference. The sums before it are exact.

A nibble is never sign-extended. Byte j of a row holds codes 2j (low) and 2j + 1 (high):

    byte << 4  = 16 * low  modulo 2^8       the low nibble's sign bit is now the byte's
    byte & F0  = 16 * high modulo 2^8       and so is the high nibble's

-8 .. 7 times 16 is -128 .. 112: both are exactly int8, for four bytes at once one shift and two
masks, three instructions for eight codes and two more to interleave them. Each packed operand makes
the sum 16 times too large; what is left is a multiple of 16, so an arithmetic shift right by 4 is
exact.

Unsigned codes that do not fit int8 are moved to it by flipping their top bit, which subtracts
CENTER = 2^(b-1); sum (code - zero) w = sum (code - CENTER) w + (CENTER - zero) sum w, modulo
2^32. mma.sync saturates, so no partial sum may overflow: 2^7 * 2^7 * LONGEST_X16 < 2^31.

Two-level scales: the int32 sum of a group, times an integer, is added to those of the groups before
it. Factors of 16 go first: 15 * 8 * 2^7 * K leaves no room for them. fp32 comes after the last one.

Large M is bound by the matrix units, small M by reading w once per BLOCK_M rows. Where M and N
make too few programs to fill the GPU, K is split: each program stores the int32 sums of its columns
(M is small there) and a second kernel adds them. Integers, so the number of parts changes no bit of
y, and it may follow the GPU's size. fp32 sums over groups are in the contract's order: not split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.kernels.common import device_of, expand_nibbles, flip_top_bits, processors_of
from lowbit.kernels.tiles import (
    ADD_PARTS_BLOCK_N,
    INT_GEMM_GROUPED_TILES,
    INT_GEMM_TILES,
    SPLIT_K_MAX_M,
    SPLIT_K_MIN_COLUMNS,
    SPLIT_K_PROGRAMS,
)


@triton.jit
def add_columns(
    acc,
    w_sum,
    x_rows,
    w_rows,
    x_valid,
    w_valid,
    start,
    K,
    X_BITS: tl.constexpr,
    X_NIBBLES: tl.constexpr,
    W_NIBBLES: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] and w_sum [BLOCK_N] with BLOCK_K columns from `start` added."""
    X_STEP: tl.constexpr = BLOCK_K // 2 if X_NIBBLES else BLOCK_K  # bytes
    W_STEP: tl.constexpr = BLOCK_K // 2 if W_NIBBLES else BLOCK_K
    x_at = (start // 2 if X_NIBBLES else start) + tl.arange(0, X_STEP)
    w_at = (start // 2 if W_NIBBLES else start) + tl.arange(0, W_STEP)
    x_row_bytes = K // 2 if X_NIBBLES else K
    w_row_bytes = K // 2 if W_NIBBLES else K
    x_mask = x_valid[:, None] & (x_at < x_row_bytes)[None, :]
    w_mask = w_valid[:, None] & (w_at < w_row_bytes)[None, :]
    x = tl.load(x_rows[:, None] + x_at[None, :], mask=x_mask, other=0)
    w = tl.load(w_rows[:, None] + w_at[None, :], mask=w_mask, other=0)  # 0 past the row, whatever x
    if HAS_ZERO_POINT and (X_NIBBLES or X_BITS == 8):
        x = flip_top_bits(x, X_NIBBLES)
    if X_NIBBLES:
        x = expand_nibbles(x)
    if W_NIBBLES:
        w = expand_nibbles(w)
    acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    if HAS_ZERO_POINT:
        w_sum += tl.sum(w.to(tl.int32), axis=1)
    return acc, w_sum


@triton.jit
def sum_columns(
    x_rows,
    w_rows,
    x_valid,
    w_valid,
    shift,
    first,
    last,
    K,
    X_BITS: tl.constexpr,
    X_NIBBLES: tl.constexpr,
    W_NIBBLES: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [BLOCK_M, BLOCK_N]: sums over GROUP columns from `first`; 0: all before `last`."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    w_sum = tl.zeros([BLOCK_N], tl.int32)
    if GROUP == 0:
        for start in range(first, last, BLOCK_K):
            acc, w_sum = add_columns(
                acc, w_sum, x_rows, w_rows, x_valid, w_valid, start, K,
                X_BITS, X_NIBBLES, W_NIBBLES, HAS_ZERO_POINT, BLOCK_K,
            )  # fmt: skip
    else:
        for step in tl.static_range(GROUP // BLOCK_K):
            acc, w_sum = add_columns(
                acc, w_sum, x_rows, w_rows, x_valid, w_valid, first + step * BLOCK_K, K,
                X_BITS, X_NIBBLES, W_NIBBLES, HAS_ZERO_POINT, BLOCK_K,
            )  # fmt: skip
    if HAS_ZERO_POINT:
        acc += shift[:, None] * w_sum[None, :]
    return acc >> ((4 if X_NIBBLES else 0) + (4 if W_NIBBLES else 0))


@triton.jit
def store_scaled(out, x_scale, bias, residual, y, m, n, M, N):
    """y at rows m and columns n: out [BLOCK_M, BLOCK_N] fp32 times x_scale, plus what is added."""
    m_valid, n_valid = m < M, n < N
    out *= tl.load(x_scale + m, mask=m_valid, other=0.0)[:, None]
    if bias is not None:
        out += tl.load(bias + n, mask=n_valid, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    valid = m_valid[:, None] & n_valid[None, :]
    if residual is not None:
        out += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def store_sums(acc, w_scale, x_scale, bias, residual, y, m, n, M, N):
    """y at rows m and columns n: acc [BLOCK_M, BLOCK_N] int32 times w_scale, then as above."""
    scale = tl.load(w_scale + n, mask=n < N, other=0.0).to(tl.float32)
    store_scaled(acc.to(tl.float32) * scale[None, :], x_scale, bias, residual, y, m, n, M, N)


@triton.jit
def int_gemm_kernel(
    x,  # [M, K] or [M, K / 2] bytes
    x_scale,  # [M]
    x_zero_point,  # [M] or None
    w,  # [N, K] or [N, K / 2] bytes
    w_group_scale,  # [N, G] uint8: two-level scales; or None
    w_scale,  # [N, G], or [N] with w_group_scale
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    parts,  # [number of parts, M, N] int32, or None: K is not split
    M,
    N,
    K,
    columns,  # of K in a part, a multiple of BLOCK_K; K when it is not split
    X_BITS: tl.constexpr,
    X_NIBBLES: tl.constexpr,  # two codes a byte
    W_NIBBLES: tl.constexpr,
    GROUP: tl.constexpr,  # elements of a row that share a scale; 0: all K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HAS_ZERO_POINT: tl.constexpr = x_zero_point is not None
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_valid, n_valid = m < M, n < N
    x_rows = x + m.to(tl.int64) * (K // 2 if X_NIBBLES else K)
    w_rows = w + n.to(tl.int64) * (K // 2 if W_NIBBLES else K)

    shift = tl.zeros([BLOCK_M], tl.int32)
    if HAS_ZERO_POINT:
        CENTER: tl.constexpr = 8 if X_NIBBLES else (128 if X_BITS == 8 else 0)
        zero_point = tl.load(x_zero_point + m, mask=m_valid, other=0).to(tl.int32)
        shift = (CENTER - zero_point) * (16 if X_NIBBLES else 1)

    part = tl.program_id(2)
    first, last = part * columns, tl.minimum((part + 1) * columns, K)
    if GROUP != 0 and w_group_scale is None:
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for g in range(0, K // GROUP):
            acc = sum_columns(
                x_rows, w_rows, m_valid, n_valid, shift, g * GROUP, K, K, X_BITS, X_NIBBLES,
                W_NIBBLES, HAS_ZERO_POINT, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            at = n.to(tl.int64) * (K // GROUP) + g
            scale = tl.load(w_scale + at, mask=n_valid, other=0.0).to(tl.float32)
            out += acc.to(tl.float32) * scale[None, :]
        store_scaled(out, x_scale, bias, residual, y, m, n, M, N)
    else:
        if GROUP == 0:
            acc = sum_columns(
                x_rows, w_rows, m_valid, n_valid, shift, first, last, K, X_BITS, X_NIBBLES,
                W_NIBBLES, HAS_ZERO_POINT, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for g in range(first // GROUP, last // GROUP):  # the groups that end in this part
                at = n.to(tl.int64) * (K // GROUP) + g
                scale = tl.load(w_group_scale + at, mask=n_valid, other=0).to(tl.int32)
                acc += scale[None, :] * sum_columns(
                    x_rows, w_rows, m_valid, n_valid, shift, g * GROUP, K, K, X_BITS, X_NIBBLES,
                    W_NIBBLES, HAS_ZERO_POINT, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        if parts is not None:
            at = (part * M + m)[:, None] * N + n[None, :]  # M is small: fits int32
            tl.store(parts + at, acc, mask=m_valid[:, None] & n_valid[None, :])
        else:
            store_sums(acc, w_scale, x_scale, bias, residual, y, m, n, M, N)


@triton.jit
def add_parts_kernel(
    parts,  # [number of parts, M, N] int32
    x_scale,  # [M]
    w_scale,  # [N]
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    M,
    N,
    number,
    BLOCK_N: tl.constexpr,
):
    """One row and BLOCK_N columns of y."""
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([1, BLOCK_N], tl.int32)
    for part in range(0, number):
        at = (part * M + m)[:, None] * N + n[None, :]
        acc += tl.load(parts + at, mask=(n < N)[None, :], other=0)
    store_sums(acc, w_scale, x_scale, bias, residual, y, m, n, M, N)


def columns_of_a_part(K: int, tiles: int, block_k: int, device: torch.device) -> int:
    """How many columns of K a program takes, where y has so many tiles."""
    parts = SPLIT_K_PROGRAMS * processors_of(device) // tiles
    columns = max(triton.cdiv(K, max(parts, 1)), SPLIT_K_MIN_COLUMNS)
    return min(triton.cdiv(columns, block_k) * block_k, K)


def int_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_bits: int,
    x_packed: bool,
    w_bits: int,
    out_dtype: torch.dtype,
    w_channel_scale: Tensor | None = None,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
) -> Tensor:
    x_nibbles = x_packed and IntFormat(x_bits).storage_bits == 4
    w_nibbles = IntFormat(w_bits).storage_bits == 4
    M, N, K = x_codes.shape[0], w_codes.shape[0], x_codes.shape[1] * (2 if x_nibbles else 1)
    y = x_codes.new_empty((M, N), dtype=out_dtype)
    if y.numel() == 0:
        return y
    G = w_scale.shape[1]
    two_level = w_channel_scale is not None
    group = K // G if G > 1 or two_level else 0
    w_group_scale, w_scale = (w_scale, w_channel_scale) if two_level else (None, w_scale)
    tiles = INT_GEMM_GROUPED_TILES if group else INT_GEMM_TILES
    tile = next(t for t in tiles if M <= t.max_M and N <= t.max_N)
    block_k = min(tile.BLOCK_K, group or tile.BLOCK_K)
    row_tiles, column_tiles = triton.cdiv(M, tile.BLOCK_M), triton.cdiv(N, tile.BLOCK_N)
    columns = K
    if (not group or two_level) and M <= SPLIT_K_MAX_M:
        columns = columns_of_a_part(K, row_tiles * column_tiles, block_k, y.device)
    number = triton.cdiv(K, columns)
    parts = None if number == 1 else y.new_empty((number, M, N), dtype=torch.int32)
    x_scale, w_scale = x_scale.contiguous(), w_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    with device_of(y):
        int_gemm_kernel[row_tiles, column_tiles, number](
            x_codes.contiguous().view(torch.int8),
            x_scale,
            None if x_zero_point is None else x_zero_point.contiguous(),
            w_codes.contiguous().view(torch.int8),
            None if w_group_scale is None else w_group_scale.contiguous(),
            w_scale, bias, residual, y, parts, M, N, K, columns,
            X_BITS=x_bits, X_NIBBLES=x_nibbles, W_NIBBLES=w_nibbles, GROUP=group,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        if parts is not None:
            add_parts_kernel[M, triton.cdiv(N, ADD_PARTS_BLOCK_N)](
                parts, x_scale, w_scale, bias, residual, y, M, N, number,
                BLOCK_N=ADD_PARTS_BLOCK_N, enable_fp_fusion=False,
            )  # fmt: skip
    return y
