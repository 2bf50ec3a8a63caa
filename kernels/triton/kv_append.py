"""Triton kv_append. The contract is in lowbit/ops/kv_append.py.

One launch; a row is one head of one token, and one program takes BLOCK_R rows of q, of k or of v:
first all tiles of q, then those of k, then those of v. Rows count heads within tokens, so that they
fill tiles whatever the number of heads. D = BASE * POW2 as in hadamard.py, its index b * POW2 + p.

    step 1  RoPE       x and, from the cache it is then in, the element it turns with
    step 2  over b     a product with the BASE x BASE matrix, rows and p together, BLOCK_K of b at a
                       time; a `matrix` is BASE alone, a power of two has no such step
    step 3  over p     butterflies; q is stored
    step 4  quantize   one group a row; codes, scale and zero point go to slot * num_kv_heads + head

Bound by memory, q read and written, k and v read, unless the base is large: BASE multiplications an
element. q, k and v may be views of one tensor, each has its strides.
"""

import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.kernels.common import butterflies, device_of, pack_codes, quantize_groups, warps_for
from lowbit.kernels.hadamard import rotation_arguments

BLOCK = 2048  # numbers a program holds, twice as many to share what is read of a matrix
BLOCK_K = tl.constexpr(16)  # the least that tl.dot takes
# Rows of step 2, times POW2: with 64 and more, Triton 3.7 takes the TF32 units of sm_100 although
# it is told "ieee". test_compile.py sees to it that no matrix unit is used.
DOT_ROWS = 32


