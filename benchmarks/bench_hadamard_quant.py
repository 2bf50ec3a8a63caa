"""hadamard_quant: the rotations of bench_hadamard.py, quantized per token."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Setup
from lowbit.ops.hadamard_quant import HADAMARD_QUANT
from lowbit.ops.quantize import QUANTIZE

BLOCK = 128
FORMATS = {"int4": (4, False), "int4 packed": (4, True)}  # bits, packed


def cases(setup: Setup) -> Iterator[Case]:
    for K, order, inner in setup.rotations(BLOCK):
        for M in setup.rows:
            for format in FORMATS:
                yield _case(setup.device, M, K, order, inner, format)


def _case(device, M: int, K: int, order: int, inner: int, format: str) -> Case:
    bits, packed = FORMATS[format]

    def arguments(exact: bool) -> tuple:
        x = inputs.floats((M, K), torch.bfloat16, device, exact)
        return x, order, inner, None, bits, True, 1.0, packed

    return Case(
        HADAMARD_QUANT,
        shape_text(M=M, K=K, order=order, inner=inner),
        f"bf16 -> {format}",
        inputs.NORMAL,
        arguments,
        partial(_peers, order, inner, (bits, 0, True, 1.0, packed, torch.float32)),
    )


def _peers(order: int, inner: int, grid: tuple, x: Tensor, *_args) -> Peers:
    rotate = peers.rotation(x, order, inner)

    def in_torch(x: Tensor):
        return QUANTIZE.reference(rotate(x), *grid)

    def quantize(y: Tensor):
        return QUANTIZE(y, *grid)

    return {
        "torch.compile": partial(peers.compiled, in_torch, x),
        "fast-hadamard-transform + quantize": partial(
            peers.fast_hadamard, x, order, inner, then=quantize
        ),
    }
