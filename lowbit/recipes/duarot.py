"""DuaRot: SpinQuant with a local factor in what is fused, and learned rotations online.

ICLR 2025 submission, no code; as its reviews and tables describe it. R1 and R2 are a full rotation
times a block-diagonal one in blocks of 64; R3 (q and k) is dense and R4 (MLP hidden) a Kronecker
product, learned and shared by all layers, where a Hadamard matrix would cost a GPU as much. That is
measured on CUDA (lowbit/transforms/cost.py), else as the paper found. The paper leaves activations'
symmetry and clips to SpinQuant, whose choices these are.
"""

from lowbit.recipes.quarot import CLIPS
from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTQ, RTN
from lowbit.training import Training
from lowbit.transforms import FoldNorms, LearnRotation

LOCAL = 64
ROTATIONS = (
    FoldNorms(),
    LearnRotation("residual", local=LOCAL),
    LearnRotation("value", per_block=True, local=LOCAL),
    LearnRotation("mlp_hidden"),
    LearnRotation("query_key"),
)

DUAROT = Recipe(
    name="duarot",
    summary="global and local rotations learned end to end, online ones too; GPTQ weights",
    source="DuaRot, ICLR 2025 submission",
    rounding=GPTQ(),
    transforms=ROTATIONS,
    training=Training(),
    reproduces=(("000", "DuaRot", "GPTQ"),),
    **CLIPS,
)

DUAROT_RTN = Recipe(
    name="duarot-rtn",
    summary="global and local rotations learned end to end, online ones too; rounded to nearest",
    source="DuaRot, ICLR 2025 submission (its RTN rows)",
    rounding=RTN(clip="weight"),
    transforms=ROTATIONS,
    training=Training(weights="weight"),
    reproduces=(("000", "DuaRot", "RTN"),),
    **CLIPS,
)
