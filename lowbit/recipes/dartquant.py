"""DartQuant: SpinQuant's slots, fitted to the distribution of activations in minutes.

Yuan et al. 2025, arXiv 2511.04063; written from the paper. QuaRot's rotation across heads is kept.
"""

from lowbit.distribution import Distribution
from lowbit.recipes.quarot import CLIPS
from lowbit.recipes.recipe import Recipe
from lowbit.rounding import GPTQ
from lowbit.transforms import FoldNorms, LearnRotation, Rotate

DARTQUANT = Recipe(
    name="dartquant",
    summary="rotations fitted to flat activations, GPTQ weights",
    source="Yuan et al. 2025, arXiv 2511.04063",
    rounding=GPTQ(),
    transforms=(
        FoldNorms(),
        LearnRotation("residual"),
        LearnRotation("value", per_block=True),
        Rotate("heads"),
        Rotate("mlp_hidden"),
        Rotate("query_key"),
    ),
    training=Distribution(),
    **CLIPS,
)
