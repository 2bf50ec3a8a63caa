"""GPTQ: round column by column, pushing each column's error onto those not yet rounded.

Frantar et al. 2023, section 3.3, Algorithm 1; options as in QuaRot's configuration.

    minimize tr((W - Q) H (W - Q)^T),  H = (2 / n) sum x x^T over the n calibration tokens
    U = upper Cholesky factor of H^-1
    for each column j:  q_j = round(w_j);  W[:, j+1:] -= (w_j - q_j) / U[j, j] * U[j, j+1:]

Every grid is fixed before the sweep, on the original weights: with act-order and groups these are
"static groups", so that the kernels need no permutation of K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import IntFormat, PackedTensor
from lowbit.rounding.grid import weight_grid
from lowbit.rounding.rtn import RTN, packed_weight

COLUMN_BLOCK = 128  # columns swept before their errors reach the rest of the matrix
LARGEST_DAMP = 1.0


@dataclass(frozen=True)
class GPTQ:
    """act_order: columns by descending diag(H). damp: share of mean(diag(H)) added to it."""

    act_order: bool = True
    clip_search: bool = True
    damp: float = 0.01
    needs_hessian = True

    def round(
        self, weight: Tensor, format: IntFormat, hessian: Tensor
    ) -> tuple[PackedTensor, dict]:
        """weight [N, K] fp32, hessian [K, K] fp32 -> the packed weight and what happened.

        Not positive definite (the usual remedies, in order): fp64, then damp x 10 up to 1, then
        RTN for these weights. The report says which damp was used, None for RTN.
        """
        dead = hessian.diagonal() == 0  # inputs never seen: their weights do not matter
        diagonal = hessian.diagonal().masked_fill(dead, 1.0)
        weight = weight.masked_fill(dead, 0.0)
        grid = weight_grid(weight, format, self.clip_search)

        order = torch.arange(weight.shape[1], device=weight.device)
        if self.act_order:
            order = diagonal.argsort(descending=True, stable=True)
        upper, damp = self._inverse_factor(hessian[order][:, order], diagonal[order])
        if upper is None:
            packed, _ = RTN(self.clip_search).round(weight, format)
            return packed, {"damp": None}

        group = order // (format.group_size or weight.shape[1])  # of each swept column
        column_step = grid.step[:, group]
        column_zero = None if grid.zero_point is None else grid.zero_point[:, group]
        codes = torch.empty_like(weight)
        codes[:, order] = _sweep(weight[:, order], upper, column_step, column_zero, format)
        return packed_weight(codes, grid, format), {"damp": damp}

    def _inverse_factor(
        self, hessian: Tensor, diagonal: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """Upper Cholesky factor of the damped inverse, fp32, and the damp it took.

        `diagonal` replaces that of `hessian`, which is overwritten.
        """
        damp = self.damp
        while damp <= LARGEST_DAMP:
            hessian.diagonal().copy_(diagonal + damp * diagonal.mean())
            for dtype in (torch.float32, torch.float64):
                upper = _inverse_cholesky(hessian.to(dtype))
                if upper is not None:
                    return upper.float(), damp
            damp *= 10
        return None, None


def _inverse_cholesky(hessian: Tensor) -> Tensor | None:
    """Upper Cholesky factor of hessian^-1; None where hessian is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower  # three matrices of this size at a time, the given one included
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not upper.isfinite().all() else upper


def _sweep(
    weight: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor | None, format: IntFormat
) -> Tensor:
    """Codes [N, K] as fp32; weight's columns in sweep order, scale and zero_point per column.

    The sweep works on the transposes, where a column lies in one piece.
    """
    left = weight.T.contiguous()  # [K, N], what is left to round
    step = scale.T.contiguous()
    zero = torch.zeros_like(step) if zero_point is None else zero_point.T.float()
    codes = torch.empty_like(left)
    diagonal = upper.diagonal().tolist()
    for start in range(0, left.shape[0], COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, left.shape[0])
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            code = torch.div(left[j], step[j]).round_().add_(zero[j])
            code.clamp_(format.qmin, format.qmax)
            error = errors[j - start]
            torch.sub(left[j], code.sub(zero[j]).mul_(step[j]), out=error).div_(diagonal[j])
            left[j:stop].addr_(upper[j, j:stop], error, alpha=-1)
            codes[j] = code
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T


def quadratic_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T), the GPTQ objective, for E = W - Q of shape [N, K]."""
    return ((error @ hessian) * error).sum(dtype=torch.float64).item()
