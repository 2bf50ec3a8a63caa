"""QuaRot: norms folded, Hadamard rotations fused where they can be, online where they cannot.

Ashkboos et al. 2024, arXiv 2404.00456. The paper's clip ratios are for 4 bits; at 8 bits they
only lose range, so 8-bit activations and KV keep all of it.
"""

from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTAQ, GPTQ, RTN, Qronos
from lowbit.transforms import FoldNorms, Rotate

ROTATIONS = (
    FoldNorms(),
    Rotate("residual", random_signs=True),
    Rotate("value"),
    Rotate("heads"),
    Rotate("mlp_hidden"),
    Rotate("query_key"),
)
CLIPS = {"activation_clip": {4: 0.9}, "kv_clip": {4: 0.95}}

QUAROT = Recipe(
    name="quarot",
    summary="Hadamard rotations, GPTQ weights",
    source="arXiv 2404.00456",
    rounding=GPTQ(),
    transforms=ROTATIONS,
    reproduces=(("000", "QuaRot", "GPTQ"), ("001", "QuaRot"), ("002", "QuaRot")),
    **CLIPS,
)

QUAROT_RTN = Recipe(
    name="quarot-rtn",
    summary="Hadamard rotations, weights rounded to nearest with clip search",
    source="arXiv 2404.00456 (the RTN rows)",
    rounding=RTN(clip="weight"),
    transforms=ROTATIONS,
    reproduces=(("000", "QuaRot", "RTN"), ("001", "QuaRot*"), ("002", "QuaRot*")),
    **CLIPS,
)

QUAROT_GPTAQ = Recipe(
    name="quarot-gptaq",
    summary="Hadamard rotations, GPTAQ weights",
    source="Li et al. 2025, arXiv 2504.02692 (its QuaRot rows)",
    rounding=GPTAQ(),
    transforms=ROTATIONS,
    **CLIPS,
)

QUAROT_QRONOS = Recipe(
    name="quarot-qronos",
    summary="Hadamard rotations, Qronos weights",
    source="Zhang et al. 2025, arXiv 2505.11695",
    rounding=Qronos(),
    transforms=ROTATIONS,
    **CLIPS,
)

# Source 004's tool rotates online for no model of its tables, and clips no activations.
QUAROT_OFFLINE = Recipe(
    name="quarot-offline",
    summary="the Hadamard rotations that need no kernel, weights rounded to nearest",
    source="arXiv 2404.00456, as in the small-model survey",
    rounding=RTN(),
    transforms=(FoldNorms(), Rotate("residual", random_signs=True), Rotate("value")),
    reproduces=(("004", "QuaRot"),),
)
