"""weight_only_gemm: floats x packed weights, a linear layer whose input is not quantized.

W[n, k] = (w_code[n, k] - w_zero[n, g]) * w_scale[n, g]        g the group of k, in fp32
y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n] + residual[m, n]     in fp32, narrowed once

Sums run in any order, and w_scale may be taken out of the sum of its group: numbers that overflow
only on the way, near fp32's largest, may come out as inf or nan, and inf in x as nan.

x             [M, K]             fp32, fp16 or bf16 (fp64: all arithmetic in fp64)
w_codes       [N, K * sb / 8]    uint8, codes of w_bits (docs/formats.md), row_major;
              [ceil(N / 64), ceil(K / 64), 64 * 64 * sb / 8] uint8, fragment_float; of symmetric
              codes also fragment and fragment_int4, as a layer has them that quantizes its input
              in some calls and not in others
w_scale       [N, G]             fp32 or fp16, G = K / group_size; 1: per output channel
w_zero_point  [N, G]             uint8; None: symmetric codes
bias          [N]                any float, or None
y             [M, N]             x.dtype
w_bits        2..8; sb = storage bits: 2, 3, 4, else 8
w_layout      the layout of w_codes by its name; N is that of w_scale, as codes may be padded
residual      [M, N]             x.dtype, or None
"""

import torch
from torch import Tensor

from lowbit import cuda
from lowbit.formats import FRAGMENT_BITS, GROUP_SIZES, IntFormat, Layout, PackedTensor
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.int_gemm import OUT_DTYPES, check_operands, check_weight
from lowbit.ops.pack import fragment_codes
from lowbit.ops.quantize import DEQUANTIZE, check_float, compute_dtype
from lowbit.ops.rows import rows_times

W_LAYOUTS = (Layout.ROW_MAJOR, *FRAGMENT_BITS)
INT_GEMM_LAYOUTS = (Layout.FRAGMENT, Layout.FRAGMENT_INT4)  # of symmetric weights
CUDA_DTYPES = (torch.float16, torch.bfloat16)  # of x
# of w_layout and residual: torch.library hands on no trailing default
DEFAULTS = (Layout.ROW_MAJOR.value, None)


def _check(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
):
    check_float("weight_only_gemm", "x", x)
    if x.dim() != 2:
        raise ValueError(f"weight_only_gemm: x must have shape [M, K], got {tuple(x.shape)}")
    if w_layout not in W_LAYOUTS:
        raise ValueError(
            f"weight_only_gemm: w_layout must be one of {[layout.value for layout in W_LAYOUTS]}, "
            f"got {w_layout!r}"
        )
    layout = Layout(w_layout)
    check_weight("weight_only_gemm", x.shape[1], w_codes, w_scale, bias, w_bits, 1, layout)
    if w_zero_point is not None and (
        w_zero_point.dtype != torch.uint8 or w_zero_point.shape != w_scale.shape
    ):
        raise ValueError(
            f"weight_only_gemm: w_zero_point must be uint8 {tuple(w_scale.shape)}, "
            f"got {w_zero_point.dtype} {tuple(w_zero_point.shape)}"
        )
    if w_zero_point is not None and layout in INT_GEMM_LAYOUTS:
        raise ValueError(
            f"weight_only_gemm: w_zero_point must be None with w_layout {w_layout!r}, got one"
        )
    shape = (x.shape[0], w_scale.shape[0])
    if residual is not None and (residual.dtype != x.dtype or residual.shape != shape):
        raise ValueError(
            f"weight_only_gemm: residual must be {x.dtype} {shape}, as y is, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )


def _reference(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
) -> Tensor:
    compute, layout = compute_dtype(x), Layout(w_layout)
    packed = layout is Layout.ROW_MAJOR
    if not packed:
        storage, shape = IntFormat(w_bits).storage_bits, (w_scale.shape[0], x.shape[1])
        w_codes = fragment_codes(w_codes, layout, storage, shape, signed=w_zero_point is None)
    w = DEQUANTIZE.reference(w_codes, w_scale, w_zero_point, w_bits, packed, compute)
    y = rows_times(x.to(compute), w.T)
    if bias is not None:
        y.add_(bias.to(compute))
    if residual is not None:
        y.add_(residual.to(compute))
    return y.to(x.dtype)


def _fake(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], w_scale.shape[0]))


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    x, w_scale = args[0], args[2]
    w_layout, residual = (*args, *DEFAULTS[len(args) - 6 :])[6:]
    K, G = x.shape[1], w_scale.shape[1]
    if w_layout != Layout.ROW_MAJOR:
        return f"the Triton kernel reads row_major weights, w is {w_layout}: see to_layout"
    if x.dtype == torch.float64:
        return "the Triton kernel computes in fp32, x is fp64"
    if G > 1 and K // G not in GROUP_SIZES:
        return f"the Triton kernel takes groups of {GROUP_SIZES} or one a row, got {K // G}"
    return why_not_triton(*args[:5], residual)


