"""hadamard: whole rows of the down_proj input, blocks of 128, heads mixed as o_proj's input is."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Setup
from lowbit.ops.hadamard import HADAMARD

BLOCK = 128


def cases(setup: Setup) -> Iterator[Case]:
    for K, order, inner in setup.rotations(BLOCK):
        for M in setup.rows:
            yield _case(setup.device, M, K, order, inner)


def _case(device, M: int, K: int, order: int, inner: int) -> Case:
    def arguments(exact: bool) -> tuple:
        return inputs.floats((M, K), torch.bfloat16, device, exact), order, inner, None

    return Case(
        HADAMARD,
        shape_text(M=M, K=K, order=order, inner=inner),
        "bf16",
        inputs.NORMAL,
        arguments,
        partial(_peers, order, inner),
    )


def _peers(order: int, inner: int, x: Tensor, *_args) -> Peers:
    return {
        "torch bf16": partial(peers.in_factors, x, order, inner),
        "fast-hadamard-transform": partial(peers.fast_hadamard, x, order, inner),
    }
