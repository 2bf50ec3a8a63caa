"""GPTQ and its siblings: round column by column, each column's error pushed onto the rest.

GPTQ, Frantar et al. 2023 (arXiv 2210.17323), section 3.3, Algorithm 1:

    minimize tr((W - Q) H (W - Q)^T),  H = (2 / n) sum x x^T over the n calibration tokens
    U = upper Cholesky factor of H^-1
    for each column j:  q_j = round(w_j);  W[:, j+1:] -= (w_j - q_j) / U[j, j] * U[j, j+1:]

GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (Zhang et al. 2025, arXiv 2505.11695) want the
outputs W x_full of the full-precision model, from the inputs x that the quantized one has. With the
drift D = (2 / n) sum (x_full - x) x^T the objective is

    minimize tr((Q - W) H (Q - W)^T) - 2 tr((Q - W) D^T W^T)

whose solution without a grid is W + W D H^-1 = W + W D U^T U. Both sweep like GPTQ, from another W:

    GPTAQ    W + alpha W triu(D U^T, 1) U      a column's drift is borne by the columns after it
    Qronos   W + W D H^-1                      the first column is rounded as if the others stood
                                               still at W: from w_0 + (W D)_0 / H[0, 0]

(derived here from the objective; the papers say the same updates in other words). Damp, which is
added to the diagonal of H, holds Q near W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import IntFormat, PackedTensor
from lowbit.rounding.grid import WeightGrid, check_clip, weight_grid
from lowbit.rounding.rtn import RTN, packed_weight
from lowbit.rounding.statistics import Statistics

COLUMN_BLOCK = 128  # columns swept before their errors reach the rest of the matrix
LARGEST_DAMP = 1.0
POWER_STEPS = 30


@dataclass(frozen=True)
class GPTQ:
    """The options of the published tables.

    act_order         columns by descending diag(H)
    static_groups     every grid is fixed on the original weights; else a group's when the sweep
                      gets there, which act_order would make a permutation of K: refused
    true_sequential   within a block too, a linear's inputs come from those before it as rounded
    quantized_inputs  x is quantized as the format says before it enters H
    damp              share of mean(diag(H)) added to it
    clip              how grids are clipped: lowbit/rounding/grid.py
    """

    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    quantized_inputs: bool = False
    damp: float = 0.01
    clip: str = "weight"
    streams = ("rounded",)

    def __post_init__(self):
        if self.act_order and not self.static_groups:
            raise InputError(
                "act_order needs static_groups: groups would be scattered over K, which no kernel "
                "reads; got act_order=True, static_groups=False"
            )
        check_clip(self.clip)
        if not 0 < self.damp <= LARGEST_DAMP:
            raise InputError(f"damp must be in (0, {LARGEST_DAMP}], got {self.damp}")

    def round(
        self,
        weight: Tensor,
        format: IntFormat,
        statistics: Statistics,
        grid: WeightGrid | None = None,
    ) -> tuple[PackedTensor, dict]:
        """weight [N, K] fp32, a grid for it that is known already -> the packed weight and what
        happened.

        Not positive definite (the usual remedies, in order): fp64, then damp x 10 up to 1, then
        RTN for these weights. The report says which damp was used, None for RTN.
        """
        if format.two_level and not self.static_groups and grid is None:
            raise InputError("two-level scales need static_groups: their rows share a scale")
        hessian = statistics.hessian
        dead = hessian.diagonal() == 0  # inputs never seen: their weights do not matter
        diagonal = hessian.diagonal().masked_fill(dead, 1.0)
        weight = weight.masked_fill(dead, 0.0)

        order = torch.arange(weight.shape[1], device=weight.device)
        if self.act_order:
            order = diagonal.argsort(descending=True, stable=True)
        upper, damp = self._inverse_factor(hessian[order][:, order], diagonal[order])
        if upper is None:
            packed, _ = RTN(self.clip).round(weight, format, statistics, grid)
            return packed, {"damp": None}

        left, first = self._start(weight, upper, statistics, order)
        if grid is None and self.static_groups:
            grid = weight_grid(weight, format, self.clip, hessian)
        if grid is None:
            grids = _GridsAsTheyCome(weight.shape, format, self.clip, hessian)
        else:
            grids = _StaticGrids(grid, order, format)
        codes = torch.empty_like(weight)
        codes[:, order] = _sweep(left, first, upper, grids, format)
        return packed_weight(codes, grids.grid, format), {"damp": damp}

    def _start(
        self, weight: Tensor, upper: Tensor, statistics: Statistics, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the sweep begins with, columns in its order: W [N, K], and the numbers [N] that the
        codes of its first column are of."""
        left = weight[:, order]
        return left, left[:, 0]

    def _damp_of(self, hessian: Tensor) -> Tensor:
        """What damp is a share of, a scalar."""
        return hessian.diagonal().mean()

    def _inverse_factor(
        self, hessian: Tensor, diagonal: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """Upper Cholesky factor of the damped inverse, fp32, and the damp it took.

        `diagonal` replaces that of `hessian`, which is overwritten.
        """
        hessian.diagonal().copy_(diagonal)
        damp, whole = self.damp, self._damp_of(hessian)
        while damp <= LARGEST_DAMP:
            hessian.diagonal().copy_(diagonal + damp * whole)
            for dtype in (torch.float32, torch.float64):
                upper = _inverse_cholesky(hessian.to(dtype))
                if upper is not None:
                    return upper.float(), damp
            damp *= 10
        return None, None


@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """alpha: share of the drift that is made up for; the authors' code takes 0.25."""

    quantized_inputs: bool = True
    alpha: float = 0.25
    streams = ("rounded", "full")

    def _start(self, weight, upper, statistics, order):
        left, drift = weight[:, order], statistics.drift[order][:, order]
        left = left + self.alpha * (left @ (drift @ upper.T).triu_(1)) @ upper
        return left, left[:, 0]


@dataclass(frozen=True)
class Qronos(GPTQ):
    """damp: share of H's largest eigenvalue, which is far more than the mean of its diagonal where
    few directions have most of the inputs' power. The authors' settings have 1e-3 for 4-bit inputs,
    1e-6 for weights alone (Brevitas, qronos_alpha)."""

    quantized_inputs: bool = True
    damp: float = 1e-3
    streams = ("rounded", "full")

    def _damp_of(self, hessian):
        return _largest_eigenvalue(hessian)

    def _start(self, weight, upper, statistics, order):
        original = weight[:, order]
        moved = original @ statistics.drift[order][:, order]
        left = original + (moved @ upper.T) @ upper
        unit = torch.eye(len(order), 1, device=upper.device)
        # H = (U^T U)^-1, so that H[0, 0] = |U^-T e_0|^2
        corner = torch.linalg.solve_triangular(upper.T, unit, upper=False).square().sum()
        return left, original[:, 0] + moved[:, 0] / corner


class _StaticGrids:
    """All known before the sweep, in whatever order its columns come."""

    def __init__(self, grid: WeightGrid, order: Tensor, format: IntFormat):
        self.grid = grid
        group = order // (format.group_size or len(order))
        self.step = grid.step.T[group]  # [K, N]: of each swept column
        self.zero = None if grid.zero_point is None else grid.zero_point.T[group].float()

    def of(self, j: int, left: Tensor) -> tuple[Tensor, Tensor | float]:
        """(step, zero point) of column j; `left` [K, N] are the weights at this time."""
        return self.step[j], 0.0 if self.zero is None else self.zero[j]


class _GridsAsTheyCome:
    """A group's grid is that of its weights when the sweep gets there."""

    def __init__(self, shape: torch.Size, format: IntFormat, clip: str, hessian: Tensor):
        self.format, self.clip, self.hessian = format, clip, hessian
        self.size = format.group_size or shape[1]
        self.parts: list[WeightGrid] = []

    def of(self, j: int, left: Tensor) -> tuple[Tensor, Tensor | float]:
        if j % self.size == 0:
            columns = slice(j, j + self.size)
            part = weight_grid(
                left[columns].T.contiguous(), self.format, self.clip, self.hessian[columns, columns]
            )
            self.parts.append(part)
        part = self.parts[-1]
        return part.step[:, 0], 0.0 if part.zero_point is None else part.zero_point[:, 0].float()

    @property
    def grid(self) -> WeightGrid:
        zeros = [part.zero_point for part in self.parts]
        return WeightGrid(
            torch.cat([part.scale for part in self.parts], 1),
            None if zeros[0] is None else torch.cat(zeros, 1),
        )


def _largest_eigenvalue(hessian: Tensor) -> Tensor:
    """Of a positive semidefinite matrix, by power iteration; from below, within a few percent."""
    vector = hessian.diagonal() / hessian.diagonal().norm()
    for _ in range(POWER_STEPS):
        vector = hessian @ vector
        largest = vector.norm()
        vector = vector / largest
    return largest


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
    weight: Tensor,
    first: Tensor,
    upper: Tensor,
    grids: _StaticGrids | _GridsAsTheyCome,
    format: IntFormat,
) -> Tensor:
    """Codes [N, K] as fp32 of weight's columns, the codes of the first being of `first`.

    The sweep works on the transposes, where a column lies in one piece.
    """
    left = weight.T.contiguous()  # [K, N], what is left to round
    codes = torch.empty_like(left)
    diagonal = upper.diagonal().tolist()
    for start in range(0, left.shape[0], COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, left.shape[0])
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            step, zero = grids.of(j, left)
            code = torch.div(left[j] if j else first, step).round_().add_(zero)
            code.clamp_(format.qmin, format.qmax)
            error = errors[j - start]
            torch.sub(left[j], code.sub(zero).mul_(step), out=error).div_(diagonal[j])
            left[j:stop].addr_(upper[j, j:stop], error, alpha=-1)
            codes[j] = code
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T
