"""silu_mul_hadamard_quant: the input of down_proj, rotated as a whole row, in blocks, or not."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Setup
from lowbit.ops.quantize import QUANTIZE
from lowbit.ops.silu_mul_hadamard_quant import SILU_MUL_HADAMARD_QUANT

BLOCK = 128
FORMATS = {"int4": (4, False), "int4 packed": (4, True)}  # bits, packed


def cases(setup: Setup) -> Iterator[Case]:
    K = setup.model.intermediate
    for order in (K, BLOCK, 0):
        for M in setup.rows:
            for format in FORMATS:
                yield _case(setup.device, M, K, order, format)


def _case(device, M: int, K: int, order: int, format: str) -> Case:
    bits, packed = FORMATS[format]

    def arguments(exact: bool) -> tuple:
        gate, up = inputs.floats((2, M, K), torch.bfloat16, device, exact)
        # silu of an integer is not exact: the check takes relu, everything after it is the same
        activation = "relu" if exact else "silu"
        return gate, up, order, None, activation, bits, True, 1.0, packed

    return Case(
        SILU_MUL_HADAMARD_QUANT,
        shape_text(M=M, K=K, order=order),
        f"bf16 -> {format}",
        inputs.NORMAL,
        arguments,
        partial(_peers, order, (bits, 0, True, 1.0, packed, torch.float32)),
    )


def _peers(order: int, grid: tuple, gate: Tensor, up: Tensor, *_args) -> Peers:
    rotate = peers.rotation(gate, order, 1) if order else lambda y: y

    def in_torch(gate: Tensor, up: Tensor):
        return QUANTIZE.reference(rotate(functional.silu(gate) * up), *grid)

    return {"torch.compile": partial(peers.compiled, in_torch, gate, up)}
