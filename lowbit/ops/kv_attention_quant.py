"""kv_attention_quant: attention over the paged cache, rotated and quantized: the o_proj input.

    x = kv_attention(q, ..., kv_bits, scaling, window)    narrowed to q.dtype, its heads one row
    codes, scale, zero_point = hadamard_quant(x, order, inner, matrix, bits, ...)

order 0 leaves the rotation out: quantize(x). On each backend it returns the very bits of these two
calls on that backend; kv_attention.py, hadamard_quant.py and quantize.py have the contract. A row
that sees nothing is quantized zeros, one with nan has scale nan and codes 0.

    q .. window                          as in kv_attention, where kv_bits is `bits`
    order, inner, matrix                 as in hadamard, of rows of K = num_q_heads * head_dim
    codes       [T, K * storage_bits / 8] uint8 when packed, else [T, K] int8 or uint8
    scale       [T, 1]                   fp32
    zero_point  [T, 1]                   uint8; empty [0] when symmetric
"""

import torch
from torch import Tensor

from lowbit import cuda
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops.cuda_rotation import dense_for_cuda, signs_for_cuda, why_not_rotated_by_cuda
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.hadamard import check_rotation
from lowbit.ops.hadamard_quant import HADAMARD_QUANT
from lowbit.ops.kv_append import KVPages
from lowbit.ops.kv_attention import KV_ATTENTION, NONE_NEW, NewTokens, check_attention
from lowbit.ops.quantize import QUANTIZE, as_packed_tensor, check_grid, check_per_token


def _parts(args: tuple) -> tuple[tuple, tuple]:
    """kv_attention's arguments, and those that follow them."""
    return args[:16], args[16:]


def two_calls(args: tuple) -> tuple[tuple, Op, tuple]:
    """The arguments as kv_attention's, and the op that quantizes with those that follow its x."""
    attention, (order, inner, matrix, bits, symmetric, clip, packed) = _parts(args)
    if order == 0:
        return attention, QUANTIZE, (bits, 0, symmetric, clip, packed, torch.float32)
    return attention, HADAMARD_QUANT, (order, inner, matrix, bits, symmetric, clip, packed)


def _no_rows(q: Tensor) -> Tensor:
    """[0, K]: what is quantized, for checks that look at no element."""
    return q[:0].flatten(1)


def _check(*args):
    op = "kv_attention_quant"
    attention, (order, inner, matrix, bits, _, clip, packed) = _parts(args)
    check_attention(op, *attention)
    x = _no_rows(args[0])
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: q must have heads, got shape {tuple(args[0].shape)}")
    if order:
        check_rotation(op, x, order, inner, matrix)
    elif inner != 1 or matrix is not None:
        given = f"inner {inner}" if matrix is None else "a matrix"
        raise ValueError(f"{op}: order 0 rotates nothing and needs inner 1, no matrix; got {given}")
    check_grid(op, x.shape[-1], bits, clip, packed)


def _reference(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cached_lens: Tensor | None,
    kv_bits: int,
    scaling: float,
    window: int,
    order: int,
    inner: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cache = (k_codes, k_scale, k_zero_point, v_codes, v_scale, v_zero_point)
    new = (k_new, v_new, cached_lens)
    attention = (q, *cache, block_table, seq_lens, query_start, *new, kv_bits, scaling, window)
    grid = (order, inner, matrix, bits, symmetric, clip, packed)
    attention, quantizer, grid = two_calls((*attention, *grid))
    return quantizer.reference(KV_ATTENTION.reference(*attention).flatten(1), *grid)


def _fake(q: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    _, quantizer, grid = two_calls((q, *rest))
    return quantizer.fake(q.flatten(1), *grid)


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    attention, quantizer, grid = two_calls(args)
    reason = KV_ATTENTION.backends["triton"].why_not(*attention)
    return reason or quantizer.backends["triton"].why_not(_no_rows(args[0]), *grid)


def _why_not_cuda(*args) -> str | None:
    if not args:
        return cuda.why_not_cuda()
    attention, (order, inner, matrix, bits, _, clip, packed) = _parts(args)
    reason = KV_ATTENTION.backends["cuda"].why_not(*attention)
    return reason or why_not_rotated_by_cuda(
        order or 1, inner, matrix, bits, clip, packed, _no_rows(args[0]), halves=True
    )


def run_on_cuda(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernels, which take H as the split of its order and the signs of the dense part."""
    attention, (order, inner, _, *grid) = _parts(args)
    q = attention[0]
    dense = dense_for_cuda(q.shape[1] * q.shape[2], order or 1, inner, halves=True)
    signs = signs_for_cuda(dense, q.device)
    return cuda.kv_attention_quant(*attention, signs, order, inner, dense, *grid)


KV_ATTENTION_QUANT = Op(
    name="kv_attention_quant",
    check=_check,
    reference=_reference,
    fake=_fake,
    backends={
        "cuda": Backend(_why_not_cuda, "lowbit.ops.kv_attention_quant:run_on_cuda"),
        "triton": Backend(_why_not_triton, "lowbit.kernels.kv_attention_quant:kv_attention_quant"),
    },
)


def kv_attention_quant(
    q: Tensor,
    pages: KVPages,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scaling: float,
    format: IntFormat,
    order: int = 0,
    inner: int = 1,
    matrix: Tensor | None = None,
    clip: float = 1.0,
    layout: Layout = Layout.BYTES,
    new: NewTokens | None = None,
    window: int = 0,
    backend: str | None = None,
) -> PackedTensor:
    """q's attention over the sequences in `pages`, a token's heads rotated across and quantized as
    one row [T, num_q_heads * head_dim]; the contract is this module's docstring."""
    check_per_token("kv_attention_quant", format)
    outputs = KV_ATTENTION_QUANT(
        q,
        *pages.tensors,
        block_table,
        seq_lens,
        query_start,
        *(new or NONE_NEW),
        pages.bits,
        scaling,
        window,
        order,
        inner,
        matrix,
        format.bits,
        format.symmetric,
        clip,
        layout is Layout.ROW_MAJOR,
        backend=backend,
    )
    return as_packed_tensor(*outputs, format, layout, (q.shape[0], q.shape[1:].numel()))
