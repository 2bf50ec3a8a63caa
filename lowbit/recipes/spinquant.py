"""SpinQuant: QuaRot's slots, those that are fused learned.

Liu et al. 2024, arXiv 2405.16406; written from the paper. R1 (residual) and R2 (values, one for
each block) are learned, R3 (q and k) and R4 (MLP hidden) are online Hadamard matrices; `-no-had`
leaves those out. The o_proj input is not rotated across heads: the authors' code quantizes it in
groups of head_dim, here it has one scale a token like every other. Activations are asymmetric in
the paper, so that its rows run as w4a4kv4-aasym (lowbit/evaluate/published_rows.py), and nothing is
clipped. The clips here are QuaRot's: better for both kinds of activations (docs/notes/0008).
"""

from lowbit.recipes.quarot import CLIPS
from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTQ, RTN
from lowbit.training import Training
from lowbit.transforms import FoldNorms, LearnRotation, Rotate

LEARNED = (FoldNorms(), LearnRotation("residual"), LearnRotation("value", per_block=True))
ONLINE = (Rotate("mlp_hidden"), Rotate("query_key"))

SPINQUANT = Recipe(
    name="spinquant",
    summary="rotations learned end to end, GPTQ weights",
    source="Liu et al. 2024, arXiv 2405.16406",
    rounding=GPTQ(),
    transforms=LEARNED + ONLINE,
    training=Training(),
    reproduces=(("000", "SpinQuant", "GPTQ"), ("001", "SpinQuant"), ("002", "SpinQuant")),
    **CLIPS,
)

SPINQUANT_RTN = Recipe(
    name="spinquant-rtn",
    summary="rotations learned end to end, weights rounded to nearest",
    source="Liu et al. 2024, arXiv 2405.16406 (its starred rows)",
    rounding=RTN(clip="weight"),
    transforms=LEARNED + ONLINE,
    training=Training(weights="weight"),
    reproduces=(("000", "SpinQuant", "RTN"), ("001", "SpinQuant*"), ("002", "SpinQuant*")),
    **CLIPS,
)

SPINQUANT_NO_HAD = Recipe(
    name="spinquant-no-had",
    summary="SpinQuant without what runs online",
    source="Liu et al. 2024, arXiv 2405.16406, section 3.2",
    rounding=GPTQ(),
    transforms=LEARNED,
    training=Training(),
    **CLIPS,
)
