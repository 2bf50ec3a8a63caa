"""Triton hadamard. The contract is in lowbit/ops/hadamard.py.

One program per BLOCK_R blocks of order * inner elements, and BLOCK_I of the inner index. The order
is BASE * POW2 (lowbit.ops.hadamard.split_order), its index b * POW2 + p.

    step 1  over b: x comes from memory, once, and is multiplied by the BASE x BASE matrix: BASE
            multiplications an element; a `matrix` is BASE alone
    step 2  over p: butterflies; step k pairs p with p ^ 2^k, viewing y as [..., 2, 2^k * BLOCK_I]

Step 1 on matrix units, BLOCK_K of b at a time: a Hadamard matrix is int8 +-1, exact in fp16 and in
bf16, as x is; what is not 16 bits wide is the sum of three bf16, exact too while it is normal. A
`matrix` of floats is multiplied row by row on fp32 units, and so are the longest rows.

A power of two is bound by memory, 2 bytes in and 2 out an element; BASE = 344 by step 1 and by the
matrix, which every row reads anew. BASE is padded to a power of two in y and in the matrix.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.hadamard import factorize, hadamard_matrix
from lowbit.kernels.common import butterflies, device_of, warps_for
from lowbit.ops.dispatch import interpreted
from lowbit.ops.hadamard import split_order

BLOCK = 4096  # numbers a program holds, unless one block alone is longer
BLOCK_K = tl.constexpr(16)  # the least that tl.dot takes, of b and of all else
MAX_ON_MATRIX_UNITS = tl.constexpr(
    16384
)  # numbers: they leave through shared memory, 99 KB on sm_89
BF16_BITS = tl.constexpr(-65536)  # the upper half of fp32
INTERPRETED = tl.constexpr(interpreted())  # it has no bf16 arithmetic: fp32 in it


@triton.jit
def _load(x_ptr, up_ptr, at, valid, ACTIVATION: tl.constexpr):
    """x, or ACTIVATION(x) * up, in fp32; 0 where it is not valid."""
    x = tl.load(x_ptr + at, valid, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        x = activate(x, ACTIVATION) * tl.load(up_ptr + at, valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """The activations of lowbit/ops/silu_mul_hadamard_quant.py; of 0 they are 0."""
    if ACTIVATION == "relu":
        y = tl.where(g <= 0.0, 0.0, g)  # nan stays
    elif ACTIVATION == "gelu":
        y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)),   u = sqrt(2 / pi) (g + 0.044715 g^3)
        y = _divided(g, -2 * 0.7978845608028654 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(ACTIVATION == "silu")
        y = _divided(g, -g)
    return y


@triton.jit
def _divided(g, exponent):
    """g / (1 + exp(exponent))"""
    return tl.div_rn(g, 1.0 + tl.exp(exponent))


@triton.jit
def _add_product(signs, x, y, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """y + signs @ x; x fp32, of numbers that are exact in `dtype` where there is no activation."""
    whole: tl.constexpr = ACTIVATION == "" and dtype != tl.float32
    unit: tl.constexpr = tl.float32 if INTERPRETED else (dtype if whole else tl.bfloat16)
    if whole:
        y = tl.dot(signs.to(unit), x.to(unit), y)
    else:
        for _ in tl.static_range(3):
            # cut, not rounded: what is finite stays so
            part = (x.to(tl.int32, bitcast=True) & BF16_BITS).to(tl.float32, bitcast=True)
            y = tl.dot(signs.to(unit), part.to(unit), y)
            x = tl.where(part == x, 0.0, x - part)  # 0 also for inf
    return y


@triton.jit
def rotate(
    x_ptr,
    up_ptr,  # like x, read with an activation
    matrix_ptr,  # [BASE, BASE_PAD], int8 +-1 or fp32, columns padded with 0; for BASE > 1
    block,  # [BLOCK_R] int64: which blocks of x viewed as [blocks, BASE, POW2, inner]
    block_valid,  # [BLOCK_R]
    first_i,
    inner,
    BASE: tl.constexpr,
    BASE_PAD: tl.constexpr,
    POW2: tl.constexpr,
    LOG_POW2: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "", or applied to x first; then times up
):
    """y [BLOCK_R, BASE_PAD, POW2 * BLOCK_I] fp32, not yet divided; offsets of y[:, 0]; validity."""
    PI: tl.constexpr = POW2 * BLOCK_I
    BLOCK_R: tl.constexpr = block.shape[0]
    pi = tl.arange(0, PI)
    i = first_i + pi % BLOCK_I
    at = block[:, None] * (BASE * POW2 * inner) + (pi // BLOCK_I * inner + i)[None, :]
    valid = block_valid[:, None] & (i < inner)[None, :]  # [BLOCK_R, PI]

    # step 1
    on_matrix_units: tl.constexpr = (
        matrix_ptr.dtype.element_ty == tl.int8
        and BASE_PAD >= BLOCK_K.value
        and BLOCK_R * PI >= BLOCK_K.value
        and BASE_PAD * BLOCK_R * PI <= MAX_ON_MATRIX_UNITS.value
    )
    columns = tl.arange(0, BASE_PAD)
    if BASE == 1:
        y = _load(x_ptr, up_ptr, at, valid, ACTIVATION)
    elif on_matrix_units:
        neighbours = tl.reshape(at, [1, BLOCK_R * PI])
        there = tl.reshape(valid, [1, BLOCK_R * PI])
        y = tl.zeros([BASE_PAD, BLOCK_R * PI], tl.float32)
        for start in range(0, BASE, BLOCK_K):
            b = start + tl.arange(0, BLOCK_K)
            mask = there & (b < BASE)[:, None]
            x = _load(x_ptr, up_ptr, neighbours + b[:, None] * (POW2 * inner), mask, ACTIVATION)
            signs = matrix_ptr + b[None, :] * BASE_PAD + columns[:, None]
            signs = tl.load(signs, (b < BASE)[None, :], other=0)
            y = _add_product(signs, x, y, x_ptr.dtype.element_ty, ACTIVATION)
        y = tl.permute(tl.reshape(y, [BASE_PAD, BLOCK_R, PI]), [1, 0, 2])
    else:
        y = tl.zeros([BLOCK_R, BASE_PAD, PI], tl.float32)
        for b in range(BASE):
            x = _load(x_ptr, up_ptr, at + b * (POW2 * inner), valid, ACTIVATION)
            row = tl.load(matrix_ptr + b * BASE_PAD + columns).to(tl.float32)
            # also where fusion is off: with +-1 it changes no bit
            row = tl.broadcast_to(row[None, :, None], y.shape)
            y = tl.fma(row, tl.broadcast_to(x[:, None, :], y.shape), y)

    y = butterflies(y, LOG_POW2, BLOCK_I)  # step 2
    return tl.reshape(y, [BLOCK_R, BASE_PAD, PI]), at, valid


@triton.jit
def _hadamard_kernel(
    x_ptr,  # [blocks, BASE, POW2, inner]
    matrix_ptr,
    y_ptr,  # like x
    blocks,
    inner,
    factor,  # 1 / sqrt(order); 1 with a matrix
    BASE: tl.constexpr,
    BASE_PAD: tl.constexpr,
    POW2: tl.constexpr,
    LOG_POW2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_i = tl.program_id(1) * BLOCK_I
    y, at, valid = rotate(
        x_ptr,
        x_ptr,
        matrix_ptr,
        block,
        block < blocks,
        first_i,
        inner,
        BASE,
        BASE_PAD,
        POW2,
        LOG_POW2,
        BLOCK_I,
        "",
    )
    y = (y * factor).to(y_ptr.dtype.element_ty)
    b = tl.arange(0, BASE_PAD)
    at = at[:, None, :] + (b * (POW2 * inner))[None, :, None]
    tl.store(y_ptr + at, y, valid[:, None, :] & (b < BASE)[None, :, None])


@lru_cache(maxsize=32)
def _base_matrix(order: int, device: torch.device) -> Tensor:
    """The Kronecker product of order's base orders, [BASE, BASE_PAD]. Shared between calls."""
    product = torch.ones(1, 1, dtype=torch.int8)
    for f in factorize(order):
        if f & (f - 1):
            product = torch.kron(product, hadamard_matrix(f))
    with torch.inference_mode(False):
        return padded(product).to(device)


