"""The ops, one file each: contract, reference, and the list of backends that implement it."""

from lowbit.ops.hadamard import hadamard
from lowbit.ops.hadamard_quant import hadamard_quant
from lowbit.ops.int_gemm import int_gemm
from lowbit.ops.kv_append import KVPages, kv_append
from lowbit.ops.kv_attention import kv_attention
from lowbit.ops.kv_attention_quant import kv_attention_quant
from lowbit.ops.pack import pack, to_layout, unpack
from lowbit.ops.quantize import dequantize, quantize
from lowbit.ops.rmsnorm_quant import rmsnorm_quant
from lowbit.ops.silu_mul_hadamard_quant import silu_mul_hadamard_quant
from lowbit.ops.weight_only_gemm import weight_only_gemm

__all__ = [
    "KVPages",
    "dequantize",
    "hadamard",
    "hadamard_quant",
    "int_gemm",
    "kv_append",
    "kv_attention",
    "kv_attention_quant",
    "pack",
    "quantize",
    "rmsnorm_quant",
    "silu_mul_hadamard_quant",
    "to_layout",
    "unpack",
    "weight_only_gemm",
]
