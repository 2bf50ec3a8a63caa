"""hadamard: x (I (x) R (x) I_inner), a rotation of every row, full or block-diagonal.

    y[..., a, j, i] = sum_k x[..., a, k, i] R[k, j]     x, y viewed as [..., A, order, inner]

R = H / sqrt(order), H = lowbit.hadamard.hadamard_matrix(order), or `matrix` as it is given. fp32
arithmetic (fp64 for fp64 x): H is applied factor by factor, the product is multiplied once by
1 / sqrt(order), and narrowed once to x's dtype, where a value out of range becomes inf.

    x       [..., K]        fp64, fp32, fp16 or bf16, K = A * order * inner
    y       [..., K]        x's dtype
    order   >= 1            an order that lowbit.hadamard builds, or any with a matrix
    inner   >= 1            distance between the elements of x that R mixes
    matrix  [order, order]  floating point, orthogonal if y is to keep x's norm
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.hadamard import factorize, hadamard_matrix
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.quantize import TRITON_MAX_ROW, check_float, compute_dtype
from lowbit.ops.rows import rows_times

# Factors are split and merged towards this order: up to it, a dense product costs less than the
# passes over memory that it saves.
_DENSE_ORDER = 128


def check_rotation(op: str, x: Tensor, order: int, inner: int, matrix: Tensor | None):
    """The checks every op that rotates rows shares."""
    if order < 1 or inner < 1 or x.shape[-1] % (order * inner):
        raise ValueError(
            f"{op}: order * inner must divide the row length {x.shape[-1]}, "
            f"got order {order} and inner {inner}"
        )
    if matrix is None:
        factorize(order)  # raises HadamardOrderError
    elif tuple(matrix.shape) != (order, order) or not matrix.is_floating_point():
        raise ValueError(
            f"{op}: matrix must be floating point [{order}, {order}], "
            f"got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )


def _check(x: Tensor, order: int, inner: int, matrix: Tensor | None):
    check_float("hadamard", "x", x)
    check_rotation("hadamard", x, order, inner, matrix)


@lru_cache(maxsize=32)
def _dense_factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Matrices whose Kronecker product, in order, is H: those of factorize(order), a large power
    of two split evenly and small neighbours multiplied out. Read-only: shared between calls."""
    *orders, last = factorize(order)
    log2 = last.bit_length() - 1
    if last == 1 << log2:
        parts = max(1, math.ceil(log2 / math.log2(_DENSE_ORDER)))
        orders += [1 << (log2 + i) // parts for i in range(parts)]
    else:
        orders.append(last)
    matrices = []
    for h in map(hadamard_matrix, orders):
        if matrices and len(matrices[-1]) * len(h) <= _DENSE_ORDER:
            matrices[-1] = torch.kron(matrices[-1], h)
        else:
            matrices.append(h)
    with torch.inference_mode(False):
        return tuple(h.to(device, dtype, copy=True) for h in matrices)


def _apply(x: Tensor, matrix: Tensor, inner: int) -> Tensor:
    """x (I (x) matrix (x) I_inner), x of any shape with order * inner dividing its last dim."""
    if inner == 1:
        return rows_times(x.reshape(-1, len(matrix)), matrix).view(x.shape)
    return (matrix.T @ x.reshape(-1, len(matrix), inner)).view(x.shape)


def _reference(x: Tensor, order: int, inner: int, matrix: Tensor | None) -> Tensor:
    y = x.to(compute_dtype(x))
    if matrix is not None:
        return _apply(y, matrix.to(y.dtype), inner).to(x.dtype)
    for h in reversed(_dense_factors(order, y.dtype, y.device)):
        y = _apply(y, h, inner)
        inner *= len(h)
    return y.mul_(1 / math.sqrt(order)).to(x.dtype)


def _fake(x: Tensor, order: int, inner: int, matrix: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def split_order(order: int, matrix: Tensor | None) -> tuple[int, int]:
    """(base, power of two) of an order: all base orders as one dense factor, or the matrix."""
    if matrix is not None:
        return order, 1
    last = factorize(order)[-1]
    power = last if last & (last - 1) == 0 else 1
    return order // power, power


def why_not_rotated_by_triton(
    x: Tensor, order: int, matrix: Tensor | None, elements: int
) -> str | None:
    """What every Triton kernel that rotates leaves out. `elements`: that one program holds, where
    the order counts as 1."""
    if x.dtype == torch.float64:
        return "it computes in fp32, x is fp64"
    base, power = split_order(order, matrix)
    if base == 1 and matrix is not None:
        return "its matrix must be at least 2 x 2"
    padded = (1 << (base - 1).bit_length()) * power * elements
    if padded > TRITON_MAX_ROW:
        return f"it rotates at most {TRITON_MAX_ROW} elements at once, here {padded} with padding"
    return why_not_triton(x, matrix)


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    x, order, _, matrix = args
    return why_not_rotated_by_triton(x, order, matrix, 1)


def _why_not_cuda(*_args) -> str:
    return "no CUDA kernel for hadamard yet"


HADAMARD = Op(
    name="hadamard",
    check=_check,
    reference=_reference,
    fake=_fake,
    backends={
        "cuda": Backend(_why_not_cuda),
        "triton": Backend(_why_not_triton, "lowbit.kernels.hadamard:hadamard"),
    },
)


def hadamard(
    x: Tensor,
    order: int | None = None,
    inner: int = 1,
    matrix: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x rotated; order None: the whole row. The contract is this module's docstring."""
    order = x.shape[-1] // inner if order is None else order
    return HADAMARD(x, order, inner, matrix, backend=backend)
