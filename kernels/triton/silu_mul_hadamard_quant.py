"""Triton silu_mul_hadamard_quant. The contract is in lowbit/ops/silu_mul_hadamard_quant.py.

hadamard_quant (one program per row) of act(gate) * up, which is made as gate and up are loaded.
Bound by memory, 4 bytes in and 1/2 or 1 out an element, unless the order has a large dense factor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.kernels.common import device_of, quantize_row, warps_for
from lowbit.kernels.hadamard import rotate, rotation_arguments
from lowbit.ops.quantize import QUANTIZE


@triton.jit
def _silu_mul_hadamard_quant_kernel(
    gate_ptr,  # [M, A, BASE, POW2, inner]
    up_ptr,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    factor,  # 1 / sqrt(order); 1 with a matrix or without a rotation
    clip,
    A,
    inner,  # the row where there is no rotation, else 1
    BASE: tl.constexpr,
    BASE_PAD: tl.constexpr,
    POW2: tl.constexpr,
    LOG_POW2: tl.constexpr,
    BLOCK_R: tl.constexpr,  # a power of two, at least A
    BLOCK_I: tl.constexpr,  # a power of two, at least inner
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BLOCK_R)
    y, _, _ = rotate(
        gate_ptr,
        up_ptr,
        matrix_ptr,
        row * A + a,
        a < A,
        0,
        inner,
        BASE,
        BASE_PAD,
        POW2,
        LOG_POW2,
        BLOCK_I,
        ACTIVATION,
    )
    quantize_row(
        y * factor,
        row,
        codes_ptr,
        scale_ptr,
        zero_ptr,
        clip,
        A,
        inner,
        BASE,
        POW2,
        BLOCK_I,
        BITS,
        STORAGE_BITS,
        SYMMETRIC,
        PACKED,
    )


def silu_mul_hadamard_quant(
    gate: Tensor,
    up: Tensor,
    order: int,
    matrix: Tensor | None,
    activation: str,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    codes, scale, zero = QUANTIZE.fake(gate, bits, 0, symmetric, clip, packed, torch.float32)
    inner = 1 if order else gate.shape[-1]
    table, factor, base, base_pad, pow2, log_pow2 = rotation_arguments(gate, order or 1, matrix)
    A = gate.shape[-1] // (max(order, 1) * inner)
    block_i = triton.next_power_of_2(inner)
    # at least a byte of packed codes
    block_r = max(triton.next_power_of_2(A), 8 // min(base_pad * pow2 * block_i, 8))
    if scale.numel():
        with device_of(gate):
            _silu_mul_hadamard_quant_kernel[(scale.numel(),)](
                gate,
                up,
                table,
                codes,
                scale,
                zero,
                factor,
                clip,
                A,
                inner,
                base,
                base_pad,
                pow2,
                log_pow2,
                block_r,
                block_i,
                activation,
                bits,
                IntFormat(bits).storage_bits,
                symmetric,
                packed,
                num_warps=warps_for(base_pad * pow2 * block_i * block_r),
                enable_fp_fusion=False,
            )
    return codes, scale, zero
