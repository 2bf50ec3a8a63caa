"""Methods that only round: no transform, nothing online."""

from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTAQ as GPTAQRounder
from lowbit.rounding import GPTQ as GPTQRounder
from lowbit.rounding import HQQ as HQQRounder
from lowbit.rounding import RTN as RTNRounder
from lowbit.rounding import Qronos as QronosRounder

RTN = Recipe(
    name="rtn",
    summary="round to nearest, the whole range of every channel or group",
    source="no transform, no calibration",
    rounding=RTNRounder(),
    reproduces=tuple((source, "RTN") for source in ("000", "001", "002", "003", "004")),
)

HQQ = Recipe(
    name="hqq",
    summary="grids fitted to a robust norm of the weights' error, no calibration",
    source="Badri and Shaji 2023, mobiusml.github.io/hqq_blog",
    rounding=HQQRounder(),
    reproduces=(("003", "HQQ"),),
)

GPTQ = Recipe(
    name="gptq",
    summary="GPTQ with act-order and clip search",
    source="Frantar et al. 2023, arXiv 2210.17323",
    rounding=GPTQRounder(),
    # GPTQ* is GPTQ after a Hessian that was not positive definite: the damp grows by itself here.
    reproduces=(
        *((source, "GPTQ") for source in ("000", "001", "002", "003", "004")),
        ("003", "GPTQ*"),
    ),
)

GPTAQ = Recipe(
    name="gptaq",
    summary="GPTQ towards the full-precision model's outputs",
    source="Li et al. 2025, arXiv 2504.02692",
    rounding=GPTAQRounder(),
)

QRONOS = Recipe(
    name="qronos",
    summary="GPTQ from the least-squares weights for the full-precision model's outputs",
    source="Zhang et al. 2025, arXiv 2505.11695",
    rounding=QronosRounder(),
)
