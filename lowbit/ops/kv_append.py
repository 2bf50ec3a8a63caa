"""kv_append: RoPE and head rotation of q and k; k and v quantized into the paged cache.

    q, k = rope(q), rope(k)            x * cos + rotate_half(x) * sin on elements 0 .. R - 1 of a
                                       head, rotate_half([a, b]) = [-b, a]; elements R .. D - 1 stay
    q, k = q @ H, k @ H                if rotate: H = H_D / sqrt(D), or `matrix`
    cache[slot] = quantize(k), quantize(v)      asymmetric, one group of D elements per token and
                                                head, fp16 scales (lowbit/ops/quantize.py)

Arithmetic is fp32 (fp64 for fp64 q, k, v), nothing is narrowed between the steps, and q_out is
narrowed once. Only the slots named by `slot` change; they must be distinct and below
num_pages * page_size. Token t with slot[t] < 0 is not stored; its q_out is computed all the same.

    q           [T, num_q_heads, D]     fp32, fp16 or bf16 (or fp64), like k and v
    k, v        [T, num_kv_heads, D]    num_kv_heads divides num_q_heads
    cos, sin    [T, R]                  any float, R even, 2 <= R <= D
    slot        [T]                     int64, page * page_size + offset in the page
    matrix      [D, D]                  any float, used as is; None: the Hadamard matrix
    q_out       [T, num_q_heads, D]     q.dtype

and the cache of one layer, changed in place:

    k_codes, v_codes            [num_pages, page_size, num_kv_heads, D * sb / 8]    uint8
    k_scale, v_scale            [num_pages, page_size, num_kv_heads]                fp16
    k_zero_point, v_zero_point  [num_pages, page_size, num_kv_heads]                uint8
    bits        2..8; sb = storage bits: 2, 3, 4, else 8
    clip        (0, 1]
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit import cuda
from lowbit.formats import IntFormat
from lowbit.hadamard import hadamard_matrix
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.hadamard import HADAMARD, check_rotation, split_order
from lowbit.ops.pack import check_row
from lowbit.ops.quantize import (
    CUDA_VECTOR,
    QUANTIZE,
    check_float,
    check_grid,
    compute_dtype,
    why_not_quantized_by_cuda,
    why_not_quantized_by_triton,
)

CACHE = ("k_codes", "k_scale", "k_zero_point", "v_codes", "v_scale", "v_zero_point")


def check_cache(op: str, q: Tensor, cache: tuple[Tensor, ...], bits: int, clip: float = 1.0) -> int:
    """The checks of q and of the six cache tensors that the KV ops share; returns num_kv_heads."""
    check_float(op, "q", q)
    if q.dim() != 3:
        raise ValueError(
            f"{op}: q must have shape [T, num_q_heads, head_dim], got {tuple(q.shape)}"
        )
    _, num_q_heads, head_dim = q.shape
    check_grid(op, head_dim, bits, clip, packed=True)
    row_bytes = head_dim * IntFormat(bits).storage_bits // 8
    if cache[0].dim() != 4 or cache[0].shape[2] < 1 or num_q_heads % cache[0].shape[2]:
        raise ValueError(
            f"{op}: k_codes must have shape [num_pages, page_size, num_kv_heads, {row_bytes}] "
            f"with num_kv_heads dividing {num_q_heads}, got {tuple(cache[0].shape)}"
        )
    token = cache[0].shape[:3]
    expected = (
        (torch.uint8, (*token, row_bytes)),
        (torch.float16, token),
        (torch.uint8, token),
    )
    for name, t, (dtype, shape) in zip(CACHE, cache, expected * 2, strict=True):
        if t.dtype != dtype or t.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {dtype} of shape {tuple(shape)}, "
                f"got {t.dtype} of shape {tuple(t.shape)}"
            )
    return token[2]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    matrix: Tensor | None,
    rotate: bool,
    bits: int,
    clip: float,
):
    cache = (k_codes, k_scale, k_zero_point, v_codes, v_scale, v_zero_point)
    num_kv_heads = check_cache("kv_append", q, cache, bits, clip)
    T, _, head_dim = q.shape
    for name, t in (("k", k), ("v", v)):
        if t.shape != (T, num_kv_heads, head_dim) or t.dtype != q.dtype:
            raise ValueError(
                f"kv_append: {name} must be {q.dtype} of shape {(T, num_kv_heads, head_dim)}, "
                f"got {t.dtype} of shape {tuple(t.shape)}"
            )
    for name, t in (("cos", cos), ("sin", sin)):
        check_float("kv_append", name, t)
        if t.dim() != 2 or t.shape[0] != T or t.shape[1] > head_dim or t.shape[1] % 2:
            raise ValueError(
                f"kv_append: {name} must have shape [{T}, R], R even and at most {head_dim}, "
                f"got {tuple(t.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(
            f"kv_append: cos and sin must have one shape, got {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    if slot.dtype != torch.int64 or slot.shape != (T,):
        raise ValueError(
            f"kv_append: slot must be int64 of shape [{T}], got {slot.dtype} {tuple(slot.shape)}"
        )
    if rotate:
        check_rotation("kv_append", q, int(head_dim), 1, matrix)  # static, whatever is traced
    elif matrix is not None:
        raise ValueError("kv_append: matrix must be None when rotate is False")


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    a, b = rotated.chunk(2, -1)
    return torch.cat((rotated * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    matrix: Tensor | None,
    rotate: bool,
    bits: int,
    clip: float,
) -> Tensor:
    compute = compute_dtype(q)
    cos, sin = (t.to(compute).unsqueeze(1) for t in (cos, sin))  # the same for every head
    q_out, k = (_rope(t.to(compute), cos, sin) for t in (q, k))
    if rotate:
        q_out, k = (HADAMARD.reference(t, t.shape[-1], 1, matrix) for t in (q_out, k))
    stored = slot >= 0
    page_size = k_codes.shape[1]
    where = (slot[stored] // page_size, slot[stored] % page_size)
    for x, codes_out, scale_out, zero_out in (
        (k, k_codes, k_scale, k_zero_point),
        (v, v_codes, v_scale, v_zero_point),
    ):
        codes, scale, zero = QUANTIZE.reference(
            x[stored], bits, 0, False, clip, True, scale_out.dtype
        )
        codes_out[where] = codes
        scale_out[where] = scale.squeeze(-1)
        zero_out[where] = zero.squeeze(-1)
    return q_out.to(q.dtype)


def _fake(q: Tensor, *_rest) -> Tensor:
    return q.new_empty(q.shape)


TRITON_MAX_HEAD_DIM = 256


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    *inputs, matrix, _, bits, _ = args
    q, cache = inputs[0], inputs[6:]
    if q.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"head_dim must be at most {TRITON_MAX_HEAD_DIM}, it is {q.shape[-1]}"
    strided = [name for name, t in zip(CACHE, cache, strict=True) if not t.is_contiguous()]
    if strided:
        return f"it writes contiguous pages only, not those of {', '.join(strided)}"
    return why_not_quantized_by_triton(q, bits, True) or why_not_triton(*inputs, matrix)


CUDA_HEAD_DIMS = (64, 80, 96, 128, 256)


def _why_not_cuda(*args) -> str | None:
    if not args:
        return cuda.why_not_cuda()
    *inputs, matrix, _, bits, clip = args
    q, cos, sin, slot, cache = inputs[0], *inputs[3:6], inputs[6:]
    head_dim, turned = q.shape[-1], cos.shape[-1]
    if head_dim not in CUDA_HEAD_DIMS:
        return f"head_dim must be one of {CUDA_HEAD_DIMS}, it is {head_dim}"
    if matrix is not None:
        return "it rotates by Hadamard matrices, not by a matrix given"
    if turned % (2 * CUDA_VECTOR):
        return f"RoPE must turn a multiple of {2 * CUDA_VECTOR} elements, it turns {turned}"
    if cos.dtype != sin.dtype or cos.dtype == torch.float64:
        return f"cos and sin must be of one dtype, not fp64; they are {cos.dtype} and {sin.dtype}"
    rows = dict(zip(("q", "k", "v", "cos", "sin"), inputs[:5], strict=True))
    strided = [name for name, t in rows.items() if not _has_cuda_rows(t)]
    if strided:
        return f"heads of {', '.join(strided)} must be contiguous, at multiples of 16 bytes"
    strided = [
        name
        for name, t in zip(CACHE, cache, strict=True)
        if not t.is_contiguous() or (name.endswith("codes") and t.data_ptr() % 16)
    ]
    if strided:
        return f"it writes contiguous pages only, not those of {', '.join(strided)}"
    if not slot.is_contiguous():
        return "slot must be contiguous"
    no_rows = q[:0]  # where rows lie has been looked at
    return why_not_quantized_by_cuda(head_dim, bits, clip, True, no_rows) or cuda.why_not_cuda(
        *inputs
    )


def _has_cuda_rows(t: Tensor) -> bool:
    """Whether rows of t, at any distance, can be read 16 bytes at a time."""
    *strides, last = t.stride()
    return last == 1 and t.data_ptr() % 16 == 0 and not any(s % CUDA_VECTOR for s in strides)


@lru_cache(maxsize=8)
def _base_signs(head_dim: int, device: torch.device) -> Tensor | None:
    """H of the base of head_dim: int32 [base], bit b of word m is 1 where H[m, b] is -1. None for
    powers of two. Read-only: shared between calls."""
    base, _ = split_order(head_dim, None)
    if base == 1:
        return None
    negative = (hadamard_matrix(base) < 0).to(torch.int64)
    words = (negative << torch.arange(base)).sum(1)
    with torch.inference_mode(False):
        return words.to(torch.int32).to(device, copy=True)


def run_on_cuda(*args) -> Tensor:
    """The CUDA kernel, which takes H as the signs of its base in place of `matrix`."""
    *inputs, _, rotate, bits, clip = args
    q = inputs[0]
    signs = _base_signs(q.shape[-1], q.device) if rotate else None
    return cuda.kv_append(*inputs, signs, rotate, bits, clip)


_BACKENDS = {
    "cuda": Backend(_why_not_cuda, "lowbit.ops.kv_append:run_on_cuda"),
    "triton": Backend(_why_not_triton, "lowbit.kernels.kv_append:kv_append"),
}
KV_APPEND = Op("kv_append", _check, _reference, _fake, _BACKENDS, mutates_args=CACHE)


@dataclass(frozen=True)
class KVPages:
    """The paged cache of one layer; the shapes are in this module's docstring."""

    k_codes: Tensor
    k_scale: Tensor
    k_zero_point: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_zero_point: Tensor
    bits: int

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        bits: int,
        device: torch.device | str | None = None,
    ) -> "KVPages":
        """Pages of zeros."""
        grid = IntFormat(bits, symmetric=False)
        check_row("KVPages", head_dim, grid.storage_bits)
        token = (num_pages, page_size, num_kv_heads)
        row_bytes = head_dim * grid.storage_bits // 8

        def one():
            yield torch.zeros((*token, row_bytes), dtype=torch.uint8, device=device)
            yield torch.zeros(token, dtype=torch.float16, device=device)
            yield torch.zeros(token, dtype=torch.uint8, device=device)

        return cls(*one(), *one(), bits)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors, in the order the ops take them."""
        return tuple(getattr(self, name) for name in CACHE)

    @property
    def num_pages(self) -> int:
        return self.k_codes.shape[0]

    @property
    def page_size(self) -> int:
        return self.k_codes.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    pages: KVPages,
    rotate: bool = False,
    matrix: Tensor | None = None,
    clip: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """q, rotated; k and v go to `pages`. The contract is this module's docstring."""
    return KV_APPEND(
        q, k, v, cos, sin, slot, *pages.tensors, matrix, rotate, pages.bits, clip, backend=backend
    )
