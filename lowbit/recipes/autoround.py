"""AutoRound, as source 003 ran it: asymmetric weights, 512 windows of the Pile, batches of 8.

Where ranges were learned at a rate of their own, the name gives it; else at that of rounding, which
is 1 / steps.
"""

from lowbit.recipes.recipe import Calibration, Recipe
from lowbit.rounding import AutoRound


def _recipe(name: str, row: str, rounding: AutoRound) -> Recipe:
    inputs = "" if rounding.rounded_input else ", each block on full-precision inputs"
    return Recipe(
        name=name,
        summary=f"rounding and ranges learned block by block, {rounding.steps} steps{inputs}",
        source="Cheng et al. 2024, arXiv 2309.05516",
        rounding=rounding,
        calibration=Calibration(512, 2048),
        reproduces=(("003", row),),
    )


AUTOROUND = _recipe("autoround", "AutoRound", AutoRound())
AUTOROUND_1K = _recipe("autoround-1k", "AutoRound [iters=1K]", AutoRound(1000))
AUTOROUND_1K_RANGES = _recipe(
    "autoround-1k-minmax0.002",
    "AutoRound [iters=1K,minmax_lr=0.002]",
    AutoRound(1000, minmax_learning_rate=0.002),
)
AUTOROUND_1K_FULL = _recipe(
    "autoround-1k-full",
    "AutoRound [iters=1K,disable_quanted_input]",
    AutoRound(1000, rounded_input=False),
)
AUTOROUND_1K_FULL_RANGES = _recipe(
    "autoround-1k-full-minmax0.002",
    "AutoRound [iters=1K,disable_quanted_input, minmax_lr=0.002]",
    AutoRound(1000, rounded_input=False, minmax_learning_rate=0.002),
)
AUTOROUND_2K = _recipe(
    "autoround-2k-minmax0.001",
    "AutoRound [iters=2K,minmax_lr=0.001]",
    AutoRound(2000, minmax_learning_rate=0.001),
)
AUTOROUND_2K_SLOW_RANGES = _recipe(
    "autoround-2k-minmax0.0005",
    "AutoRound [iters=2K,minmax_lr=0.0005]",
    AutoRound(2000, minmax_learning_rate=0.0005),
)
AUTOROUND_4K = _recipe(
    "autoround-4k-minmax0.0005",
    "AutoRound [iters=4K,minmax_lr=0.0005]",
    AutoRound(4000, minmax_learning_rate=0.0005),
)
