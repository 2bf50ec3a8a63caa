"""Weights on a grid whose ranges, and which way each is rounded, are learned by gradient.

    range    of a group, asymmetric  [low * min(w, 0), high * max(w, 0)],  symmetric  high * max|w|
    code     clamp(round(w / scale + offset) + zero_point, qmin, qmax)
    value    (code - zero_point) * scale

scale and zero_point come from the range as lowbit/rounding/grid.py says, in the dtypes they are
stored in: the values are bit for bit those that the packed weight will have. Rounding passes
gradients straight through (Bengio et al. 2013, arXiv 1308.3432): they are those of the same lines
without it, and zero for an offset whose code is clamped.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn, stack

from lowbit.formats import IntFormat
from lowbit.rounding.grid import WeightGrid, clipped_share, fake_quantize, grid_of_ends

FIRST_LOGIT = 4.0  # of a share that is learned: sigmoid(4) = 0.982, nearly the whole range


class Simulated(NamedTuple):
    """A weight [N, K]: its values, fp32 with gradients, and what they are packed from."""

    values: Tensor
    codes: Tensor  # fp32
    grid: WeightGrid


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """Forward `exact`, bit for bit where `smooth` is finite; backward the gradient of `smooth`."""
    if not smooth.requires_grad:
        return exact
    return exact.detach() + (smooth - smooth.detach())


class _Largest(torch.autograd.Function):
    """amax(-1) of x [..., g], whose gradient all values from `share` [...] of it on have in common.

    These are what a clipped quantizer makes the same of. Of a row whose values are nearly alike, as
    a rotation makes them of an outlier, the largest alone would have all of it, and moving that one
    lowers the range by no more than to the next. x times the gradient is the range still.
    """

    @staticmethod
    def forward(ctx, x: Tensor, share: Tensor) -> Tensor:
        largest = x.amax(-1)
        ctx.save_for_backward(x, largest, torch.minimum(largest, share * largest))
        return largest

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        x, largest, least = ctx.saved_tensors
        common = x >= least.unsqueeze(-1)
        total = (x * common).sum(-1)
        each = torch.where(total == 0, 0.0, gradient * largest / total)
        return common * each.unsqueeze(-1), None


def quantized_through(x: Tensor, format: IntFormat, clip: float) -> Tensor:
    """x as a dynamic quantizer makes it, with the gradient of x."""
    return straight_through(fake_quantize(x.detach(), format, clip), x)


def clipped_through(x: Tensor, format: IntFormat, clip: Tensor) -> Tensor:
    """x [..., K] as a dynamic quantizer makes it, with gradients of x and of the clip ratio []."""
    # a row for each group: scales of inputs are fp32, unlike those of groups of weights
    rows = x.reshape(-1, format.group_size or x.shape[-1])
    share = clip.expand(len(rows), 1)
    low = None if format.symmetric else share
    return simulate(rows, replace(format, group_size=None), share, low).values.view(x.shape)


def simulate(
    weight: Tensor,
    format: IntFormat,
    high: Tensor,
    low: Tensor | None = None,
    offset: Tensor | None = None,
) -> Simulated:
    """weight [N, K] fp32 on the grid of its shrunk ranges.

    high, low [N, G] are shares of a group's range, low only when asymmetric; offset [N, K] is
    added to a weight in steps of its scale. high = low = 1 and no offset is RTN.
    """
    groups = weight.unflatten(-1, (format.num_groups(weight.shape[1]), -1))  # [N, G, g]
    if format.symmetric:
        bottom, top = None, _Largest.apply(groups.abs(), high.detach()) * high
        ends, span = top, top
    else:
        bottom = -_Largest.apply(-groups, low.detach()).clamp(min=0) * low
        top = _Largest.apply(groups, high.detach()).clamp(min=0) * high
        ends, span = stack((bottom, top), -1).flatten(-2), top - bottom
    grid = grid_of_ends(ends.detach(), format)

    scale, channel_scale = span / format.qmax, grid.channel_scale
    if channel_scale is not None:
        scale = scale / channel_scale
    scale = straight_through(grid.scale.float(), scale)
    step = scale if channel_scale is None else scale * channel_scale
    codes = groups / step.unsqueeze(-1)
    if offset is not None:
        codes = codes + offset.view_as(groups)
    codes = straight_through(codes.detach().round(), codes)
    zero_point = 0.0
    if bottom is not None:
        zero_point = straight_through(grid.zero_point.float(), -bottom / step).unsqueeze(-1)
    codes = (codes + zero_point).clamp(format.qmin, format.qmax)  # and -0.0 becomes 0.0
    values = ((codes - zero_point) * scale.unsqueeze(-1)).flatten(-2)
    if channel_scale is not None:
        values = values * channel_scale
    return Simulated(values, codes.detach().flatten(-2), grid)


class Clipping(nn.Module):
    """Logits [N, G] of the shares of the ranges of a weight [N, K]."""

    def __init__(self, weight: Tensor, format: IntFormat):
        super().__init__()
        self.format = format
        groups = (len(weight), format.num_groups(weight.shape[1]))
        self.high = nn.Parameter(weight.new_full(groups, FIRST_LOGIT))
        self.low = None if format.symmetric else nn.Parameter(self.high.detach().clone())

    @torch.no_grad()
    def begin(self, weight: Tensor):
        """At the ranges of least weight error, where those are no wider than FIRST_LOGIT's."""
        share = clipped_share(weight, self.format, "weight")
        widest = torch.full_like(share, FIRST_LOGIT).sigmoid()
        logit = torch.minimum(share, widest).logit()
        for shares in (self.high, self.low):
            if shares is not None:
                shares.copy_(logit)

    def forward(self, weight: Tensor) -> Simulated:
        low = None if self.low is None else self.low.sigmoid()
        return simulate(weight, self.format, self.high.sigmoid(), low)

    def project(self):
        """Logits may be anything."""
