"""OmniQuant: clipping alone for weight-only formats, scales too where activations are quantized."""

from lowbit.recipes.recipe import Calibration, Recipe
from lowbit.recipes.scales import NORM_OUTPUTS, scaled
from lowbit.rounding import OmniQuant as OmniQuantRounder
from lowbit.transforms import Ones, Scale, SmoothQuant

SOURCE = "Shao et al. 2024, arXiv 2308.13137"

# 512 windows as in source 003. The paper, whose row source 001 gives, took 128; for 2 bits twice
# the epochs and the augmented loss.
OMNIQUANT = Recipe(
    name="omniquant",
    summary="ranges learned block by block",
    source=SOURCE,
    rounding=OmniQuantRounder(),
    calibration=Calibration(512, 2048),
    reproduces=(("001", "OmniQuant"), ("003", "OmniQuant")),
)

# The paper's settings; for w4a4 it starts from alpha 0.75 and learns scales at 1e-3.
OMNIQUANT_LET = Recipe(
    name="omniquant-let",
    summary="ranges and channel scales learned block by block, the scales from SmoothQuant's",
    source=SOURCE,
    rounding=OmniQuantRounder(learn_scales=True),
    transforms=(
        *scaled(SmoothQuant(alpha=0.5), *NORM_OUTPUTS, "value_channels"),
        Scale("query_key_channels", Ones()),
    ),
)
