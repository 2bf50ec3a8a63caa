"""Triton silu_mul_hadamard_quant. The contract is in lowbit/ops/silu_mul_hadamard_quant.py.

The kernel of hadamard_quant.py, which makes act(gate) * up as it loads gate and up.
"""

from torch import Tensor

from lowbit.kernels.hadamard_quant import rotate_quantize


def silu_mul_hadamard_quant(
    gate: Tensor,
    up: Tensor,
    order: int,
    matrix: Tensor | None,
    activation: str,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Without a rotation the row is the inner index of a single block.
    order, inner = (order, 1) if order else (1, gate.shape[-1])
    return rotate_quantize(
        gate, up, activation, order, inner, matrix, bits, symmetric, clip, packed
    )
