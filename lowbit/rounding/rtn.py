"""RTN: round every weight to the nearest point of its grid."""

from dataclasses import dataclass

from torch import Tensor

from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops.pack import to_layout
from lowbit.rounding.grid import WeightGrid, check_clip, codes_on_grid, weight_grid
from lowbit.rounding.statistics import Statistics


def packed_weight(codes: Tensor, grid: WeightGrid, format: IntFormat) -> PackedTensor:
    """The canonical PackedTensor of integer-valued codes [N, K] of any dtype."""
    codes = codes.to(format.code_dtype)
    scale, zero_point, channel_scale = grid
    t = PackedTensor(codes, scale, zero_point, format, Layout.BYTES, codes.shape, channel_scale)
    return to_layout(t, Layout.ROW_MAJOR)


@dataclass(frozen=True)
class RTN:
    """clip: how grids are clipped, see lowbit/rounding/grid.py."""

    clip: str = "none"
    true_sequential = False
    quantized_inputs = False

    def __post_init__(self):
        check_clip(self.clip)

    @property
    def streams(self) -> tuple[str, ...]:
        return ("full",) if self.clip.startswith("output") else ()

    def round(
        self,
        weight: Tensor,
        format: IntFormat,
        statistics: Statistics | None = None,
        grid: WeightGrid | None = None,
    ) -> tuple[PackedTensor, dict]:
        """weight [N, K] fp32, a grid for it that is known already -> the packed weight and an empty
        report."""
        if grid is None:
            hessian = None if statistics is None else statistics.hessian
            grid = weight_grid(weight, format, self.clip, hessian)
        codes = codes_on_grid(weight, grid.step, grid.zero_point, format)
        return packed_weight(codes, grid, format), {}
