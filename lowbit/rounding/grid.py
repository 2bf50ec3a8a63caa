"""The weight grid: scales of a weight matrix, optionally clipped to the least error."""

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats import GROUP_SCALE_MAX, MIN_SCALE, IntFormat
from lowbit.ops.quantize import grid_of

# GPTQ's clip search (IST-DASLab, "mse"): 1, 0.99 .. 0.21 of the range, error norm |e|^2.4.
SHRINK_STEPS = tuple(1 - i / 100 for i in range(80))
ERROR_NORM = 2.4
ROWS_AT_ONCE = 256  # rows searched together: their candidates stay in cache


class WeightGrid(NamedTuple):
    """Scales as a PackedTensor stores them: scale, zero_point [N, G] and channel_scale [N, 1]."""

    scale: Tensor
    zero_point: Tensor | None = None
    channel_scale: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """fp32 [N, G]: what a weight is divided by."""
        step = self.scale.float()
        return step if self.channel_scale is None else step * self.channel_scale


def weight_grid(weight: Tensor, format: IntFormat, clip_search: bool = False) -> WeightGrid:
    """The grid of weight [N, K] fp32.

    With clip_search each group takes the shrunk range of least sum |w - dequantized w|^2.4, the
    widest of equals. Two-level scales start as fp32 ones, clipped like any other.
    """
    scale_dtype = torch.float32 if format.two_level else format.weight_scale_dtype
    if not clip_search:
        scale, zero_point = grid_of(weight, format, 1.0, scale_dtype)
    else:
        parts = [_search(rows, format, scale_dtype) for rows in weight.split(ROWS_AT_ONCE)]
        scale = torch.cat([scale for scale, _ in parts])
        zero_point = None if format.symmetric else torch.cat([zero for _, zero in parts])
    return two_levels(scale) if format.two_level else WeightGrid(scale, zero_point)


def two_levels(scale: Tensor) -> WeightGrid:
    """The two-level scales nearest to fp32 scales [N, G]; a row's largest becomes 15 steps."""
    largest = scale.amax(1, keepdim=True)
    levels = torch.full_like(largest, GROUP_SCALE_MAX)  # a tensor: IEEE division on CUDA too
    channel_scale = (largest / levels).clamp(min=MIN_SCALE)
    group_scale = torch.round(scale / channel_scale).clamp(1, GROUP_SCALE_MAX).nan_to_num(1)
    return WeightGrid(group_scale.to(torch.uint8), None, channel_scale)


def _search(
    weight: Tensor, format: IntFormat, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    best_scale, best_zero = grid_of(weight, format, 1.0, scale_dtype)
    best_error = torch.full_like(best_scale, torch.inf, dtype=torch.float32)
    for clip in SHRINK_STEPS:
        scale, zero = grid_of(weight, format, clip, scale_dtype)
        error = (on_grid(weight, scale, zero, format) - weight).abs_()
        error = error.log_().mul_(ERROR_NORM).exp_()  # three times as fast as pow on a CPU
        error = error.unflatten(-1, (scale.shape[-1], -1)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def codes_on_grid(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, format: IntFormat
) -> Tensor:
    """Nearest codes, as fp32 [N, K], of weights on a given grid; scale [N, G] divides the row."""
    groups = weight.unflatten(-1, (scale.shape[-1], -1))
    codes = torch.round(groups / scale.float().unsqueeze(-1))
    if zero_point is not None:
        codes += zero_point.float().unsqueeze(-1)
    return codes.clamp_(format.qmin, format.qmax).flatten(-2)


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, format: IntFormat) -> Tensor:
    """Weights rounded to a given grid, dequantized, fp32 [N, K]."""
    codes = codes_on_grid(weight, scale, zero_point, format).unflatten(-1, (scale.shape[-1], -1))
    if zero_point is not None:
        codes = codes - zero_point.float().unsqueeze(-1)
    return (codes * scale.float().unsqueeze(-1)).flatten(-2)
