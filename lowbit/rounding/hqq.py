"""HQQ: grids without calibration, for a robust norm of the weights' error.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The error is
split into W - dequantized = E + rest, E taking what is large:

    E     = shrink(W - dequantized, beta)    the l_p shrinkage, p < 1: |x| - |x|^(p - 1) / beta
    zero  = mean over a group of (codes - (W - E) / scale)

and beta grows. HQQ's zero points are real numbers; here they are integers, as the kernels have
them. So the zero is rounded, and then the scale, which HQQ leaves, is solved for in the same way:

    scale = <W - E, codes - zero> / |codes - zero|^2

A group keeps the step of least sum |W - dequantized|^p, the grid of its whole range included.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import MIN_SCALE, IntFormat, PackedTensor
from lowbit.rounding.grid import WeightGrid, codes_on_grid, two_levels, weight_grid
from lowbit.rounding.rtn import packed_weight
from lowbit.rounding.statistics import Statistics

ROWS_AT_ONCE = 256
SMALLEST = 1e-8  # |x| below this counts as this much: its logarithm is taken


@dataclass(frozen=True)
class HQQ:
    """The settings of the authors' code; `iterations` each for zeros and for scales."""

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20
    clip = "none"
    streams = ()
    true_sequential = False
    quantized_inputs = False

    def __post_init__(self):
        if not 0 < self.p < 1:
            raise InputError(f"p must be in (0, 1), got {self.p}")

    def round(
        self, weight: Tensor, format: IntFormat, statistics: Statistics | None = None
    ) -> tuple[PackedTensor, dict]:
        """weight [N, K] fp32 -> the packed weight and an empty report."""
        fitted = replace(format, two_level=False)
        parts = [self._grid(rows, fitted) for rows in weight.split(ROWS_AT_ONCE)]
        zero_point = None if format.symmetric else torch.cat([p.zero_point for p in parts])
        grid = WeightGrid(torch.cat([p.scale for p in parts]), zero_point)
        if format.two_level:  # of the scales that were fitted, as if there were one level
            grid = two_levels(grid.scale.float())
        codes = codes_on_grid(weight, grid.step, grid.zero_point, format)
        return packed_weight(codes, grid, format), {}

    def _grid(self, weight: Tensor, format: IntFormat) -> WeightGrid:
        best = weight_grid(weight, format)
        least = torch.full_like(best.scale, torch.inf, dtype=torch.float32)
        for solve in (_scale,) if format.symmetric else (_zero, _scale):
            beta, grid = self.beta, best
            for _ in range(self.iterations + 1):  # the last grid is only looked at
                codes = _groups(codes_on_grid(weight, grid.step, grid.zero_point, format), grid)
                large, lost = self._split(weight, codes, grid, beta)
                better = lost < least
                least = torch.where(better, lost, least)
                best = _chosen(better, grid, best)
                grid = solve(_groups(weight, grid) - large, codes, grid, format)
                beta *= self.growth
        return best

    def _split(
        self, weight: Tensor, codes: Tensor, grid: WeightGrid, beta: float
    ) -> tuple[Tensor, Tensor]:
        """(E [N, G, g], sum over a group of |error|^p [N, G])."""
        error = _groups(weight, grid) - _centred(codes, grid) * grid.step.unsqueeze(-1)
        size = error.abs()
        log = size.clamp(min=SMALLEST).log_()
        lost = (log * self.p).exp_().sum(-1)
        shrunk = (size - log.mul_(self.p - 1).exp_().div_(beta)).clamp_(min=0)
        return shrunk.copysign_(error), lost


def _groups(t: Tensor, grid: WeightGrid) -> Tensor:
    return t.unflatten(-1, (grid.scale.shape[-1], -1))


def _centred(codes: Tensor, grid: WeightGrid) -> Tensor:
    """What the scale multiplies, [N, G, g]."""
    if grid.zero_point is None:
        return codes
    return codes - grid.zero_point.float().unsqueeze(-1)


def _chosen(better: Tensor, new: WeightGrid, old: WeightGrid) -> WeightGrid:
    zero = None
    if new.zero_point is not None:
        zero = torch.where(better, new.zero_point, old.zero_point)
    return WeightGrid(torch.where(better, new.scale, old.scale), zero)


def _zero(kept: Tensor, codes: Tensor, grid: WeightGrid, format: IntFormat) -> WeightGrid:
    zero = (codes - kept / grid.step.unsqueeze(-1)).mean(-1).round().clamp(0, format.qmax)
    return WeightGrid(grid.scale, zero.nan_to_num(0).to(torch.uint8))


def _scale(kept: Tensor, codes: Tensor, grid: WeightGrid, format: IntFormat) -> WeightGrid:
    centred = _centred(codes, grid)
    power = centred.square().sum(-1)
    scale = (centred * kept).sum(-1) / power
    largest = torch.finfo(grid.scale.dtype).max
    scale = torch.where(power > 0, scale, grid.step).clamp(MIN_SCALE, largest)
    return WeightGrid(scale.to(grid.scale.dtype), grid.zero_point)
