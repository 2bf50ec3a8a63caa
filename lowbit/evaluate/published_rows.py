"""Rows of the published tables: which recipe and format makes each, and what counts as reproduced.

A paper's figure depends on its clip ratios, its seeds and its harness as much as on the method:
QuaRot's perplexity of LLaMA-2-7B at w4a4kv4 is 6.10 to 6.40 with GPTQ, 8.2 to 9.0 without, from one
paper to the next. So a figure is held against the spread of all papers that print it.
"""

import difflib
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from lowbit.errors import InputError
from lowbit.evaluate.published import FULL_PRECISION, published_tables, setting_of, source_of
from lowbit.evaluate.zero_shot import ALIASES
from lowbit.recipes import RECIPES, Recipe

Cell = dict[str, str]

# Models of the tables -> the hub's names of their checkpoints.
CHECKPOINTS = {
    "LLaMA-7B": "huggyllama/llama-7b",
    "LLaMA-13B": "huggyllama/llama-13b",
    "LLaMA-30B": "huggyllama/llama-30b",
    "LLaMA-65B": "huggyllama/llama-65b",
    "LLaMA-2-7B": "meta-llama/Llama-2-7b-hf",
    "LLaMA-2-13B": "meta-llama/Llama-2-13b-hf",
    "LLaMA-2-70B": "meta-llama/Llama-2-70b-hf",
    "LLaMA-3-8B": "meta-llama/Meta-Llama-3-8B",
    "LLaMA-3-70B": "meta-llama/Meta-Llama-3-70B",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
    "Mixtral-8x7B-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "neural-chat-7b-v3-3": "Intel/neural-chat-7b-v3-3",
    "phi-2": "microsoft/phi-2",
    "SmolLM-135M": "HuggingFaceTB/SmolLM-135M",
    "SmolLM-360M": "HuggingFaceTB/SmolLM-360M",
    "SmolLM-1.7B": "HuggingFaceTB/SmolLM-1.7B",
    "MiniCPM-1B": "openbmb/MiniCPM-1B-sft-bf16",
    "MiniCPM-2B": "openbmb/MiniCPM-2B-sft-bf16",
    "Qwen2-0.5B": "Qwen/Qwen2-0.5B",
    "Qwen2-1.5B": "Qwen/Qwen2-1.5B",
}

# Metrics that are perplexities -> the texts they are means of (lowbit/evaluate/named_text.py).
PERPLEXITIES = {
    "wikitext2_ppl": ("wikitext2",),
    "c4_ppl": ("c4",),
    "c4_new_ppl": ("c4",),
    "ptb_new_ppl": ("ptb",),
    "avg_ppl": ("wikitext2", "c4"),
}
WORDS, AVERAGE = "lmeval_wikitext_word_ppl", "avg_acc"
WORDS_TASK = "wikitext"

# Of weights alone, sources whose tables are of asymmetric ranges (llmc's and AutoRound's defaults).
ASYMMETRIC_WEIGHTS = ("003", "004")
# Methods whose code gives activations such ranges; DuaRot takes SpinQuant's settings.
ASYMMETRIC_ACTIVATIONS = ("SpinQuant", "SpinQuant*", "DuaRot")
# SpinQuant's tasks are of a harness that is not public: lm-eval is some points away from it.
OTHER_HARNESS = ("001", "002")
NORMED = ("000",)  # prints acc_norm where a task has it; the others acc
MISSING = "= missing"  # in a note: printed as 0.00
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e\+?\d+)?")

# Figures of papers that are no source here: recipe, model, setting, metric -> value as printed.
FURTHER = {
    ("quarot", "LLaMA-2-7B", "w4a4kv4", "wikitext2_ppl"): "6.10",  # arXiv 2404.00456
    ("quarot-rtn", "LLaMA-2-7B", "w4a4kv4", "wikitext2_ppl"): "8.37",
}


@dataclass(frozen=True)
class PublishedRow:
    """One line of a table: cells of one model, setting and method, a metric each."""

    cells: tuple[Cell, ...]

    @property
    def model(self) -> str:
        return self.cells[0]["model"]

    @property
    def source(self) -> str:
        return source_of(self.cells[0])

    @property
    def method(self) -> str:
        return self.cells[0]["method"]

    @property
    def setting(self) -> str:
        return setting_of(self.cells[0])

    @property
    def name(self) -> str:
        """As printed: method, and how its weights are rounded where the method does not say."""
        weights = self.cells[0]["weight_method"]
        return self.method if weights in ("none", self.method) else f"{self.method}, {weights}"

    @property
    def is_full(self) -> bool:
        return self.method == FULL_PRECISION

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe that claims the row; None: none does."""
        return _recipe_of(self.cells[0])

    @property
    def format(self) -> str:
        """The setting with the symmetry of the source, and of the method."""
        if self.is_full:
            return self.setting
        if self.cells[0]["a_bits"] == "16":
            return self.setting + ("-wasym" if self.source in ASYMMETRIC_WEIGHTS else "")
        return self.setting + ("-aasym" if self.method in ASYMMETRIC_ACTIVATIONS else "")

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(cell["metric"] for cell in self.cells)

    def cell(self, metric: str) -> Cell:
        return next(cell for cell in self.cells if cell["metric"] == metric)


def rows_of(name: str) -> list[PublishedRow]:
    """All rows of SOURCE.TABLE, as "000.6" or "003.W4G128"; an unknown one is an InputError."""
    tables = {table_name(cell): None for cell in published_tables()}
    wanted = {known.lower(): known for known in tables}.get(name.lower())
    if wanted is None:
        near = difflib.get_close_matches(name, tables, 1, 0.0)[0]
        raise InputError(
            f"unknown table {name!r}: expected one of {', '.join(tables)}; did you mean {near!r}?"
        )
    rows: dict[tuple, list[Cell]] = {}
    for cell in published_tables():
        if table_name(cell) == wanted:
            key = (cell["model"], setting_of(cell), cell["method"], cell["weight_method"])
            rows.setdefault(key, []).append(cell)
    return [PublishedRow(tuple(cells)) for cells in rows.values()]


def table_name(cell: Cell) -> str:
    """Of the cell's table, as users type it."""
    return f"{source_of(cell)}.{cell['table'].removeprefix('Table ').replace(' ', '-')}"


