"""weight_only_gemm: the linears of a layer in bf16, weights of 2 to 8 bits.

Of few rows also with weights as int_gemm reads them, beside quantize and int_gemm on the same ones:
what a decoding step is spared. The largest M at which the op is the faster is decode_rows of
`lowbit.load(..., decode="w4a16")` on that GPU:

    lowbit bench weight_only_gemm --M 1 2 4 8 16 32 64
"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, product, shape_text
from benchmarks.shapes import Setup
from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import int_gemm, quantize, to_layout
from lowbit.ops.kernel_layouts import cuda_layout, input_layout, laid_out_for_device
from lowbit.ops.weight_only_gemm import WEIGHT_ONLY_GEMM

FORMATS = {
    "w4a16g128": IntFormat(4, group_size=128),
    "w4a16g128-wasym": IntFormat(4, symmetric=False, group_size=128),
    "w3a16g128": IntFormat(3, group_size=128),
    "w2a16g128": IntFormat(2, group_size=128),
    "w4a16": IntFormat(4),
    "w8a16": IntFormat(8),
}
# format -> weights, and the inputs that int_gemm multiplies by them
PHASES = {
    "w4a4": (IntFormat(4), IntFormat(4)),
    "w4a8": (IntFormat(4), IntFormat(8)),
    "w8a8": (IntFormat(8), IntFormat(8)),
}
FEW = 64  # rows


def cases(setup: Setup) -> Iterator[Case]:
    for (N, K), name in setup.linears():
        for M in setup.rows:
            for format, grid in FORMATS.items():
                if K % (grid.group_size or 1) == 0:
                    yield _case(setup.device, M, N, K, name, format, grid)
            for format, grids in PHASES.items() if M <= FEW else ():
                yield _case(setup.device, M, N, K, name, f"w{grids[0].bits}a16 of {format}", *grids)


def _case(
    device, M: int, N: int, K: int, linear: str, format: str, grid: IntFormat, other=None
) -> Case:
    """other: the format of inputs in calls that quantize them; None: there are none."""

    def arguments(exact: bool) -> tuple:
        x = inputs.floats((M, K), torch.bfloat16, device, exact)
        w, scale, zero_point = inputs.weight(N, K, grid, device, exact)
        return x, w, scale, zero_point, None, grid.bits, Layout.ROW_MAJOR.value

    return Case(
        WEIGHT_ONLY_GEMM,
        f"{shape_text(M=M, N=N, K=K)} {linear}",
        f"{format} bf16",
        inputs.NORMAL_AND_CODES,
        arguments,
        partial(_peers, M, N, K, grid, device)
        if other is None
        else partial(_phases, M, N, K, grid, other, device),
        operations=product(M, N, K),
        prepare=partial(_prepare, K, grid, other),
        plan=(M, N, K, grid.storage_bits, *_run_of(device, grid, other, K, N)),
    )


def _run_of(device, grid: IntFormat, other: IntFormat | None, K: int, N: int) -> tuple[int, ...]:
    """What the planner of csrc/weight_only_gemm.cu calls the layout, where it is int_gemm's."""
    if other is None or device.type != "cuda":
        return ()
    layout = cuda_layout(grid, other, K, N, cuda.sm(device))
    return () if layout is None else ({Layout.FRAGMENT: 4, Layout.FRAGMENT_INT4: 8}[layout],)


def _prepare(K: int, grid: IntFormat, other: IntFormat | None, args: tuple, backend: str) -> tuple:
    """The weight in the layout that the CUDA kernel reads, as a layer prepares it."""
    x, codes, scale, zero_point = args[:4]
    N = len(codes)
    if backend != "cuda" or cuda.why_not_cuda(codes) is not None:
        return args
    layout = cuda_layout(grid, other, K, N, cuda.sm(codes.device))
    if layout is None:  # the call then gives the reason
        return args
    shape = torch.Size((N, K))
    w = PackedTensor(codes, scale, zero_point, grid, Layout.ROW_MAJOR, shape)
    return x, to_layout(w, layout).codes, *args[2:6], layout.value


def _peers(M: int, N: int, K: int, grid: IntFormat, device, *_args) -> Peers:
    found = {"torch bf16": partial(peers.bf16_linear, M, N, K, device)}
    if grid.bits == 4:
        found["torch int4"] = partial(peers.int4_mm, M, N, K, grid.group_size, device)
    grouped = (grid.bits, grid.group_size, device)
    found["gemlite"] = partial(peers.gemlite_weight_only, M, N, K, *grouped)
    return found


def _phases(
    M: int, N: int, K: int, grid: IntFormat, other: IntFormat, device, *args: object
) -> Peers:
    """What the layer runs where it quantizes the same x: the first backend that can."""
    x, codes, scale = args[:3]
    w = PackedTensor(codes, scale, None, grid, Layout.ROW_MAJOR, torch.Size((N, K)))

    def quantize_and_multiply():
        prepared = laid_out_for_device(w, other, x.dtype, decode=True)
        x_layout = input_layout(prepared.layout)
        return lambda: int_gemm(quantize(x, other, layout=x_layout), prepared, None, x.dtype)

    return {
        "torch bf16": partial(peers.bf16_linear, M, N, K, device),
        "quantize + int_gemm": quantize_and_multiply,
    }