@triton.jit
def _rows(tile, count, heads, BLOCK_R: tl.constexpr):
    """Of the rows of a tile: token and head, int64, and whether there is one."""
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    return (row // heads).to(tl.int64), (row % heads).to(tl.int64), row < count


@triton.jit
def _rope(x, cos, sin, d, valid, D: tl.constexpr, R: tl.constexpr):
    """Elements d, neighbours, of rows that begin at x: fp32 after RoPE, 0 where there is none."""
    turned = valid[:, None] & (d < R)[None, :]
    first = d < R // 2
    partner = tl.where(first, d + R // 2, d - R // 2)
    along = tl.load(x[:, None] + d[None, :], valid[:, None] & (d < D)[None, :], other=0.0)
    across = tl.load(x[:, None] + partner[None, :], turned, other=0.0)
    cos = tl.load(cos[:, None] + d[None, :], turned, other=0.0).to(tl.float32)
    sin = tl.load(sin[:, None] + d[None, :], turned, other=0.0).to(tl.float32)
    along = along.to(tl.float32)
    a, b = along * cos, across.to(tl.float32) * sin
    return tl.where(turned, tl.where(first[None, :], a - b, a + b), along)


@triton.jit
def _turned(
    x,  # [BLOCK_R] pointers: where each row begins; likewise cos and sin
    cos,
    sin,
    valid,  # [BLOCK_R]
    matrix_ptr,
    matrix_stride,
    factor,
    D: tl.constexpr,
    R: tl.constexpr,
    BASE: tl.constexpr,
    BASE_PAD: tl.constexpr,
    POW2: tl.constexpr,
    LOG_POW2: tl.constexpr,
):
    """[BLOCK_R, BASE_PAD * POW2] fp32: rows after RoPE and rotation; 0 past D."""
    BLOCK_R: tl.constexpr = valid.shape[0]
    if BASE == 1:
        y = _rope(x, cos, sin, tl.arange(0, BASE_PAD * POW2), valid, D, R)
    else:
        column = tl.arange(0, BASE_PAD)
        y = tl.zeros([BLOCK_R * POW2, BASE_PAD], tl.float32)
        for start in range(0, BASE, BLOCK_K):
            z = _rope(x, cos, sin, start * POW2 + tl.arange(0, BLOCK_K * POW2), valid, D, R)
            z = tl.permute(tl.reshape(z, [BLOCK_R, BLOCK_K, POW2]), [0, 2, 1])
            z = tl.reshape(z, [BLOCK_R * POW2, BLOCK_K])
            b = start + tl.arange(0, BLOCK_K)
            matrix = tl.load(
                matrix_ptr + b[:, None] * matrix_stride + column[None, :],
                (b < BASE)[:, None] & (column < BASE)[None, :],
                other=0.0,
            )
            y = tl.dot(z, matrix.to(tl.float32), y, input_precision="ieee")
        y = tl.permute(tl.reshape(y, [BLOCK_R, POW2, BASE_PAD]), [0, 2, 1])
    y = butterflies(y, LOG_POW2, 1)
    return tl.reshape(y, [BLOCK_R, BASE_PAD * POW2]) * factor


@triton.jit
def _destination(slot_ptr, token, head, valid, num_kv_heads, slots):
    """[BLOCK_R] int64: where rows go among the heads of all slots; -1: nowhere. Loaded late: it
    would take registers through the rotation."""
    slot = tl.load(slot_ptr + token, valid, other=-1)
    return tl.where((slot >= 0) & (slot < slots), slot * num_kv_heads + head, -1)


@triton.jit
def _append(
    y,  # [BLOCK_R, a power of two] fp32, 0 past D
    at,  # [BLOCK_R] int64: where among the heads of all slots; nowhere if negative
    codes_ptr,  # [slots * num_kv_heads, D * STORAGE_BITS / 8]
    scale_ptr,  # [slots * num_kv_heads]
    zero_ptr,
    clip,
    D: tl.constexpr,
    BITS: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
):
    """Quantize each row and store it."""
    codes, scale, zero = quantize_groups(y, clip, BITS, False, scale_ptr.dtype.element_ty)
    tl.store(scale_ptr + at, scale, at >= 0)
    tl.store(zero_ptr + at, zero.to(tl.uint8), at >= 0)

    ROW: tl.constexpr = D * STORAGE_BITS // 8  # bytes
    BLOCK_B: tl.constexpr = y.shape[1] * STORAGE_BITS // 8
    packed = pack_codes(tl.reshape(codes, [codes.numel]), STORAGE_BITS).to(tl.uint8)
    packed = tl.reshape(packed, [y.shape[0], BLOCK_B])
    byte = tl.arange(0, BLOCK_B)
    where = at[:, None] * ROW + byte[None, :]
    tl.store(codes_ptr + where, packed, (at >= 0)[:, None] & (byte < ROW)[None, :])


@triton.jit
def _kv_append_kernel(
    q_ptr,  # [T, num_q_heads, D], the elements of a head are neighbours
    k_ptr,  # [T, num_kv_heads, D], likewise
    v_ptr,
    cos_ptr,  # [T, R], likewise
    sin_ptr,
    slot_ptr,  # [T]
    k_codes_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_codes_ptr,
    v_scale_ptr,
    v_zero_ptr,
    matrix_ptr,  # [BASE, at least BASE]; not read when BASE is 1
    q_out_ptr,  # [T, num_q_heads, D]
    T,
    num_q_heads,
    num_kv_heads,
    slots,  # num_pages * page_size
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    matrix_stride,
    factor,  # 1 / sqrt(D); 1 with a matrix and without rotation
    clip,
    D: tl.constexpr,
    R: tl.constexpr,
    BASE: tl.constexpr,
    BASE_PAD: tl.constexpr,  # BASE_PAD * POW2 is a power of two, at least D
    POW2: tl.constexpr,
    LOG_POW2: tl.constexpr,
    BITS: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(T * num_q_heads, BLOCK_R)
    kv_tiles = tl.cdiv(T * num_kv_heads, BLOCK_R)
    d = tl.arange(0, BASE_PAD * POW2)

    if tile < q_tiles:
        token, head, valid = _rows(tile, T * num_q_heads, num_q_heads, BLOCK_R)
        y = _turned(
            q_ptr + token * q_token_stride + head * q_head_stride,
            cos_ptr + token * cos_stride,
            sin_ptr + token * sin_stride,
            valid,
            matrix_ptr,
            matrix_stride,
            factor,
            D,
            R,
            BASE,
            BASE_PAD,
            POW2,
            LOG_POW2,
        )
        out_ptr = q_out_ptr + (token * num_q_heads + head) * D
        out = y.to(q_out_ptr.dtype.element_ty)
        tl.store(out_ptr[:, None] + d[None, :], out, valid[:, None] & (d < D)[None, :])
    else:
        tile -= q_tiles
        is_k = tile < kv_tiles
        tile = tl.where(is_k, tile, tile - kv_tiles)
        token, head, valid = _rows(tile, T * num_kv_heads, num_kv_heads, BLOCK_R)
        if is_k:
            y = _turned(
                k_ptr + token * k_token_stride + head * k_head_stride,
                cos_ptr + token * cos_stride,
                sin_ptr + token * sin_stride,
                valid,
                matrix_ptr,
                matrix_stride,
                factor,
                D,
                R,
                BASE,
                BASE_PAD,
                POW2,
                LOG_POW2,
            )
            at = _destination(slot_ptr, token, head, valid, num_kv_heads, slots)
            _append(y, at, k_codes_ptr, k_scale_ptr, k_zero_ptr, clip, D, BITS, STORAGE_BITS)
        else:
            v = v_ptr + token * v_token_stride + head * v_head_stride
            y = tl.load(v[:, None] + d[None, :], valid[:, None] & (d < D)[None, :], other=0.0)
            y = y.to(tl.float32)
            at = _destination(slot_ptr, token, head, valid, num_kv_heads, slots)
            _append(y, at, v_codes_ptr, v_scale_ptr, v_zero_ptr, clip, D, BITS, STORAGE_BITS)


def _rotation(q: Tensor, matrix: Tensor | None, rotate: bool) -> tuple:
    """(table, factor, base, base_pad, pow2, log_pow2)"""
    D = q.shape[-1]
    block = max(triton.next_power_of_2(D), 8)  # the narrowest tile is two bytes of packed codes
    if matrix is not None:
        return matrix.contiguous(), 1.0, D, max(block, BLOCK_K), 1, 0
    if not rotate:
        return q, 1.0, 1, block, 1, 0  # q: not read
    table, factor, base, base_pad, pow2, log_pow2 = rotation_arguments(q, D, None)
    return table, factor, base, base_pad if base > 1 else block // pow2, pow2, log_pow2


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    matrix: Tensor | None,
    rotate: bool,
    bits: int,
    clip: float,
) -> Tensor:
    q_out = q.new_empty(q.shape)
    T, num_q_heads, D = q.shape
    num_kv_heads = k.shape[1]
    if not T:
        return q_out
    q, k, v, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, cos, sin))
    table, factor, base, base_pad, pow2, log_pow2 = _rotation(q, matrix, rotate)
    size = base_pad * pow2
    block_r = max((BLOCK if base == 1 else min(2 * BLOCK, DOT_ROWS // pow2 * size)) // size, 1)
    q_tiles, kv_tiles = (triton.cdiv(T * n, block_r) for n in (num_q_heads, num_kv_heads))
    with device_of(q):
        _kv_append_kernel[(q_tiles + 2 * kv_tiles,)](
            q,
            k,
            v,
            cos,
            sin,
            slot.contiguous(),
            *(k_codes, k_scale, k_zero_point, v_codes, v_scale, v_zero_point),
            table,
            q_out,
            T,
            num_q_heads,
            num_kv_heads,
            k_scale.shape[0] * k_scale.shape[1],
            *(t.stride(i) for t in (q, k, v) for i in (0, 1)),
            *(t.stride(0) for t in (cos, sin, table)),
            factor,
            clip,
            *(D, cos.shape[1], base, base_pad, pow2, log_pow2),
            *(bits, IntFormat(bits).storage_bits),
            block_r,
            num_warps=warps_for(block_r * size),
            enable_fp_fusion=False,
        )
    return q_out
