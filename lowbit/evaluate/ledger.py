"""Rows of a table in a file: what is there is not measured again."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.evaluate.lines import Lines
from lowbit.evaluate.perplexity import Perplexity
from lowbit.evaluate.rows import Cost, Found, Result, Row
from lowbit.recipes import RECIPES, Recipe, settings_of

FULL = "full"  # in place of a recipe's name


@dataclass(frozen=True)
class Ledger:
    """path  of the file, which is made and appended to; None: nothing is kept
    of    what all rows here are measured under, by name: rows of other conditions may be in the
          file too, and are left alone
    """

    path: Path | None = None
    of: dict[str, str] = field(default_factory=dict)

    def full(self) -> Found | None:
        """Full precision, by text."""
        found = self._find(FULL, {}, "fp32")
        return found and {name: Perplexity(**p) for name, p in found["texts"].items()}

    def row(self, recipe: Recipe, format: str) -> Row | None:
        found = self._find(recipe.name, _fields(recipe), format)
        if found is None:
            return None
        texts = {name: Result(**result) for name, result in found["texts"].items()}
        return Row(recipe.name, format, texts, Cost(**found["cost"]))

    def add_full(self, found: Found):
        self._add(FULL, {}, "fp32", {"texts": {name: asdict(p) for name, p in found.items()}})

    def add(self, recipe: Recipe, row: Row):
        measured = asdict(row)
        kept = {name: measured[name] for name in ("texts", "cost")}
        self._add(recipe.name, _fields(recipe), row.format, kept)

    def _find(self, recipe: str, fields: dict[str, str], format: str) -> dict | None:
        """The last line. One of before a field was there had what the recipe has by default."""
        wanted = {"of": self.of, "recipe": recipe, "format": format}
        usual = _fields(RECIPES[recipe]) if recipe in RECIPES else {}
        absent = {name: usual[name] for name in fields.keys() & usual.keys()}
        found = [
            line
            for line in Lines(self.path).read()
            if wanted.items() <= line.items() and absent | line["fields"] == fields
        ]
        return found[-1] if found else None

    def _add(self, recipe: str, fields: dict[str, str], format: str, measured: dict):
        line = {"of": self.of, "recipe": recipe, "fields": fields, "format": format, **measured}
        Lines(self.path).append(line)


def _fields(recipe: Recipe) -> dict[str, str]:
    return {name: str(value) for name, value in settings_of(recipe).items()}
