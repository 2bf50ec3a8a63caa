"""The weight grid: scales of a weight matrix, optionally clipped to the least error."""

import torch
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.ops.quantize import grid_of

# GPTQ's clip search (IST-DASLab, "mse"): 1, 0.99 .. 0.21 of the range, error norm |e|^2.4.
SHRINK_STEPS = tuple(1 - i / 100 for i in range(80))
ERROR_NORM = 2.4
ROWS_AT_ONCE = 256  # rows searched together: their candidates stay in cache


def weight_grid(
    weight: Tensor, format: IntFormat, clip_search: bool = False
) -> tuple[Tensor, Tensor | None]:
    """scale [N, G] in its stored dtype and zero_point [N, G] (None when symmetric).

    weight [N, K] fp32. With clip_search each group takes the shrunk range of least
    sum |w - dequantized w|^2.4, the widest of equals.
    """
    if not clip_search:
        return grid_of(weight, format, 1.0, format.weight_scale_dtype)
    parts = [_search(rows, format) for rows in weight.split(ROWS_AT_ONCE)]
    scale = torch.cat([scale for scale, _ in parts])
    return scale, None if format.symmetric else torch.cat([zero for _, zero in parts])


def _search(weight: Tensor, format: IntFormat) -> tuple[Tensor, Tensor | None]:
    best_scale, best_zero = grid_of(weight, format, 1.0, format.weight_scale_dtype)
    best_error = torch.full_like(best_scale, torch.inf, dtype=torch.float32)
    for clip in SHRINK_STEPS:
        scale, zero = grid_of(weight, format, clip, format.weight_scale_dtype)
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
