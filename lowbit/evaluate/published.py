"""The published tables that recipes stand for: lowbit/data/published_tables.csv, a row per cell.

Columns: source_file, table, model, w_bits, a_bits, kv_bits, group_size (-1: per channel), method,
weight_method, metric, value, std, metric_printed, value_raw, note. The five sources, by the first
three digits of source_file:

    000  DuaRot, tables 6 to 10
    001  SpinQuant, table 6 (LLaMA-2)
    002  SpinQuant, table 5 (LLaMA-3)
    003  AutoRound's accuracy pages
    004  a survey of small language models, tables 1 to 7

Cells that a source misprints are marked in `note`; values are as printed.
"""

import csv
from collections import Counter
from functools import cache
from importlib.resources import files

from lowbit.recipes import Recipe, settings_of

FULL_PRECISION = "FP16"


@cache
def published_tables() -> tuple[dict[str, str], ...]:
    """All cells."""
    path = files("lowbit") / "data/published_tables.csv"
    with path.open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(lines))


def source_of(cell: dict[str, str]) -> str:
    return cell["source_file"][:3]


def cells_of(recipe: Recipe) -> list[dict[str, str]]:
    """The cells a recipe stands for, in the order of the file."""
    return [cell for cell in published_tables() if any(_is_of(cell, r) for r in recipe.reproduces)]


def _is_of(cell: dict[str, str], rows: tuple[str, ...]) -> bool:
    return (source_of(cell), cell["method"], cell["weight_method"])[: len(rows)] == rows


def setting_of(cell: dict[str, str]) -> str:
    """The cell's format as lowbit names it, symmetry aside: "w4a4kv4", "w3a16g128"."""
    name = f"w{cell['w_bits']}a{cell['a_bits']}"
    if cell["kv_bits"] != "16":
        name += f"kv{cell['kv_bits']}"
    return name if cell["group_size"] == "-1" else f"{name}g{cell['group_size']}"


def summary(recipe: Recipe) -> dict:
    """What `lowbit recipes` says of one recipe."""
    cells = cells_of(recipe)
    settings = Counter(setting_of(cell) for cell in cells)
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "source": recipe.source,
        "reproduces": [" ".join(rows) for rows in recipe.reproduces],
        "cells": len(cells),
        "settings": sorted(settings),
        "models": sorted({cell["model"] for cell in cells}),
    }


def text(recipe: Recipe) -> str:
    """One line for people."""
    cells = len(cells_of(recipe))
    return f"{recipe.name:<20} {recipe.summary}" + (f" ({cells} published cells)" if cells else "")


def whole_text(recipe: Recipe) -> str:
    """And what it stands for, and the fields that --set changes."""
    found = summary(recipe)
    fields = [f"    {path} = {value!r}" for path, value in settings_of(recipe).items()]
    return "\n".join(
        [
            text(recipe),
            f"  source: {recipe.source}",
            f"  reproduces: {', '.join(found['reproduces']) or '-'}",
            f"  at: {', '.join(found['settings']) or '-'}",
            f"  of: {', '.join(found['models']) or '-'}",
            "  fields, for --set:",
            *fields,
        ]
    )
