"""weight_only_gemm: the linears of a layer in bf16, weights of 2 to 8 bits."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, product, shape_text
from benchmarks.shapes import Setup
from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import to_layout
from lowbit.ops.kernel_layouts import cuda_layout
from lowbit.ops.weight_only_gemm import WEIGHT_ONLY_GEMM

FORMATS = {
    "w4a16g128": IntFormat(4, group_size=128),
    "w4a16g128-wasym": IntFormat(4, symmetric=False, group_size=128),
    "w3a16g128": IntFormat(3, group_size=128),
    "w2a16g128": IntFormat(2, group_size=128),
    "w4a16": IntFormat(4),
    "w8a16": IntFormat(8),
}


def cases(setup: Setup) -> Iterator[Case]:
    for (N, K), name in setup.linears():
        for M in setup.rows:
            for format, grid in FORMATS.items():
                if K % (grid.group_size or 1) == 0:
                    yield _case(setup.device, M, N, K, name, format)


def _case(device, M: int, N: int, K: int, linear: str, format: str) -> Case:
    grid = FORMATS[format]

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
        partial(_peers, M, N, K, grid, device),
        operations=product(M, N, K),
        prepare=partial(_prepare, K, grid),
        plan=(M, N, K, grid.storage_bits),
    )


def _prepare(K: int, grid: IntFormat, args: tuple, backend: str) -> tuple:
    """The weight in the layout that the CUDA kernel reads, as a layer prepares it."""
    x, codes, scale, zero_point = args[:4]
    N = len(codes)
    if backend != "cuda" or cuda.why_not_cuda(codes) is not None:
        return args
    layout = cuda_layout(grid, None, K, N, cuda.sm(codes.device))
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
