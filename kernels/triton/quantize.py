"""Triton quantize and dequantize. The contracts are in lowbit/ops/quantize.py.

quantize    One program per BLOCK_G groups; a row without groups is one group. x is read once, the
            group stays in registers between its range and its codes. Padding reads as 0.
dequantize  One program per BLOCK elements, each finds its byte, scale and zero point by itself.

Both are bound by memory: quantize reads 2 and writes 1/2 byte an element (fp16 to packed int4).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.kernels.common import device_of, pack_codes, quantize_groups, unpack_at, warps_for
from lowbit.ops.quantize import fake_codes

BLOCK = 1024  # elements a program of dequantize makes
GROUP_BLOCK = 4096  # elements a program of quantize makes, unless a group alone is longer


@triton.jit
def _quantize_kernel(
    x_ptr,  # [groups, K]
    codes_ptr,  # [groups, K], or uint8 [groups, K * STORAGE_BITS / 8]
    scale_ptr,  # [groups]
    zero_ptr,  # [groups] uint8, not written when symmetric
    clip,
    groups,
    K: tl.constexpr,  # elements of a group
    BITS: tl.constexpr,
    STORAGE_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of two, at least K
):
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    k = tl.arange(0, BLOCK_K)
    here = group.to(tl.int64)[:, None] * K + k[None, :]
    valid = (group < groups)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + here, valid, other=0.0).to(tl.float32)  # [BLOCK_G, BLOCK_K]

    scale_dtype: tl.constexpr = scale_ptr.dtype.element_ty
    codes, scale, zero = quantize_groups(x, clip, BITS, SYMMETRIC, scale_dtype)
    tl.store(scale_ptr + group, scale, group < groups)
    if not SYMMETRIC:
        tl.store(zero_ptr + group, zero.to(tl.uint8), group < groups)

    if PACKED and STORAGE_BITS < 8:
        ROW: tl.constexpr = K * STORAGE_BITS // 8  # bytes
        BLOCK_B: tl.constexpr = BLOCK_K * STORAGE_BITS // 8
        packed = pack_codes(tl.reshape(codes, [BLOCK_G * BLOCK_K]), STORAGE_BITS)
        index = tl.arange(0, BLOCK_G * BLOCK_B)
        group = tl.program_id(0) * BLOCK_G + index // BLOCK_B
        valid = (group < groups) & (index % BLOCK_B < ROW)
        at = group.to(tl.int64) * ROW + index % BLOCK_B
        tl.store(codes_ptr + at, packed.to(tl.uint8), valid)
    else:
        tl.store(codes_ptr + here, codes.to(codes_ptr.dtype.element_ty), valid)


def quantize(
    x: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip: float,
    packed: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    K = group_size or x.shape[-1]
    groups = x.numel() // K
    codes = fake_codes(x, bits, symmetric, packed)
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // K), dtype=scale_dtype)
    zero = x.new_empty(0 if symmetric else scale.shape, dtype=torch.uint8)
    if not groups:
        return codes, scale, zero
    # the narrowest tile is two bytes of packed codes
    block_k = max(triton.next_power_of_2(K), 8)
    block_g = max(GROUP_BLOCK // block_k, 1)
    with device_of(x):
        _quantize_kernel[(triton.cdiv(groups, block_g),)](
            x,
            codes,
            scale,
            zero,
            clip,
            groups,
            K,
            bits,
            IntFormat(bits).storage_bits,
            symmetric,
            packed,
            block_g,
            block_k,
            num_warps=warps_for(block_g * block_k),
            enable_fp_fusion=False,
        )
    return codes, scale, zero


@triton.jit
def _dequantize_kernel(
    codes_ptr,  # [M, K], or uint8 [M, K * BITS / 8]
    scale_ptr,  # [M, K / group_size]
    zero_ptr,  # uint8 like scale, not read when symmetric
    out_ptr,  # [M, K]
    total,  # M * K
    group_size,
    BITS: tl.constexpr,  # of storage
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = index < total
    group = index // group_size
    if PACKED:
        # a packed row fills whole bytes, so that the codes of all rows are one bit string
        byte = tl.load(codes_ptr + index // (8 // BITS), valid, other=0)
        code = unpack_at(byte, index, BITS, SYMMETRIC)
    else:
        code = tl.load(codes_ptr + index, valid, other=0).to(tl.int32)
    if not SYMMETRIC:
        code -= tl.load(zero_ptr + group, valid, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + group, valid, other=0.0).to(tl.float32)
    out = code.to(tl.float32) * scale
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), valid)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    packed: bool,
    dtype: torch.dtype,
) -> Tensor:
    storage_bits = IntFormat(bits).storage_bits
    codes, scale = codes.contiguous(), scale.contiguous()
    K = codes.shape[-1] * 8 // storage_bits if packed else codes.shape[-1]
    out = codes.new_empty((*codes.shape[:-1], K), dtype=dtype)
    if not out.numel():
        return out
    symmetric = zero_point is None
    with device_of(codes):
        _dequantize_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            codes,
            scale,
            scale if symmetric else zero_point.contiguous(),
            out,
            out.numel(),
            K // scale.shape[-1],
            storage_bits,
            symmetric,
            packed,
            BLOCK,
            enable_fp_fusion=False,
        )
    return out
