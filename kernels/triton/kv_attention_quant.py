"""Triton kv_attention_quant. The contract is in lowbit/ops/kv_attention_quant.py.

The launches of kv_attention.py and then of hadamard_quant.py or quantize.py, one after the other: a
program that adds the splits of one head does not see the row that is rotated.
"""

from torch import Tensor

from lowbit.kernels.hadamard_quant import hadamard_quant
from lowbit.kernels.kv_attention import kv_attention
from lowbit.kernels.quantize import quantize
from lowbit.ops.kv_attention_quant import two_calls
from lowbit.ops.quantize import QUANTIZE


def kv_attention_quant(*args) -> tuple[Tensor, Tensor, Tensor]:
    attention, quantizer, grid = two_calls(args)
    x = kv_attention(*attention).flatten(1)
    return quantize(x, *grid) if quantizer is QUANTIZE else hadamard_quant(x, *grid)
