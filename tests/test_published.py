"""The published tables, and which of their rows a recipe stands for."""

from collections import Counter

import pytest

from lowbit.evaluate.published import (
    FULL_PRECISION,
    cells_of,
    published_tables,
    setting_of,
    source_of,
    summary,
)
from lowbit.formats import QuantFormat
from lowbit.recipes import RECIPES

# Methods of the tables that no recipe is there for yet.
TO_COME = {
    "AQLM",
    "LLM-QAT",
    "QuIP",
    "QuIP#",
}


def test_every_cell_is_there_and_parses():
    tables = published_tables()
    assert len(tables) == 7596 and {source_of(cell) for cell in tables} == {
        "000",
        "001",
        "002",
        "003",
        "004",
    }
    for cell in tables:
        if cell["method"] != FULL_PRECISION:
            QuantFormat.parse(setting_of(cell))


def test_every_method_has_a_recipe_or_is_to_come():
    known = {
        (source_of(cell), cell["method"]) for name in RECIPES for cell in cells_of(RECIPES[name])
    }
    methods = {(source_of(cell), cell["method"]) for cell in published_tables()}
    left = {method.split(" [")[0] for source, method in methods - known if method != FULL_PRECISION}
    assert left == TO_COME


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_reproduces_is_printed_somewhere(name):
    recipe = RECIPES[name]
    for rows in recipe.reproduces:
        assert any(
            (source_of(c), c["method"], c["weight_method"])[: len(rows)] == rows
            for c in cells_of(recipe)
        ), rows
    found = summary(recipe)
    assert found["cells"] == len(cells_of(recipe))


def test_quarot_rows_are_split_by_their_weights():
    methods = Counter(c["weight_method"] for c in cells_of(RECIPES["quarot"]))
    assert set(methods) == {"GPTQ"}
    assert {c["weight_method"] for c in cells_of(RECIPES["quarot-rtn"])} == {"RTN"}