def padded(matrix: Tensor) -> Tensor:
    """Contiguous, columns padded to a power of two."""
    n = len(matrix)
    return torch.nn.functional.pad(matrix, (0, triton.next_power_of_2(n) - n)).contiguous()


def rotation_warps(base: int, elements: int) -> int:
    """Of a program that holds so many numbers. A dense factor takes more registers a thread."""
    if base == 1:
        return warps_for(elements)
    # 32 numbers a thread. For these bases Triton 3.9 spills to keep to 64 registers: 64 numbers
    per_warp = 2048 if base in (108, 1040) else 1024
    return min(max(elements // per_warp, 4), 16)


def rotation_arguments(x: Tensor, order: int, matrix: Tensor | None) -> tuple:
    """(matrix_ptr, factor, BASE, BASE_PAD, POW2, LOG_POW2) of one rotation."""
    base, pow2 = split_order(order, matrix)
    factor = 1.0 if matrix is not None else 1 / math.sqrt(order)
    if matrix is not None:
        table = padded(matrix.float())
    else:
        table = x if base == 1 else _base_matrix(order, x.device)  # x: not read
    return table, factor, base, triton.next_power_of_2(base), pow2, pow2.bit_length() - 1


def hadamard(x: Tensor, order: int, inner: int, matrix: Tensor | None) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    blocks = x.numel() // (order * inner)
    if not blocks:
        return y
    table, factor, base, base_pad, pow2, log_pow2 = rotation_arguments(x, order, matrix)
    size = base_pad * pow2
    block_i = min(triton.next_power_of_2(inner), max(BLOCK // size, 1))
    block_r = max(BLOCK // (size * block_i), 1)
    with device_of(x):
        _hadamard_kernel[(triton.cdiv(blocks, block_r), triton.cdiv(inner, block_i))](
            x,
            table,
            y,
            blocks,
            inner,
            factor,
            base,
            base_pad,
            pow2,
            log_pow2,
            block_r,
            block_i,
            num_warps=rotation_warps(base, size * block_i * block_r),
        )
    return y
