"""Rows of a published table, run again: the paper's figures beside ours."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lowbit.errors import InputError
from lowbit.evaluate import zero_shot
from lowbit.evaluate.fake_quant import to_fake
from lowbit.evaluate.lines import Lines
from lowbit.evaluate.named_text import Text, open_text
from lowbit.evaluate.perplexity import perplexity
from lowbit.evaluate.published_rows import (
    AVERAGE,
    NORMED,
    OTHER_HARNESS,
    PERPLEXITIES,
    WORDS,
    PublishedRow,
    figure,
    spread_of,
    task_of,
)

Reasons = dict[str, str]  # metric -> why it is not measured


@dataclass(frozen=True)
class Conditions:
    """Of everything measured here; as of zero_shot.evaluate where named alike.

    windows  of each text; None: all
    fake     the simulation, not what is packed
    texts    files in place of published texts, by their names
    of       what tells these results from others in the same file
    """

    window: int
    windows: int | None
    items: int | None
    batch_size: int | str
    task_path: str | Path | None
    fake: bool
    texts: dict[str, Text]
    lines: Lines
    of: dict[str, str]


@dataclass(frozen=True)
class Figure:
    """One cell beside ours. `why`: why there is no figure of ours, or what to know of it."""

    metric: str
    printed: str
    paper: float | None
    ours: float | None
    low: float | None
    high: float | None
    why: str | None

    @property
    def difference(self) -> float | None:
        both = self.ours is not None and self.paper is not None and math.isfinite(self.paper)
        return self.ours - self.paper if both else None

    @property
    def inside(self) -> bool | None:
        """The spread between papers; None: there is none, or no figure of ours."""
        if self.ours is None or self.low is None:
            return None
        return self.low <= self.ours <= self.high


class Harness:
    """The texts and tasks of some metrics, opened once; what cannot be is a reason of its metrics.

    Nothing of a model is here: a row's model is made, measured and dropped.
    """

    def __init__(self, metrics: list[str], conditions: Conditions):
        self.conditions = conditions
        self.texts: dict[str, Text] = dict(conditions.texts)
        self.why_not: Reasons = {}
        self.notes: Reasons = {}  # what to know of a figure
        missing: Reasons = {}
        wanted = {name for m in metrics for name in PERPLEXITIES.get(m, ())}
        for name in sorted(wanted - set(self.texts)):
            try:
                self.texts[name] = open_text(name)
            except InputError as error:
                missing[name] = str(error)
        for metric in metrics:
            for name in PERPLEXITIES.get(metric, ()):
                if name in missing:
                    self.why_not[metric] = missing[name]
                elif name in conditions.texts:
                    self.notes[metric] = f"{name} is {conditions.texts[name].name} here"
        tasks = {metric: task_of(metric) for metric in metrics if task_of(metric)}
        try:
            if tasks:
                names = sorted(set(tasks.values()))
                self.manager = zero_shot.task_manager(names, conditions.task_path)
        except InputError as error:
            self.why_not.update(dict.fromkeys([*tasks, AVERAGE], str(error)))

    def measure(self, row: PublishedRow, metrics: tuple[str, ...], make: Callable) -> tuple:
        """(metric -> value, metric -> why there is none); `make()` returns (model, tokenizer) and
        is called only for what is not in the file."""
        key = {"of": self.conditions.of, "row": [row.source, row.model, row.name, row.format]}
        line = self.conditions.lines.find(key) or {"metrics": {}}
        found, why_not = dict(line["metrics"]), dict(self.why_not)
        left = [m for m in metrics if m not in found and m not in why_not]
        if left:
            try:
                self._of_model(row, left, *make(), found, why_not)
            except InputError as error:
                why_not |= dict.fromkeys(left, str(error))
            if any(metric in found for metric in left):
                self.conditions.lines.append({**key, "metrics": found})
        return {m: found[m] for m in metrics if m in found}, why_not

    def _of_model(self, row: PublishedRow, metrics: list[str], model, tokenizer, found, why_not):
        """Each metric goes to `found`, or its reason to `why_not`."""
        model = to_fake(model) if self.conditions.fake and not row.is_full else model
        means = {}
        for metric in metrics:
            try:
                if metric in PERPLEXITIES:
                    names = PERPLEXITIES[metric]
                    for name in set(names) - set(means):
                        means[name] = self._perplexity(model, tokenizer, row, name)
                    found[metric] = sum(means[name] for name in names) / len(names)
                elif metric != AVERAGE:
                    found[metric] = self._task(model, tokenizer, row, metric)
            except InputError as error:
                why_not[metric] = str(error)
        if AVERAGE in metrics:
            parts = [m for m in row.metrics if task_of(m) and m != WORDS]
            if set(parts) <= set(found):
                found[AVERAGE] = sum(found[m] for m in parts) / len(parts)
            else:
                why_not[AVERAGE] = "a mean of all tasks of the row, which were not all run"

    def _perplexity(self, model, tokenizer, row: PublishedRow, name: str) -> float:
        window = self.conditions.window
        tokens = self.texts[name].tokens(tokenizer, window)
        label = f"{row.name} {row.format} {name}"
        return perplexity(model, tokens, window, self.conditions.windows, label).perplexity

    def _task(self, model, tokenizer, row: PublishedRow, metric: str) -> float:
        task = task_of(metric)
        found = zero_shot.evaluate(
            model,
            tokenizer,
            zero_shot.asked_for([task], self.manager),
            self.manager,
            self.conditions.batch_size,
            self.conditions.items,
            self.conditions.lines,
            self.conditions.of | {"row": f"{row.model} {row.name} {row.format}"},
        )[task]
        if metric == WORDS:
            return found["word_perplexity"]
        normed = row.source in NORMED and "acc_norm" in found
        return 100 * found["acc_norm" if normed else "acc"]


def figures(
    row: PublishedRow, metrics: tuple[str, ...], ours: dict, why_not: Reasons, notes: Reasons
) -> list[Figure]:
    """A Figure of each metric, in order."""
    result = []
    for metric in metrics:
        cell, spread, value = row.cell(metric), spread_of(row, metric), ours.get(metric)
        why = notes.get(metric) if value is not None else why_not[metric]
        if value is not None and task_of(metric) and row.source in OTHER_HARNESS:
            why = "the paper's harness is not public, ours is lm-eval"
        ends = (spread.low, spread.high) if spread else (None, None)
        result.append(Figure(metric, cell["value_raw"], figure(cell), value, *ends, why))
    return result


HEAD = "| row | format | metric | paper | ours | ours - paper | spread between papers | inside |"


def markdown(rows: list[tuple[PublishedRow, list[Figure]]]) -> str:
    """A line a figure; reasons stand once, below, under the number that ours has in brackets."""
    reasons: dict[str, int] = {}
    lines = [HEAD, "|---" * HEAD.count("|", 1) + "|"]
    for row, found in rows:
        for f in found:
            ours = "not run" if f.ours is None else f"{f.ours:.3f}"
            if f.why:
                ours += f" ({reasons.setdefault(f.why, len(reasons) + 1)})"
            spread = "one paper" if f.low is None else f"{f.low:.3f} to {f.high:.3f}"
            verdict = {None: "", True: "yes", False: "no"}[f.inside]
            difference = "" if f.difference is None else f"{f.difference:+.3f}"
            cells = [row.name, row.format, f.metric, f.printed, ours]
            lines.append(f"| {' | '.join([*cells, difference, spread, verdict])} |")
    notes = [f"({number}) {why}" for why, number in reasons.items()]
    return "\n".join(lines + ([""] + notes if notes else []))


def as_json(rows: list[tuple[PublishedRow, list[Figure]]]) -> list[dict]:
    """The same, for --json."""
    return [
        {
            "model": row.model,
            "row": row.name,
            "recipe": row.recipe and row.recipe.name,
            "format": row.format,
            "figures": [
                {**asdict(f), "difference": f.difference, "inside": f.inside} for f in found
            ],
        }
        for row, found in rows
    ]