def chosen(rows: list[PublishedRow], words: list[str]) -> list[PublishedRow]:
    """Rows that a word names by method or recipe, and one by setting, where any does; the row of
    the full model wherever it is named."""
    methods = {row.method.lower() for row in rows}
    methods |= {row.recipe.name for row in rows if row.recipe}
    settings = {row.setting for row in rows}
    asked = [word.lower() for word in words]
    for word in asked:
        if word not in methods | settings:
            known = sorted(methods) + sorted(settings)
            near = difflib.get_close_matches(word, known, 1, 0.0)[0]
            raise InputError(
                f"no row {word!r}: expected methods or settings of the table, {', '.join(known)}; "
                f"did you mean {near!r}?"
            )
    by_method = methods.intersection(asked) or methods
    by_setting = settings.intersection(asked) or settings
    return [
        row
        for row in rows
        if (row.setting in by_setting or (row.is_full and row.method.lower() in asked))
        and {row.method.lower(), row.recipe.name if row.recipe else ""} & by_method
    ]


def model_of(rows: list[PublishedRow], model: str, of: str | None) -> tuple[str, str, bool]:
    """(name in the table, what to load, whether that is known to be the same checkpoint).

    model  a name of the table, whose checkpoint is the hub's; or what `lowbit quantize` takes
    of     the table's model whose rows `model` is held against; None: as its name says, or the only
           one that the table has
    """
    names = list(dict.fromkeys(row.model for row in rows))
    lowered = {name.lower(): name for name in names}
    if of is not None and of.lower() not in lowered:
        raise InputError(f"--of must be a model of the table, {', '.join(names)}, got {of!r}")
    if model.lower() in lowered and of in (None, lowered[model.lower()]):
        name = lowered[model.lower()]
        return name, CHECKPOINTS[name], True
    last = model.rstrip("/").rpartition("/")[2].lower()
    same = [n for n in names if last in (n.lower(), CHECKPOINTS[n].rpartition("/")[2].lower())]
    if of is None and not same and len(names) > 1:
        raise InputError(
            f"the table has {', '.join(names)}: pass --of with the one to hold {model!r} against"
        )
    name = lowered[of.lower()] if of else (same or names)[0]
    return name, model, name in same


def task_of(metric: str) -> str | None:
    """lm-eval's task of a metric; None: it is no task, or a mean of several."""
    if metric == WORDS:
        return WORDS_TASK
    if metric in PERPLEXITIES or metric == AVERAGE:
        return None
    return ALIASES.get(metric, metric)


@dataclass(frozen=True)
class Spread:
    """What papers print of one figure: from `low` to `high`, `papers` of them."""

    low: float
    high: float
    papers: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def figure(cell: Cell) -> float | None:
    """As printed; None: the source has none. inf and nan are figures: the method broke."""
    return None if MISSING in cell["note"] or not cell["value"] else float(cell["value"])


def spread_of(row: PublishedRow, metric: str) -> Spread | None:
    """Of all papers with the row's model, setting and recipe; None where fewer than two print it,
    and for tasks, which no two of them measure alike. A figure stands for all that round to it,
    and with a standard deviation for all within one."""
    if metric not in PERPLEXITIES or (row.recipe is None and not row.is_full):
        return None
    found = {}
    for cell in published_tables():
        same = (cell["model"], setting_of(cell), cell["metric"]) == (row.model, row.setting, metric)
        if not same:
            continue
        full = cell["method"] == FULL_PRECISION
        ours = full if row.is_full else not full and _recipe_of(cell) is row.recipe
        if ours and figure(cell) is not None and math.isfinite(figure(cell)):
            found.setdefault(source_of(cell), []).append(_interval(cell["value_raw"], cell["std"]))
    further = FURTHER.get((row.recipe and row.recipe.name, row.model, row.setting, metric))
    if further:
        found["further"] = [_interval(further)]
    ends = [end for intervals in found.values() for interval in intervals for end in interval]
    return Spread(min(ends), max(ends), len(found)) if len(found) > 1 else None


def _interval(printed: str, deviation: str = "") -> tuple[float, float]:
    """printed: "6.27", "2,382.5", "2e5", or with its deviation behind it, "8.2 ±0.36"."""
    value = Decimal(_NUMBER.match(printed.replace(",", ""))[0])
    half_a_digit = 0.5 * 10.0 ** value.as_tuple().exponent
    margin = max(half_a_digit, float(deviation or 0))
    return float(value) - margin, float(value) + margin


def _recipe_of(cell: Cell) -> Recipe | None:
    key = (source_of(cell), cell["method"], cell["weight_method"])
    for recipe in RECIPES.values():
        if any(key[: len(rows)] == rows for rows in recipe.reproduces):
            return recipe
    return None
