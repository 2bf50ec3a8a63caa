"""hadamard_quant: rotate every row as hadamard does, then quantize it per token, in one pass.

    y = hadamard(x, order, inner, matrix)            fp32 (fp64 for fp64 x), not narrowed
    codes, scale, zero_point = quantize(y)           one fp32 scale per row

The two contracts are in hadamard.py and quantize.py; only the narrowing between them is left out.

    x           [..., K]        fp64, fp32, fp16 or bf16; order, inner, matrix as in hadamard
    codes       [..., K * storage_bits / 8] uint8 when packed, else [..., K] int8 or uint8
    scale       [..., 1]        fp32
    zero_point  [..., 1]        uint8; empty [0] when symmetric
"""

import torch
from torch import Tensor

from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops.cuda_rotation import dense_for_cuda, signs_for_cuda, why_not_rotated_by_cuda
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.hadamard import (
    HADAMARD,
    check_rotation,
    split_order,
    why_not_rotated_by_triton,
)
from lowbit.ops.quantize import (
    QUANTIZE,
    as_packed_tensor,
    check_float,
    check_grid,
    check_per_token,
    compute_dtype,
    why_not_quantized_by_triton,
)


def _check(
    x: Tensor,
    order: int,
    inner: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
):
    check_float("hadamard_quant", "x", x)
    check_rotation("hadamard_quant", x, order, inner, matrix)
    check_grid("hadamard_quant", x.shape[-1], bits, clip, packed)


def _reference(
    x: Tensor,
    order: int,
    inner: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = HADAMARD.reference(x.to(compute_dtype(x)), order, inner, matrix)
    return QUANTIZE.reference(y, bits, 0, symmetric, clip, packed, torch.float32)


def _fake(
    x: Tensor,
    order: int,
    inner: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return QUANTIZE.fake(x, bits, 0, symmetric, clip, packed, torch.float32)


def why_not_one_row_by_triton(
    x: Tensor, order: int, inner: int, matrix: Tensor | None, bits: int, packed: bool
) -> str | None:
    """What a Triton kernel that rotates and quantizes a whole row in one program leaves out."""
    blocks = x.shape[-1] // (order * inner)
    base, _ = split_order(order, matrix)
    per_byte = 8 // IntFormat(bits).storage_bits if packed else 1
    # codes that share a byte must be neighbours in the program too, where the inner index, the
    # base and the number of blocks are padded to powers of two
    if inner % per_byte:
        if not _power_of_two(inner):
            return f"it cannot pack {bits}-bit codes of inner {inner}"
        if blocks > 1 and order * inner % per_byte and not _power_of_two(base):
            return f"blocks of {order * inner} do not fill whole bytes of {bits}-bit codes"
    elements = (1 << (inner - 1).bit_length()) << (blocks - 1).bit_length()
    return why_not_quantized_by_triton(x, bits, packed) or why_not_rotated_by_triton(
        x, order, matrix, elements
    )


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    x, order, inner, matrix, bits, _, _, packed = args
    return why_not_one_row_by_triton(x, order, inner, matrix, bits, packed)


def _why_not_cuda(*args) -> str | None:
    if not args:
        return cuda.why_not_cuda()
    x, order, inner, matrix, bits, _, clip, packed = args
    if x.dtype == torch.float32:
        return "it rotates fp16 and bf16, x is fp32"
    return why_not_rotated_by_cuda(order, inner, matrix, bits, clip, packed, x, halves=True)


def run_on_cuda(
    x: Tensor,
    order: int,
    inner: int,
    matrix: None,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernel, which takes H as the split of its order and the signs of the dense part."""
    dense = dense_for_cuda(x.shape[-1], order, inner, halves=True)
    signs = signs_for_cuda(dense, x.device)
    return cuda.hadamard_quant(x, signs, order, inner, dense, bits, symmetric, clip, packed)


HADAMARD_QUANT = Op(
    name="hadamard_quant",
    check=_check,
    reference=_reference,
    fake=_fake,
    backends={
        "cuda": Backend(_why_not_cuda, "lowbit.ops.hadamard_quant:run_on_cuda"),
        "triton": Backend(_why_not_triton, "lowbit.kernels.hadamard_quant:hadamard_quant"),
    },
)


def hadamard_quant(
    x: Tensor,
    format: IntFormat,
    order: int | None = None,
    inner: int = 1,
    matrix: Tensor | None = None,
    clip: float = 1.0,
    layout: Layout = Layout.BYTES,
    backend: str | None = None,
) -> PackedTensor:
    """x rotated and quantized; order None: the whole row. The contract is this module's."""
    check_per_token("hadamard_quant", format)
    order = x.shape[-1] // inner if order is None else order
    packed = layout is Layout.ROW_MAJOR
    outputs = HADAMARD_QUANT(
        x, order, inner, matrix, format.bits, format.symmetric, clip, packed, backend=backend
    )
    return as_packed_tensor(*outputs, format, layout, x.shape)
