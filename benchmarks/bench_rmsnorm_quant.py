"""rmsnorm_quant: the input of qkv and gate_up, with a residual and without a weight (fused)."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Setup
from lowbit.ops.rmsnorm_quant import RMSNORM_QUANT

FORMATS = {"int4": (4, False), "int4 packed": (4, True)}  # bits, packed
EPS = 1e-5


def cases(setup: Setup) -> Iterator[Case]:
    for M in setup.rows:
        for format in FORMATS:
            yield _case(setup.device, M, setup.model.hidden, format)


def _case(device, M: int, K: int, format: str) -> Case:
    bits, packed = FORMATS[format]

    def arguments(exact: bool) -> tuple:
        options = (None, 0.0 if exact else EPS, bits, True, 1.0, packed)
        if exact:
            return *_exact_sum(M, K, device), *options
        x, residual = torch.randn(2, M, K, device=device, dtype=torch.bfloat16)
        return x, residual, *options

    return Case(
        RMSNORM_QUANT,
        shape_text(M=M, K=K),
        f"bf16 -> {format}",
        inputs.NORMAL,
        arguments,
        _peers,
    )


def _exact_sum(M: int, K: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual, integers whose sums are +-1 and +-3: (5 * 1 + 3 * 9) / 8 = 4, the root of
    the mean square is exact."""
    magnitude = torch.tensor([1.0] * 5 + [3.0] * 3, device=device).repeat(K // 8)
    h = magnitude * (2 * torch.randint(0, 2, (M, K), device=device) - 1)
    residual = torch.randint(-4, 5, (M, K), device=device)
    return (h - residual).bfloat16(), residual.bfloat16()


def _peers(*args) -> Peers:
    return {"torch.compile": partial(peers.compiled, RMSNORM_QUANT.reference, *args)}
