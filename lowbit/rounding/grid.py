"""The weight grid: scales of a weight matrix, optionally clipped to the least error.

clip    what the ranges are shrunk for, of the widest among equals
"none"    nothing: each group has its whole range
"symmetric"  nothing, but both ends of an asymmetric range are at the largest magnitude: the grid
          of GPTQ's symmetric mode, 2^b - 1 steps around a zero in the middle
"weight"  the least sum |w - dequantized w|^2.4 of a group, 80 steps down to 0.21 of the range
          (IST-DASLab's GPTQ, "mse"). Weight MSE is not the loss: it can hurt an unrotated model
"output"  the least error of a group's share of the output over the calibration tokens, 10 steps
          down to 0.55 (AWQ, Lin et al. 2024, arXiv 2306.00978, its code's auto_clip), each end of a
          range by its own share
"output-symmetric"  as AWQ's code has it: both ends cut at that share of the largest magnitude,
          which costs an asymmetric grid of 2 bits most of what it is for
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import GROUP_SCALE_MAX, MIN_SCALE, IntFormat
from lowbit.ops.quantize import grid_of

CLIPS = ("none", "symmetric", "weight", "output", "output-symmetric")
WEIGHT_STEPS = tuple(1 - i / 100 for i in range(80))
OUTPUT_STEPS = tuple(1 - i / 20 for i in range(10))
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


def weight_grid(
    weight: Tensor, format: IntFormat, clip: str = "none", hessian: Tensor | None = None
) -> WeightGrid:
    """The grid of weight [N, K] fp32; hessian [K, K] of its inputs, for the clips of the output.

    Two-level scales start as fp32 ones, clipped like any other.
    """
    scale_dtype = torch.float32 if format.two_level else format.weight_scale_dtype
    if clip == "none":
        scale, zero_point = grid_of(weight, format, 1.0, scale_dtype)
    elif clip == "symmetric":
        groups = weight.unflatten(-1, (format.num_groups(weight.shape[-1]), -1))
        largest = groups.abs().amax(-1)
        if format.symmetric:
            return grid_of_ends(largest, format)
        found = grid_of_ends(torch.stack((-largest, largest), -1).flatten(-2), format)
        # -lo / scale is a tie, which the rounding of the scale would break either way
        middle = torch.full_like(found.zero_point, 1 << format.bits - 1)
        return found._replace(zero_point=middle)
    else:
        blocks = _diagonal_blocks(hessian, format) if clip != "weight" else None
        cut = clip == "output-symmetric"
        parts = [
            _search(rows, format, scale_dtype, blocks, cut) for rows in weight.split(ROWS_AT_ONCE)
        ]
        scale = torch.cat([scale for scale, _ in parts])
        zero_point = None if format.symmetric else torch.cat([zero for _, zero in parts])
    return two_levels(scale) if format.two_level else WeightGrid(scale, zero_point)


def clipped_share(weight: Tensor, format: IntFormat, clip: str) -> Tensor:
    """[N, G] of the whole ranges of weight [N, K] that a clip without a Hessian leaves."""
    return weight_grid(weight, format, clip).step / weight_grid(weight, format).step


def grid_of_ends(ends: Tensor, format: IntFormat) -> WeightGrid:
    """The grid of groups of which only the ends of their ranges are given, [N, G] or [N, 2 G]."""
    if format.group_size is not None:
        format = replace(format, group_size=1 if format.symmetric else 2)
    return weight_grid(ends, format)


def check_clip(clip: str):
    if clip not in CLIPS:
        raise InputError(f"clip must be one of {CLIPS}, got {clip!r}")


def _diagonal_blocks(hessian: Tensor, format: IntFormat) -> Tensor:
    """[G, g, g]: what a group's inputs have to do with each other."""
    size = format.group_size or len(hessian)
    return (
        hessian.view(len(hessian) // size, size, -1, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )


def two_levels(scale: Tensor) -> WeightGrid:
    """The two-level scales nearest to fp32 scales [N, G]; a row's largest becomes 15 steps."""
    largest = scale.amax(1, keepdim=True)
    levels = torch.full_like(largest, GROUP_SCALE_MAX)  # a tensor: IEEE division on CUDA too
    channel_scale = (largest / levels).clamp(min=MIN_SCALE)
    group_scale = torch.round(scale / channel_scale).clamp(1, GROUP_SCALE_MAX).nan_to_num(1)
    return WeightGrid(group_scale.to(torch.uint8), None, channel_scale)


def _search(
    weight: Tensor, format: IntFormat, scale_dtype: torch.dtype, blocks: Tensor | None, cut: bool
) -> tuple[Tensor, Tensor | None]:
    groups = weight.unflatten(-1, (format.num_groups(weight.shape[-1]), -1))
    largest = groups.abs().amax(-1, keepdim=True)
    best_scale, best_zero = grid_of(weight, format, 1.0, scale_dtype)
    best_error = torch.full_like(best_scale, torch.inf, dtype=torch.float32)
    for clip in WEIGHT_STEPS if blocks is None else OUTPUT_STEPS:
        if cut:
            ends = clip * largest
            scale, zero = grid_of(groups.clamp(-ends, ends).flatten(-2), format, 1.0, scale_dtype)
        else:
            scale, zero = grid_of(weight, format, clip, scale_dtype)
        error = (on_grid(weight, scale, zero, format) - weight).unflatten(-1, (scale.shape[-1], -1))
        if blocks is None:  # exp(log): three times as fast as pow on a CPU
            error = error.abs_().log_().mul_(ERROR_NORM).exp_().sum(-1)
        else:
            by_group = error.transpose(0, 1)  # [G, N, g]
            error = ((by_group @ blocks) * by_group).sum(-1).T
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


def fake_quantize(x: Tensor, format: IntFormat, clip: float = 1.0) -> Tensor:
    """x [..., K] as the quantize op and back, in fp32: what a dynamic quantizer makes of it."""
    scale, zero_point = grid_of(x, format, clip, torch.float32)
    return on_grid(x, scale, zero_point, format)
