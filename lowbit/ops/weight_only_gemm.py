"""weight_only_gemm: floats x packed weights, a linear layer whose input is not quantized.

W[n, k] = (w_code[n, k] - w_zero[n, g]) * w_scale[n, g]        g the group of k, in fp32
y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n]            in fp32, narrowed once

Sums run in any order, and w_scale may be taken out of the sum of its group: numbers that overflow
only on the way, near fp32's largest, may come out as inf or nan.

x             [M, K]             fp32, fp16 or bf16 (fp64: all arithmetic in fp64)
w_codes       [N, K * sb / 8]    uint8, ROW_MAJOR codes of w_bits (docs/formats.md)
w_scale       [N, G]             fp32 or fp16, G = K / group_size; 1: per output channel
w_zero_point  [N, G]             uint8; None: symmetric codes
bias          [N]                any float, or None
y             [M, N]             x.dtype
w_bits        2..8; sb = storage bits: 2, 3, 4, else 8
"""

import torch
from torch import Tensor

from lowbit.formats import GROUP_SIZES, PackedTensor
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.int_gemm import check_operands, check_weight
from lowbit.ops.quantize import DEQUANTIZE, check_float, compute_dtype


def _check(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
):
    check_float("weight_only_gemm", "x", x)
    if x.dim() != 2:
        raise ValueError(f"weight_only_gemm: x must have shape [M, K], got {tuple(x.shape)}")
    check_weight("weight_only_gemm", x.shape[1], w_codes, w_scale, bias, w_bits, 1)
    if w_zero_point is not None and (
        w_zero_point.dtype != torch.uint8 or w_zero_point.shape != w_scale.shape
    ):
        raise ValueError(
            f"weight_only_gemm: w_zero_point must be uint8 {tuple(w_scale.shape)}, "
            f"got {w_zero_point.dtype} {tuple(w_zero_point.shape)}"
        )


def _reference(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
) -> Tensor:
    compute = compute_dtype(x)
    w = DEQUANTIZE.reference(w_codes, w_scale, w_zero_point, w_bits, True, compute)
    y = x.to(compute) @ w.T
    if bias is not None:
        y.add_(bias.to(compute))
    return y.to(x.dtype)


def _fake(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    w_bits: int,
) -> Tensor:
    return x.new_empty((x.shape[0], w_codes.shape[0]))


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    x, w_scale = args[0], args[2]
    K, G = x.shape[1], w_scale.shape[1]
    if x.dtype == torch.float64:
        return "the Triton kernel computes in fp32, x is fp64"
    if G > 1 and K // G not in GROUP_SIZES:
        return f"the Triton kernel takes groups of {GROUP_SIZES} or one a row, got {K // G}"
    return why_not_triton(*args[:5])


def _why_not_cuda(*_args) -> str:
    return "no CUDA kernel for weight_only_gemm yet"


_BACKENDS = {
    "cuda": Backend(_why_not_cuda),
    "triton": Backend(_why_not_triton, "lowbit.kernels.weight_only_gemm:weight_only_gemm"),
}
WEIGHT_ONLY_GEMM = Op("weight_only_gemm", _check, _reference, _fake, _BACKENDS)


def weight_only_gemm(
    x: Tensor, w: PackedTensor, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """x [..., K] times w [N, K]: [..., N] in x.dtype. The contract is this module's docstring."""
    check_operands("weight_only_gemm", x, w)
    if w.format.two_level:
        raise ValueError(
            "weight_only_gemm: w must have one level of scales, got two: integer group scales are "
            "for the int32 sums of int_gemm"
        )
    y = WEIGHT_ONLY_GEMM(
        x.reshape(-1, x.shape[-1]),
        w.codes,
        w.scale,
        w.zero_point,
        bias,
        w.format.bits,
        backend=backend,
    )
    return y.view(*x.shape[:-1], w.shape[0])
