"""Products of rows whose bits do not depend on the rows beside them: what a sequence computes is
the same alone and in any batch."""

import torch.nn.functional as F
from torch import Tensor

# A BLAS sums otherwise in the rows that its tiles leave over. MKL: in 1 row of fp32 on Intel's
# processors; on AMD's in 1 to 3, in fp64 whenever their number is no multiple of 4, and then in
# what every thread has. Of this many nothing is left over, with 1 to 16 threads on AMD's; on
# Intel's that is known of one thread in fp32.
TILE_ROWS = 8


def rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., M, K] @ matrix [..., K, N]; a row has the same bits with any others, or none."""
    rows = x.shape[-2]
    short = -rows % TILE_ROWS
    if not short:
        return x @ matrix
    return (F.pad(x, (0, 0, 0, short)) @ matrix)[..., :rows, :]
