"""Triton pack and unpack. The contract is in lowbit/ops/pack.py.

A packed row fills whole bytes, so all rows together are one little-endian bit string.

pack    One program per BLOCK bytes. Byte j is bits [8j, 8j + 8): its codes are added up from the
        one that holds bit 8j on, b bits too high, as that one may begin below bit 8j.
unpack  One program per BLOCK codes. Code i is in the byte of bit i * b and, of 3 bits, the next.

Bound by memory; neighbouring programs' elements read the same bytes from cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.common import device_of, unpack_at

BLOCK = 1024


@triton.jit
def _pack_kernel(
    codes_ptr,  # [codes] int8 or uint8
    packed_ptr,  # [codes * BITS / 8] uint8
    codes,
    packed,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = 8 * j // BITS
    low = (first * BITS - 8 * j + BITS).to(tl.int32)  # where it begins, b bits too high
    COUNT: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    bits = tl.zeros([BLOCK], tl.int32)
    for c in tl.static_range(COUNT):
        code = tl.load(codes_ptr + first + c, first + c < codes, other=0).to(tl.int32)
        bits |= (code & (2**BITS - 1)) << (low + c * BITS)
    tl.store(packed_ptr + j, ((bits >> BITS) & 255).to(tl.uint8), j < packed)


@triton.jit
def _unpack_kernel(
    packed_ptr,  # [codes * BITS / 8] uint8
    codes_ptr,  # [codes] int8 when SIGNED, else uint8
    codes,
    packed,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = i * BITS // 8
    bits = tl.load(packed_ptr + byte, byte < packed, other=0).to(tl.int32)
    if BITS == 3:
        bits |= tl.load(packed_ptr + byte + 1, byte + 1 < packed, other=0).to(tl.int32) << 8
    code = unpack_at(bits, i, BITS, SIGNED)
    tl.store(codes_ptr + i, code.to(codes_ptr.dtype.element_ty), i < codes)


def pack(codes: Tensor, bits: int) -> Tensor:
    codes = codes.contiguous()
    shape = (*codes.shape[:-1], codes.shape[-1] * bits // 8)
    packed = codes.new_empty(shape, dtype=torch.uint8)
    if packed.numel():
        with device_of(codes):
            _pack_kernel[(triton.cdiv(packed.numel(), BLOCK),)](
                codes, packed, codes.numel(), packed.numel(), bits, BLOCK
            )
    return packed


def unpack(packed: Tensor, bits: int, signed: bool) -> Tensor:
    packed = packed.contiguous()
    shape = (*packed.shape[:-1], packed.shape[-1] * 8 // bits)
    codes = packed.new_empty(shape, dtype=torch.int8 if signed else torch.uint8)
    if codes.numel():
        with device_of(packed):
            _unpack_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
                packed, codes, codes.numel(), packed.numel(), bits, signed, BLOCK
            )
    return codes
