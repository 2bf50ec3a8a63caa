"""Recipes: the methods as data."""

import pytest

from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.recipes import RECIPES, recipe_named
from lowbit.rounding import GPTQ, RTN
from lowbit.transforms import FoldNorms


def test_every_recipe_is_found_by_its_name():
    for name, recipe in RECIPES.items():
        assert recipe_named(name) is recipe and recipe.name == name
        assert recipe.summary and recipe.source


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="unknown recipe 'quarto'.*did you mean 'quarot'"):
        recipe_named("quarto")


def test_quarot_has_the_settings_of_the_paper():
    quarot = recipe_named("quarot")
    assert isinstance(quarot.transforms[0], FoldNorms)
    spaces = [t.space for t in quarot.transforms[1:]]
    assert spaces == ["residual", "value", "heads", "mlp_hidden", "query_key"]
    assert [t.random_signs for t in quarot.transforms[1:]] == [True] + [False] * 4
    assert quarot.rounder == GPTQ(act_order=True, clip_search=True, damp=0.01)
    assert recipe_named("quarot-rtn").rounder == RTN(clip_search=True)
    assert (quarot.calibration.samples, quarot.calibration.length) == (128, 2048)


def test_clips_are_for_four_bits():
    quarot = recipe_named("quarot")
    assert quarot.clips(QuantFormat.parse("w4a4kv4")) == (0.9, 0.95)
    assert quarot.clips(QuantFormat.parse("w4a8kv4")) == (1.0, 0.95)
    assert quarot.clips(QuantFormat.parse("w8a8kv8")) == (1.0, 1.0)
    assert recipe_named("rtn").clips(QuantFormat.parse("w4a4kv4")) == (1.0, 1.0)
