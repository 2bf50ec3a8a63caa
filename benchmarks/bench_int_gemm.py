"""int_gemm: the linears of a layer, symmetric activations, alone and with quantize in front."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, product, shape_text
from benchmarks.shapes import Setup
from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import to_layout
from lowbit.ops.int_gemm import INT_GEMM
from lowbit.ops.kernel_layouts import cuda_layout
from lowbit.ops.quantize import QUANTIZE

OUT = torch.bfloat16
# name: bits of x, whether its codes are packed, format of w
FORMATS = {
    "w4a4": (4, False, IntFormat(4)),
    "w4a4 packed x": (4, True, IntFormat(4)),
    "w4a8": (8, False, IntFormat(4)),
    "w4a8 g128": (8, False, IntFormat(4, group_size=128)),
    "w4a8 g128 two-level": (8, False, IntFormat(4, group_size=128, two_level=True)),
    "w8a8": (8, False, IntFormat(8)),
}
WITH_QUANTIZE = ("w4a4", "w4a8", "w8a8")


class WeightArguments(NamedTuple):
    """Which arguments of a timed call are its weight."""

    codes: int
    scale: int
    channel_scale: int
    layout: int


OF_GEMM, WITH_X = WeightArguments(3, 4, 10, 11), WeightArguments(1, 2, 5, 6)


def cases(setup: Setup) -> Iterator[Case]:
    for (N, K), name in setup.linears():
        for M in setup.rows:
            for format in FORMATS:
                yield _gemm(setup.device, M, N, K, name, format)
            for format in WITH_QUANTIZE:
                yield _with_quantize(setup.device, M, N, K, name, format)


def _gemm(device, M: int, N: int, K: int, linear: str, format: str) -> Case:
    x_bits, packed, w_format = FORMATS[format]

    def arguments(exact: bool) -> tuple:
        x = inputs.random_bytes((M, K * x_bits // 8), device)
        if not packed:
            x = inputs.codes((M, K), IntFormat(x_bits), device)
        w, w_scale, _ = inputs.weight(N, K, w_format, device, exact)
        x_scale = inputs.scales((M, 1), torch.float32, device, exact)
        channel = inputs.scales((N, 1), torch.float32, device, exact)
        formats = (x_bits, packed, w_format.bits, OUT, channel if w_format.two_level else None)
        return x, x_scale, None, w, w_scale, None, *formats, Layout.ROW_MAJOR.value

    return Case(
        INT_GEMM,
        f"{shape_text(M=M, N=N, K=K)} {linear}",
        f"{format} bf16",
        inputs.CODES,
        arguments,
        partial(_peers, M, N, K, device),
        operations=product(M, N, K),
        rate="int8",
        prepare=partial(_prepare, K, w_format, IntFormat(x_bits), OF_GEMM),
        plan=(M, N, K, _kind(w_format)),
    )


def _kind(w_format: IntFormat) -> int:
    """Of weights, as the planner of csrc/int_gemm.cu numbers them, where they are `fragment`."""
    return 2 if w_format.storage_bits == 8 else 3 if w_format.two_level else 0


def _prepare(
    K: int,
    w_format: IntFormat,
    x_format: IntFormat,
    where: WeightArguments,
    args: tuple,
    backend: str,
) -> tuple:
    """The weight in the layout that the CUDA kernel of its device reads, as a layer prepares it."""
    codes, scale, channel = (args[i] for i in (where.codes, where.scale, where.channel_scale))
    N = len(codes)
    if backend != "cuda" or cuda.why_not_cuda(codes) is not None:
        return args
    layout = cuda_layout(w_format, x_format, K, N, cuda.sm(codes.device))
    if layout is None:  # the call then gives the reason
        return args
    shape = torch.Size((N, K))
    w = PackedTensor(codes, scale, None, w_format, Layout.ROW_MAJOR, shape, channel)
    prepared = list(args)
    prepared[where.codes] = to_layout(w, layout).codes
    prepared[where.layout] = layout.value
    return tuple(prepared)


def _peers(M: int, N: int, K: int, device, *_args) -> Peers:
    return {
        "torch bf16": partial(peers.bf16_linear, M, N, K, device),
        "torch._int_mm": partial(peers.int_mm, M, N, K, device),
        "torch._scaled_mm fp8": partial(peers.fp8_mm, M, N, K, device),
    }


def _quantize_and_multiply(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    x_bits: int,
    w_bits: int,
    channel_scale: None,
    w_layout: str,
    backend: str,
) -> Tensor:
    packed = w_layout == Layout.FRAGMENT_INT4.value
    codes, scale, _ = QUANTIZE(x, x_bits, 0, True, 1.0, packed, torch.float32, backend=backend)
    formats = (x_bits, packed, w_bits, x.dtype, channel_scale, w_layout)
    return INT_GEMM(codes, scale, None, w, w_scale, None, *formats, backend=backend)


def _with_quantize(device, M: int, N: int, K: int, linear: str, format: str) -> Case:
    x_bits, _, w_format = FORMATS[format]

    def arguments(exact: bool) -> tuple:
        x = inputs.floats((M, K), OUT, device, exact)
        w, w_scale, _ = inputs.weight(N, K, w_format, device, exact)
        return x, w, w_scale, x_bits, w_format.bits, None, Layout.ROW_MAJOR.value

    return Case(
        INT_GEMM,
        f"{shape_text(M=M, N=N, K=K)} {linear}",
        f"{format} bf16",
        inputs.NORMAL_AND_CODES,
        arguments,
        partial(_quantizing_peers, M, N, K, device),
        operations=product(M, N, K),
        rate="int8",
        # x and y in bf16, w and its fp32 scales; the codes between the two calls are not needed
        nbytes=2 * M * K + 2 * M * N + N * K * w_format.bits // 8 + 4 * N,
        run=_quantize_and_multiply,
        variant="with quantize",
        prepare=partial(_prepare, K, w_format, IntFormat(x_bits), WITH_X),
        plan=(M, N, K, _kind(w_format)),
    )


def _quantizing_peers(M: int, N: int, K: int, device, *_args) -> Peers:
    return {
        "torch bf16": partial(peers.bf16_linear, M, N, K, device),
        "gemlite int8 dynamic": partial(peers.gemlite_w8a8, M, N, K, device),
    }
