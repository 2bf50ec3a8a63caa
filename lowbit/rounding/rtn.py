"""RTN: round every weight to the nearest point of its grid."""

from dataclasses import dataclass

from torch import Tensor

from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops.pack import to_layout
from lowbit.rounding.grid import WeightGrid, codes_on_grid, weight_grid


def packed_weight(codes: Tensor, grid: WeightGrid, format: IntFormat) -> PackedTensor:
    """The canonical PackedTensor of integer-valued codes [N, K] of any dtype."""
    codes = codes.to(format.code_dtype)
    scale, zero_point, channel_scale = grid
    t = PackedTensor(codes, scale, zero_point, format, Layout.BYTES, codes.shape, channel_scale)
    return to_layout(t, Layout.ROW_MAJOR)


@dataclass(frozen=True)
class RTN:
    """`clip_search` shrinks each range to the least |error|^2.4 (weight MSE is not the loss: it
    can hurt an unrotated model)."""

    clip_search: bool = False
    needs_hessian = False

    def round(
        self, weight: Tensor, format: IntFormat, hessian: Tensor | None = None
    ) -> tuple[PackedTensor, dict]:
        """weight [N, K] fp32 -> the packed weight and an empty report."""
        grid = weight_grid(weight, format, self.clip_search)
        codes = codes_on_grid(weight, grid.step, grid.zero_point, format)
        return packed_weight(codes, grid, format), {}
