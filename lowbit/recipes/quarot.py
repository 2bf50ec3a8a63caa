"""QuaRot: norms folded, Hadamard rotations fused where they can be, online where they cannot.

Ashkboos et al. 2024, arXiv 2404.00456. The paper's clip ratios are for 4 bits; at 8 bits they
only lose range, so 8-bit activations and KV keep all of it.
"""

from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTQ, RTN
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
    rounder=GPTQ(),
    transforms=ROTATIONS,
    **CLIPS,
)

QUAROT_RTN = Recipe(
    name="quarot-rtn",
    summary="Hadamard rotations, weights rounded to nearest with clip search",
    source="arXiv 2404.00456 (the RTN rows)",
    rounder=RTN(clip_search=True),
    transforms=ROTATIONS,
    **CLIPS,
)
