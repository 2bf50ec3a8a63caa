"""kv_attention: causal attention of new queries over the quantized paged cache; decode and prefill.

Sequence b owns rows query_start[b] .. query_start[b + 1] - 1 of q, n of them, and has L =
seq_lens[b] tokens in the cache, the new ones included. With K, V dequantized (fp32, never
narrowed), h the query head and h // (num_q_heads / num_kv_heads) its KV head, query i < n sees the
positions j <= L - n + i, with a window > 0 the last `window` of them, its own included:

    p   = softmax over j of scaling * (q[i, h] . K[j])
    out = sum over j of p[j] * V[j]

Position j lies in page block_table[b, j // page_size] at offset j % page_size. Arithmetic is fp32
(fp64 for fp64 q), out is narrowed once. A query that sees nothing (n > L) and a row of q that no
sequence owns get 0. Zero queries or L = 0 are legal. Entries of block_table past the last page in
use, and slots past L, are never read. Where K or V is not finite, every query of the call that
sees it gets nan; what other queries of that sequence get is not specified.

The new tokens may be given in full precision. Then the positions from cached_lens[b] on are not
read from the pages: position j is row query_start[b + 1] - L + j of k_new and v_new, as it is. One
softmax is over both. What is not finite in these rows reaches queries of their sequence only.

    q             [T, num_q_heads, D]       fp32, fp16 or bf16 (or fp64)
    k_codes, k_scale, k_zero_point, v_codes, v_scale, v_zero_point
                                            the cache of lowbit/ops/kv_append.py, num_kv_heads
                                            divides num_q_heads
    block_table   [B, P]                    int32 page numbers, P * page_size >= every L
    seq_lens      [B]                       int32
    query_start   [B + 1]                   int32, ascending, 0 first, at most T last
    k_new, v_new  [T, num_kv_heads, D]      q.dtype; both None: every position is in the pages
    cached_lens   [B]                       int32, L - n (or 0) .. L; None as k_new is
    bits          2..8; scaling: any float, 1 / sqrt(D) as a rule
    window        int, the sliding window in tokens; 0: none
    out           [T, num_q_heads, D]       q.dtype
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.cuda import why_not_cuda
from lowbit.formats import IntFormat
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.kv_append import KVPages, check_cache
from lowbit.ops.quantize import DEQUANTIZE, compute_dtype
from lowbit.ops.rows import rows_times

LARGEST_TRITON_HEAD, LARGEST_TRITON_NEW_FP32 = 256, 128
LARGEST_CUDA_HEAD, CUDA_HEAD_STEP = 256, 16
QUERY_CHUNK = 64  # queries of one softmax: scores stay in the CPU's cache, and small at any length


def check_attention(
    op: str,
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
    bits: int,
    scaling: float,
    window: int,
):
    """The checks every op that attends over the cache shares."""
    cache = (k_codes, k_scale, k_zero_point, v_codes, v_scale, v_zero_point)
    num_kv_heads = check_cache(op, q, cache, bits)
    for name, t in (
        ("block_table", block_table),
        ("seq_lens", seq_lens),
        ("query_start", query_start),
    ):
        if t.dtype != torch.int32:
            raise ValueError(f"{op}: {name} must be int32, got {t.dtype}")
    B = block_table.shape[0] if block_table.dim() == 2 else None
    if B is None or seq_lens.shape != (B,) or query_start.shape != (B + 1,):
        raise ValueError(
            f"{op}: block_table, seq_lens and query_start must have shapes [B, P], [B] and "
            f"[B + 1], got {tuple(block_table.shape)}, {tuple(seq_lens.shape)} and "
            f"{tuple(query_start.shape)}"
        )
    if window < 0:
        raise ValueError(f"{op}: window must be at least 0, which is none, got {window}")
    new = {"k_new": k_new, "v_new": v_new, "cached_lens": cached_lens}
    missing = [name for name, t in new.items() if t is None]
    if len(missing) == len(new):
        return
    if missing:
        raise ValueError(f"{op}: {', '.join(new)} must be given together, got no {missing[0]}")
    rows = (q.shape[0], num_kv_heads, q.shape[2])
    for name, dtype, shape in (
        ("k_new", q.dtype, rows),
        ("v_new", q.dtype, rows),
        ("cached_lens", torch.int32, (B,)),
    ):
        if new[name].dtype != dtype or new[name].shape != shape:
            raise ValueError(
                f"{op}: {name} must be {dtype} of shape {tuple(shape)}, "
                f"got {new[name].dtype} of shape {tuple(new[name].shape)}"
            )


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
    bits: int,
    scaling: float,
    window: int,
) -> Tensor:
    compute = compute_dtype(q)
    out = torch.zeros_like(q)
    page_size = k_codes.shape[1]
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    in_pages = lengths if cached_lens is None else cached_lens.tolist()
    for b, (length, cached) in enumerate(zip(lengths, in_pages, strict=True)):
        rows = slice(max(starts[b], starts[b + 1] - length), starts[b + 1])  # that see something
        if not max(length - (starts[b + 1] - starts[b]), 0) <= cached <= length:
            raise ValueError(
                f"kv_attention: cached_lens must lack no more than the {starts[b + 1] - starts[b]} "
                f"queries of the {length} tokens of sequence {b}, got {cached}"
            )
        if rows.start >= rows.stop:
            continue
        if length > block_table.shape[1] * page_size:
            raise ValueError(
                f"kv_attention: sequence {b} has {length} tokens, more than the "
                f"{block_table.shape[1]} pages of {page_size} in its block_table row"
            )
        used = block_table[b, : -(-cached // page_size)].long()
        new_rows = slice(rows.stop - (length - cached), rows.stop)
        k, v = (
            _tokens(*(t[used].flatten(0, 1)[:cached] for t in in_pages_of), bits, new, compute)
            for *in_pages_of, new in (
                (k_codes, k_scale, k_zero_point, None if k_new is None else k_new[new_rows]),
                (v_codes, v_scale, v_zero_point, None if v_new is None else v_new[new_rows]),
            )
        )
        out[rows] = attend(q[rows].to(compute), k, v, scaling, window)
    return out


def _tokens(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    new: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    """[num_kv_heads, L, D]: K or V of one sequence, those of its pages and then the new ones."""
    scale, zero_point = _nan_if_not_finite(scale).unsqueeze(-1), zero_point.unsqueeze(-1)
    numbers = DEQUANTIZE.reference(codes, scale, zero_point, bits, True, compute)
    if new is not None:
        numbers = torch.cat((numbers, new.to(compute)))
    return numbers.transpose(0, 1)


def _nan_if_not_finite(scale: Tensor) -> Tensor:
    """An infinite number times a weight of 0, or in a softmax, would not spread as nan does."""
    return torch.where(scale.isfinite(), scale, torch.nan)


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int = 0) -> Tensor:
    """The last n of L positions, q [n, num_q_heads, D], over k, v [num_kv_heads, L, D]; as q."""
    (n, num_q_heads, head_dim), (num_kv_heads, length, _) = q.shape, k.shape
    # The query heads of a KV head are stacked as rows, so that K and V are read once and as is.
    q = (q * scaling).view(n, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    out = torch.empty_like(q)
    later = torch.ones(QUERY_CHUNK, QUERY_CHUNK, dtype=torch.bool, device=q.device).triu(1)
    for start in range(0, n, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, n)
        size = stop - start
        own = length - n + start  # position of the chunk's first query
        first = max(own + 1 - window, 0) if window else 0  # that it sees
        seen = slice(first, own + size)  # by any of them
        scores = rows_times(q[:, :, start:stop].flatten(1, 2), k[:, seen].mT)
        scores = scores.unflatten(1, (-1, size))  # [num_kv_heads, heads each, size, seen]
        scores[..., own - first :].masked_fill_(later[:size, :size], -torch.inf)
        if window:
            position = torch.arange(first, own + size, device=q.device)
            query = torch.arange(own, own + size, device=q.device)
            scores.masked_fill_(position <= query[:, None] - window, -torch.inf)
        p = scores.softmax(-1).flatten(1, 2)
        out[:, :, start:stop] = rows_times(p, v[:, seen]).unflatten(1, (-1, size))
    return out.permute(2, 0, 1, 3).reshape(n, num_q_heads, head_dim)


def _fake(q: Tensor, *_rest) -> Tensor:
    return q.new_empty(q.shape)


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    *tensors, bits, _, _ = args
    q = tensors[0]
    if q.dtype == torch.float64:
        return "the Triton kernel computes in fp32, q is fp64"
    if IntFormat(bits).storage_bits == 3:
        return "the Triton kernel reads codes packed in 2, 4 or 8 bits, bits is 3"
    head_dim, row_bytes = q.shape[2], tensors[1].shape[3]
    if head_dim > LARGEST_TRITON_HEAD or row_bytes % 2:
        return (
            f"the Triton kernel takes a head_dim up to {LARGEST_TRITON_HEAD} whose codes are whole "
            f"16-bit words, got {head_dim} of {bits} bits"
        )
    if tensors[10] is not None and q.dtype == torch.float32 and head_dim > LARGEST_TRITON_NEW_FP32:
        return (
            f"the Triton kernel takes k_new of fp32 in a head_dim up to {LARGEST_TRITON_NEW_FP32} "
            f"(registers), got {head_dim}"
        )
    return why_not_triton(*tensors)


def _why_not_cuda(*args) -> str | None:
    if not args:
        return why_not_cuda()
    *tensors, bits, _, _ = args
    q, codes, k_scale, block_table = tensors[0], (tensors[1], tensors[4]), tensors[2], tensors[7]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes fp16 and bf16, q is {q.dtype}"
    if IntFormat(bits).storage_bits not in (4, 8):
        return f"the CUDA kernel reads codes packed in 4 or 8 bits, bits is {bits}"
    T, num_q_heads, head_dim = q.shape
    if head_dim % CUDA_HEAD_STEP or head_dim > LARGEST_CUDA_HEAD:
        return (
            f"the CUDA kernel takes a head_dim that is a multiple of {CUDA_HEAD_STEP} up to "
            f"{LARGEST_CUDA_HEAD}, got {head_dim}"
        )
    longest = block_table.shape[1] * k_scale.shape[1]
    if max(2 * T * num_q_heads, 2 * longest, k_scale.numel()) >= 2**31:
        return "the CUDA kernel counts heads of queries and of cached tokens in 32 bits"
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        return "the CUDA kernel reads rows of block_table that are contiguous"
    others = [t for t in (*tensors[:7], *tensors[8:]) if t is not None]
    aligned = [t for t in (q, *codes, *tensors[10:12]) if t is not None]
    if not all(t.is_contiguous() for t in others) or any(t.data_ptr() % 16 for t in aligned):
        return (
            "the CUDA kernel reads contiguous tensors, q, codes, k_new and v_new at multiples of "
            "16 bytes"
        )
    return why_not_cuda(*tensors)


_BACKENDS = {
    "cuda": Backend(_why_not_cuda, "lowbit.cuda:kv_attention"),
    "triton": Backend(_why_not_triton, "lowbit.kernels.kv_attention:kv_attention"),
}
KV_ATTENTION = Op(
    "kv_attention", partial(check_attention, "kv_attention"), _reference, _fake, _BACKENDS
)


class NewTokens(NamedTuple):
    """The tokens of one call in full precision, rotated as those in the pages are."""

    k: Tensor
    v: Tensor
    cached_lens: Tensor


NONE_NEW = (None, None, None)


def kv_attention(
    q: Tensor,
    pages: KVPages,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scaling: float,
    new: NewTokens | None = None,
    window: int = 0,
    backend: str | None = None,
) -> Tensor:
    """q's attention over the sequences in `pages`; the contract is this module's docstring."""
    return KV_ATTENTION(
        q,
        *pages.tensors,
        block_table,
        seq_lens,
        query_start,
        *(new or NONE_NEW),
        pages.bits,
        scaling,
        window,
        backend=backend,
    )
