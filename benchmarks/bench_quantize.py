"""quantize and dequantize: activations per token, KV per head, weights in groups."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Setup
from lowbit.formats import IntFormat
from lowbit.ops.quantize import DEQUANTIZE, QUANTIZE

# name: grid, whether codes are packed, dtype of the scales
FORMATS = {
    "int4": (IntFormat(4), False, torch.float32),
    "int4 packed": (IntFormat(4), True, torch.float32),
    "int8": (IntFormat(8), False, torch.float32),
    "uint4 g128 packed": (IntFormat(4, False, 128), True, torch.float16),
}


def cases(setup: Setup) -> Iterator[Case]:
    for K in setup.row_lengths():
        for M in setup.rows:
            for format, (grid, _, _) in FORMATS.items():
                if K % (grid.group_size or 1) == 0:
                    yield _quantize(setup.device, M, K, format)
            yield _dequantize(setup.device, M, K)


def _quantize(device, M: int, K: int, format: str) -> Case:
    grid, packed, scale_dtype = FORMATS[format]
    options = (grid.bits, grid.group_size or 0, grid.symmetric, 1.0, packed, scale_dtype)

    def arguments(exact: bool) -> tuple:
        return inputs.floats((M, K), torch.bfloat16, device, exact), *options

    return Case(
        QUANTIZE,
        shape_text(M=M, K=K),
        f"bf16 -> {format}",
        inputs.NORMAL,
        arguments,
        partial(_peers, QUANTIZE.reference),
    )


def _dequantize(device, M: int, K: int) -> Case:
    grid = IntFormat(4)

    def arguments(exact: bool) -> tuple:
        codes, scale, _ = inputs.weight(M, K, grid, device, exact)
        return codes, scale, None, grid.bits, True, torch.bfloat16

    return Case(
        DEQUANTIZE,
        shape_text(M=M, K=K),
        "int4 packed -> bf16",
        inputs.CODES,
        arguments,
        partial(_peers, DEQUANTIZE.reference),
    )


def _peers(reference, *args) -> Peers:
    return {"torch.compile": partial(peers.compiled, reference, *args)}
