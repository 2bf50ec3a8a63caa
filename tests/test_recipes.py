"""Recipes: the methods as data."""

import pytest

from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.recipes import RECIPES, overridden, recipe_named
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
    assert quarot.rounding == GPTQ(act_order=True, clip="weight", damp=0.01)
    assert recipe_named("quarot-rtn").rounding == RTN(clip="weight")
    assert (quarot.calibration.samples, quarot.calibration.length) == (128, 2048)


def test_clips_are_for_four_bits():
    quarot = recipe_named("quarot")
    assert quarot.clips(QuantFormat.parse("w4a4kv4")) == (0.9, 0.95)
    assert quarot.clips(QuantFormat.parse("w4a8kv4")) == (1.0, 0.95)
    assert quarot.clips(QuantFormat.parse("w8a8kv8")) == (1.0, 1.0)
    assert recipe_named("rtn").clips(QuantFormat.parse("w4a4kv4")) == (1.0, 1.0)


def test_settings_change_fields_by_name():
    recipe = overridden(
        recipe_named("awq"),
        [
            "rounding.clip=weight",
            "transforms.0.fit.steps=10",
            "calibration.samples=32",
            "activation_clip.4=0.9",
        ],
    )
    assert recipe.rounding == RTN(clip="weight") and recipe.calibration.samples == 32
    steps = [scale.fit.steps for scale in recipe.transforms]
    assert steps == [10, 20, 20, 20] and recipe.activation_clip == {4: 0.9}
    assert recipe.name == "awq"
    quarot = overridden(recipe_named("quarot"), ["rounding.act_order=false", "rounding.damp=1"])
    assert quarot.rounding == GPTQ(act_order=False, damp=1.0)


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            "rounding.dampening=0.1",
            "unknown field 'dampening', expected one of act_order, static_g",
        ),
        ("rounder.damp=0.1", "unknown field 'rounder', expected one of rounding, transforms, act"),
        ("rounding.damp.x=1", "unknown field 'x', expected one of nothing inside a float"),
        ("transforms.9.space=value", "unknown field '9', expected one of 0, 1, 2, 3, 4, 5"),
        ("name=other", "unknown field 'name'"),
        ("rounding.damp=high", "expected a float, got 'high'"),
        ("rounding.act_order=3", "expected a bool, got 3"),
        ("rounding=RTN", "expected a field of it, got 'RTN'"),
        ("rounding.damp", "--set must be FIELD=VALUE, got 'rounding.damp'"),
        ("rounding.damp=7", r"damp must be in \(0, 1.0\], got 7.0"),
    ],
)
def test_unknown_fields_and_values(setting, message):
    with pytest.raises(InputError, match=message):
        overridden(recipe_named("quarot"), [setting])
