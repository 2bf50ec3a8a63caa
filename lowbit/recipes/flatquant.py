"""FlatQuant: learned invertible maps in front of every linear, with learned clips.

Sun et al. 2024, arXiv 2410.09426; written from the paper. A Kronecker map runs online before q, k
and v, before gate and up, and before down; one across heads before o; values have a map that is
fused. Norms are not folded. Channel scales begin as SmoothQuant's with alpha 0.3 and are fused.
Queries and keys share one rotation, a Hadamard matrix: the paper learns a map and its inverse,
which the op that fills the cache, with one matrix for both, does not run. Weights are rounded on
the ranges that were learned; rounding.clip="weight" searches new ones behind the maps, which at 3
bits in groups was better (docs/notes/0008-methods.md).
"""

from dataclasses import replace

from lowbit.flattening import Flattening
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.scales import NORM_OUTPUTS, scaled
from lowbit.rounding import GPTAQ, GPTQ, RTN
from lowbit.transforms import LearnMap, Rotate, SmoothQuant

SPACES = ("attention_input", "value", "heads", "mlp_input", "mlp_hidden")
TRANSFORMS = (
    *scaled(SmoothQuant(alpha=0.3), *NORM_OUTPUTS, "mlp_hidden"),
    *(LearnMap(space) for space in SPACES),
    Rotate("query_key"),
)

FLATQUANT = Recipe(
    name="flatquant",
    summary="learned maps in front of every linear and learned clips, GPTQ weights",
    source="Sun et al. 2024, arXiv 2410.09426",
    rounding=GPTQ(clip="none"),
    transforms=TRANSFORMS,
    flattening=Flattening(),
)

FLATQUANT_RTN = replace(
    FLATQUANT,
    name="flatquant-rtn",
    summary="learned maps in front of every linear and learned clips, rounded to nearest",
    rounding=RTN(),
)

FLATQUANT_GPTAQ = replace(
    FLATQUANT,
    name="flatquant-gptaq",
    summary="learned maps in front of every linear and learned clips, GPTAQ weights",
    source=f"{FLATQUANT.source}; Li et al. 2025, arXiv 2504.02692",
    rounding=GPTAQ(clip="none"),
)
