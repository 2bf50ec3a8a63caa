"""Recipes with few steps, for tests where it does not matter how much is learned."""

from lowbit.recipes import Recipe, overridden, recipe_named, settings_of

FEW = {
    "rounding.steps": 4,
    "rounding.epochs": 4,
    "rounding.batch": 8,
    "flattening.epochs": 2,
    "flattening.batch": 8,
    "training.steps": 2,
    "training.batch": 2,
}


def brief(name: str) -> Recipe:
    """The recipe of that name, with as many steps as FEW says of those it takes."""
    recipe = recipe_named(name)
    known = settings_of(recipe)
    return overridden(recipe, [f"{field}={few}" for field, few in FEW.items() if field in known])