def _why_not_cuda(*args) -> str | None:
    if not args:
        return cuda.why_not_cuda()
    args = (*args, *DEFAULTS[len(args) - 6 :])
    tensors = (*args[:5], args[7])
    return (
        _why_not_operands_in_cuda(args)
        or _why_not_memory_in_cuda(tensors)
        or cuda.why_not_cuda(*tensors)
    )


def _why_not_operands_in_cuda(args: tuple) -> str | None:
    x, _, w_scale, _, bias, w_bits, w_layout = args[:7]
    (K, N), G = (x.shape[1], w_scale.shape[0]), w_scale.shape[1]
    if x.dtype not in CUDA_DTYPES:
        return f"the CUDA kernel takes x of fp16 or bf16, got {x.dtype}"
    if w_layout == Layout.ROW_MAJOR:
        return "the CUDA kernel reads weights in a kernel layout, w is row_major: see to_layout"
    if K == 0 or K % 8 or N % 8:
        return f"rows of x and y must be multiples of 8 elements, got {K} and {N}"
    if G > 1 and K // G not in GROUP_SIZES:
        return f"the CUDA kernel takes groups of {GROUP_SIZES} or one a row, got {K // G}"
    if G > 1 and w_layout in INT_GEMM_LAYOUTS:
        return f"with w of layout {w_layout} the CUDA kernel takes one scale a channel, got {G}"
    if bias is not None and bias.dtype not in OUT_DTYPES:
        return f"the CUDA kernel takes a bias of fp32, fp16 or bf16, got {bias.dtype}"
    return None


def _why_not_memory_in_cuda(tensors: tuple) -> str | None:
    x, w_codes, _, _, bias, residual = tensors
    if any(t is not None and t.data_ptr() % 16 for t in (x, w_codes, bias, residual)):
        return "the CUDA kernel's matrices and bias must start at multiples of 16 bytes"
    if any(t is not None and not t.is_contiguous() for t in tensors):
        return "the CUDA kernel's tensors must be contiguous"
    return None


_BACKENDS = {
    "cuda": Backend(_why_not_cuda, "lowbit.cuda:weight_only_gemm"),
    "triton": Backend(_why_not_triton, "lowbit.kernels.weight_only_gemm:weight_only_gemm"),
}
WEIGHT_ONLY_GEMM = Op("weight_only_gemm", _check, _reference, _fake, _BACKENDS)


def call_arguments(
    x: Tensor, w: PackedTensor, bias: Tensor | None, residual: Tensor | None = None
) -> tuple:
    """Those of the op."""
    rows = x.reshape(-1, x.shape[-1])
    residual = None if residual is None else residual.reshape(-1, w.shape[0])
    return rows, w.codes, w.scale, w.zero_point, bias, w.format.bits, w.layout.value, residual


def weight_only_gemm(
    x: Tensor,
    w: PackedTensor,
    bias: Tensor | None = None,
    backend: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] times w [N, K], plus residual: [..., N] in x.dtype.

    The contract is this module's docstring.
    """
    check_operands("weight_only_gemm", x, w, W_LAYOUTS)
    if w.format.two_level:
        raise ValueError(
            "weight_only_gemm: w must have one level of scales, got two: integer group scales are "
            "for the int32 sums of int_gemm"
        )
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"weight_only_gemm: residual must have shape {shape}, got {tuple(residual.shape)}"
        )
    y = WEIGHT_ONLY_GEMM(*call_arguments(x, w, bias, residual), backend=backend)
    return y.view(shape)
