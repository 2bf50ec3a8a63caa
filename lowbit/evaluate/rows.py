"""What a table holds."""

from dataclasses import dataclass

from lowbit.evaluate.perplexity import Perplexity

Found = dict[str, Perplexity]  # name of a text -> perplexity on its windows


@dataclass(frozen=True)
class Result:
    """On one text. `fake` and `packed` are perplexities on the same windows (None: not asked for);
    `difference` is packed / fake - 1; `log_ratio_error` the paired standard error of
    log(measured / full), where measured is packed, or fake where there is no packed."""

    packed: float | None
    fake: float | None
    difference: float | None
    log_ratio_error: float

    @property
    def measured(self) -> float:
        return self.fake if self.packed is None else self.packed


@dataclass(frozen=True)
class Cost:
    """Of quantizing. seconds: on a CPU of all its threads together, so that it does not depend on
    what else runs there; on a GPU of the clock. peak_bytes None where it cannot be measured."""

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Row:
    """texts: name -> Result."""

    recipe: str
    format: str
    texts: dict[str, Result]
    cost: Cost
