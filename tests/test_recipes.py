"""Recipes: the methods as data."""

import pytest

from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.recipes import RECIPES, overridden, recipe_named
from lowbit.rounding import GPTQ, RTN, AutoRound, OmniQuant
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


def test_autoround_and_omniquant_have_the_settings_of_the_tables():
    autoround = recipe_named("autoround")
    assert autoround.rounding == AutoRound(200, 8, True, None, None)
    assert (autoround.calibration.samples, autoround.calibration.length) == (512, 2048)
    rows = {
        "AutoRound [iters=1K]": AutoRound(1000),
        "AutoRound [iters=1K,disable_quanted_input]": AutoRound(1000, rounded_input=False),
        "AutoRound [iters=4K,minmax_lr=0.0005]": AutoRound(4000, minmax_learning_rate=0.0005),
    }
    found = {row[1]: recipe for recipe in RECIPES.values() for row in recipe.reproduces}
    assert all(found[row].rounding == rounding for row, rounding in rows.items())
    assert sum(row.startswith("AutoRound") for row in found) == 8
    assert recipe_named("omniquant").rounding == OmniQuant(20, 1, 1e-2)
    scaled = recipe_named("omniquant-let")
    assert scaled.rounding == OmniQuant(learn_scales=True) and len(scaled.scales) == 4


def test_a_field_that_is_none_can_be_set():
    recipe = overridden(recipe_named("autoround"), ["rounding.minmax_learning_rate=0.002"])
    assert recipe.rounding == AutoRound(minmax_learning_rate=0.002)
    with pytest.raises(InputError, match="minmax_learning_rate must be a positive float, got 'x'"):
        overridden(recipe_named("autoround"), ["rounding.minmax_learning_rate=x"])


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
