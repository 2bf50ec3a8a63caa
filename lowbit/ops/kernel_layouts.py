"""Which layout the CUDA kernels read a weight in: one place decides, for int_gemm and for
weight_only_gemm, and asks the kernel before a weight is laid out for it."""

from dataclasses import replace

import torch

from lowbit import cuda
from lowbit.errors import InputError
from lowbit.formats import FRAGMENT_BITS, GROUP_SIZES, IntFormat, Layout, PackedTensor, codes_shape
from lowbit.ops.int_gemm import CUDA_GROUP_SIZES, CUDA_INT4_SM, INT_GEMM
from lowbit.ops.int_gemm import call_arguments as int_gemm_arguments
from lowbit.ops.pack import to_layout
from lowbit.ops.quantize import quantize
from lowbit.ops.weight_only_gemm import WEIGHT_ONLY_GEMM
from lowbit.ops.weight_only_gemm import call_arguments as weight_only_arguments


def cuda_layout(w: IntFormat, x: IntFormat | None, K: int, N: int, sm: int) -> Layout | None:
    """What the CUDA kernels of an architecture read weights [N, K] in; None: they do not take them.

    x: the format of quantized activations. For those of 4 bits FRAGMENT_INT4, which wants them
    ROW_MAJOR, on sm_80 .. sm_89, which alone have 4-bit matrix units; else FRAGMENT, which wants
    BYTES. For activations that are not quantized (None) FRAGMENT_FLOAT; where only some are not,
    the layout is that of those which are, and weight_only_gemm reads it too.
    """
    if N % 8 or K % (8 if x is None else 16):
        return None
    per_channel = w.group_size is None
    if x is None:
        takes = per_channel or w.group_size in GROUP_SIZES and not w.two_level
        return Layout.FRAGMENT_FLOAT if takes else None
    if w.storage_bits not in FRAGMENT_BITS[Layout.FRAGMENT] or not w.symmetric:
        return None
    if not (per_channel or w.two_level and w.group_size in CUDA_GROUP_SIZES):
        return None
    is_int4 = sm in CUDA_INT4_SM and w.bits == x.bits == 4
    return Layout.FRAGMENT_INT4 if is_int4 else Layout.FRAGMENT


def input_layout(w_layout: Layout) -> Layout:
    """The layout of activations for weights of a layout; ROW_MAJOR weights take both."""
    return Layout.ROW_MAJOR if w_layout is Layout.FRAGMENT_INT4 else Layout.BYTES


def laid_out_for_device(
    w: PackedTensor, x_format: IntFormat | None, dtype: torch.dtype, decode: bool = False
) -> PackedTensor:
    """w as the CUDA kernel of its device reads it; dtype: of y, and of x that is not quantized.

    ROW_MAJOR where that does not take the weight, or says why it cannot multiply a row of x_format
    by it: so no weight is left in a layout that the reference alone can read.

    decode: some calls multiply it by x that is not quantized (lowbit/nn/decode.py). Where a kernel
    has the one product and not the other, which would run on the reference, an InputError.
    """
    N, K = w.shape
    wanted = None
    if cuda.why_not_cuda(w.codes) is None:
        wanted = cuda_layout(w.format, x_format, K, N, cuda.sm(w.codes.device))
    if wanted is not None:
        codes = w.codes.new_empty(codes_shape(w.format, wanted, w.shape))
        laid_out = replace(w, codes=codes, layout=wanted)
        if _why_not(laid_out, x_format, dtype) is None:
            reason = _why_not(laid_out, None, dtype) if decode else None
            if reason is not None:
                raise InputError(
                    f"decode needs a kernel for rows that are not quantized, of weights that lie "
                    f"as int_gemm reads them: {reason}"
                )
            return to_layout(w, wanted)
    return to_layout(w, Layout.ROW_MAJOR)


def _why_not(w: PackedTensor, x_format: IntFormat | None, dtype: torch.dtype) -> str | None:
    """Of the CUDA kernel, for one row of zeros."""
    x = w.scale.new_zeros(1, w.shape[1], dtype=dtype if x_format is None else torch.float32)
    if x_format is None:
        return WEIGHT_ONLY_GEMM.backends["cuda"].why_not(*weight_only_arguments(x, w, None))
    x = quantize(x, x_format, layout=input_layout(w.layout), backend="reference")
    return INT_GEMM.backends["cuda"].why_not(*int_gemm_arguments(x, w, None, dtype, None))
