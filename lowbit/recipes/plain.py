"""Baselines without transforms."""

from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTQ as GPTQRounder
from lowbit.rounding import RTN as RTNRounder

RTN = Recipe(
    name="rtn",
    summary="round to nearest, the whole range of every channel",
    source="no transform, no calibration",
    rounder=RTNRounder(),
)

GPTQ = Recipe(
    name="gptq",
    summary="GPTQ with act-order and clip search",
    source="Frantar et al. 2023, arXiv 2210.17323",
    rounder=GPTQRounder(),
)
