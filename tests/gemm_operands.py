"""What the tests of int_gemm's CUDA kernels multiply, and how they compare: by bits.

Integer sums are exact and the scaling is the reference's, so random scales give equal bits too.
"""

import ctypes

import torch
from helpers import assert_bitwise, poison

from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import int_gemm


def random_codes(shape: tuple[int, ...], format: IntFormat, extreme: bool) -> torch.Tensor:
    """Of the whole range, or its ends alone."""
    if extreme:
        ends = torch.tensor([format.qmin, format.qmax], dtype=format.code_dtype)
        return ends[torch.randint(0, 2, shape)]
    return torch.randint(format.qmin, format.qmax + 1, shape).to(format.code_dtype)


def random_operands(
    shape: tuple[int, int, int], x_format: IntFormat, w_format: IntFormat, extreme: bool = False
) -> tuple[PackedTensor, PackedTensor]:
    """x [M, K] and w [N, K] of a shape M, N, K, both in BYTES."""
    torch.manual_seed(sum(shape))
    M, N, K = shape
    zero_point = None if x_format.symmetric else random_codes((M, 1), x_format, extreme)
    x_codes, size = random_codes((M, K), x_format, extreme), torch.Size((M, K))
    x = PackedTensor(x_codes, torch.rand(M, 1), zero_point, x_format, Layout.BYTES, size)
    scale, channel_scale = torch.rand(N, 1), None
    if w_format.two_level:
        channel_scale, lowest = scale, 15 if extreme else 1
        scale = torch.randint(lowest, 16, (N, w_format.num_groups(K))).to(torch.uint8)
    w_codes, size = random_codes((N, K), w_format, extreme), torch.Size((N, K))
    w = PackedTensor(w_codes, scale, None, w_format, Layout.BYTES, size, channel_scale)
    return x, w


def assert_same(x, w, bias=None, out_dtype=torch.float32, residual=None):
    """The CUDA kernel gives the bits of the reference."""
    with poison():
        got = int_gemm(x, w, bias, out_dtype, backend="cuda", residual=residual)
    expected = int_gemm(x, w, bias, out_dtype, backend="reference", residual=residual)
    assert_bitwise(got, expected)


def launch_plan(shape: tuple[int, int, int], kind: int, sm: int, num_sms: int) -> str:
    """What the launcher chooses for weights of a kind, as csrc/int_gemm.cu numbers them."""
    plan = ctypes.CDLL(str(cuda.LIBRARY.path)).lowbit_plan
    plan.restype = ctypes.c_char_p
    return plan(b"int_gemm", (ctypes.c_int64 * 4)(*shape, kind), 4, sm, num_sms).decode()
