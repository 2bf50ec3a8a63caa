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

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import MIN_SCALE, IntFormat, PackedTensor
from lowbit.rounding.grid import WeightGrid, codes_on_grid, on_grid, weight_grid
from lowbit.rounding.rtn import packed_weight
from lowbit.rounding.statistics import Statistics

ROWS_AT_ONCE = 256
SMALLEST = 1e-8  # below this |x|^(p - 1) is not computed


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
        if format.two_level:
            raise InputError("HQQ fits each group's scale: two-level scales share one, take RTN")
        parts = [self._grid(rows, format) for rows in weight.split(ROWS_AT_ONCE)]
        zero_point = None if format.symmetric else torch.cat([p.zero_point for p in parts])
        grid = WeightGrid(torch.cat([p.scale for p in parts]), zero_point)
        codes = codes_on_grid(weight, grid.step, grid.zero_point, format)
        return packed_weight(codes, grid, format), {}

    def _grid(self, weight: Tensor, format: IntFormat) -> WeightGrid:
        grid = best = weight_grid(weight, format)
        least = self._error(weight, grid, format)
        for solve in (_zero, _scale) if not format.symmetric else (_scale,):
            beta, current = self.beta, best
            for _ in range(self.iterations):
                error = weight - on_grid(weight, current.step, current.zero_point, format)
                kept = weight - self._shrink(error, beta)
                current = solve(weight, kept, current, format)
                error = self._error(weight, current, format)
                better = error < least
                least = torch.where(better, error, least)
                best = WeightGrid(
                    *(
                        None if old is None else torch.where(better, new, old)
                        for new, old in zip(current[:2], best[:2], strict=True)
                    )
                )
                beta *= self.growth
        return best

    def _shrink(self, x: Tensor, beta: float) -> Tensor:
        size = x.abs()
        return x.sign() * (size - size.clamp(min=SMALLEST) ** (self.p - 1) / beta).clamp(min=0)

    def _error(self, weight: Tensor, grid: WeightGrid, format: IntFormat) -> Tensor:
        """[N, G]: sum over a group of |error|^p."""
        error = (weight - on_grid(weight, grid.step, grid.zero_point, format)).abs()
        return (error**self.p).unflatten(-1, (grid.scale.shape[-1], -1)).sum(-1)


def _groups(t: Tensor, grid: WeightGrid) -> Tensor:
    return t.unflatten(-1, (grid.scale.shape[-1], -1))


def _zero(weight: Tensor, kept: Tensor, grid: WeightGrid, format: IntFormat) -> WeightGrid:
    codes = codes_on_grid(weight, grid.step, grid.zero_point, format)
    zero = _groups(codes, grid) - _groups(kept, grid) / grid.step.unsqueeze(-1)
    zero = zero.mean(-1).round().clamp(0, format.qmax)
    return WeightGrid(grid.scale, zero.nan_to_num(0).to(torch.uint8))


def _scale(weight: Tensor, kept: Tensor, grid: WeightGrid, format: IntFormat) -> WeightGrid:
    codes = _groups(codes_on_grid(weight, grid.step, grid.zero_point, format), grid)
    if grid.zero_point is not None:
        codes = codes - grid.zero_point.float().unsqueeze(-1)
    power = codes.square().sum(-1)
    scale = (codes * _groups(kept, grid)).sum(-1) / power
    largest = torch.finfo(grid.scale.dtype).max
    scale = torch.where(power > 0, scale, grid.step).clamp(MIN_SCALE, largest)
    return WeightGrid(scale.to(grid.scale.dtype), grid.zero_point)
