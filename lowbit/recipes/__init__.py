"""The named methods."""

import difflib

from lowbit.errors import InputError
from lowbit.recipes import (
    autoround,
    dartquant,
    duarot,
    flatquant,
    omniquant,
    plain,
    quarot,
    scales,
    spinquant,
)
from lowbit.recipes.recipe import (
    Calibration,
    Recipe,
    overridden,
    overridden_where_known,
    settings_of,
)

MODULES = (plain, scales, autoround, omniquant, quarot, spinquant, duarot, dartquant, flatquant)
RECIPES = {
    recipe.name: recipe
    for module in MODULES
    for recipe in vars(module).values()
    if isinstance(recipe, Recipe)
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; an unknown one is an InputError with the nearest."""
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, 1, 0.0)[0]
        raise InputError(
            f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}; "
            f"did you mean {nearest!r}?"
        )
    return RECIPES[name]


__all__ = [
    "RECIPES",
    "Calibration",
    "Recipe",
    "overridden",
    "overridden_where_known",
    "recipe_named",
    "settings_of",
]
