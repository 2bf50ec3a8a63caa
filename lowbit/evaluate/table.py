"""Perplexity of recipes x formats on several texts, the fake-quantized model and the packed one."""

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.evaluate.fake_quant import to_fake
from lowbit.evaluate.ledger import Ledger
from lowbit.evaluate.memory import peak_memory
from lowbit.evaluate.perplexity import Perplexity, paired_standard_error, perplexity
from lowbit.evaluate.rows import Cost, Found, Result, Row
from lowbit.quantize import quantize
from lowbit.recipes import Recipe

Texts = dict[str, Tensor]  # name -> token ids
NOTHING_KEPT = Ledger()


@dataclass(frozen=True)
class Protocol:
    """What every row is measured on, and as what: "packed", "fake" or both."""

    texts: Texts
    window: int
    limit: int | None
    kinds: tuple[str, ...] = ("packed", "fake")

    def measure(self, model, label: str) -> Found:
        return {
            name: perplexity(model, tokens, self.window, self.limit, f"{label} {name}")
            for name, tokens in self.texts.items()
        }


def full_precision(load_model, protocol: Protocol) -> Found:
    """Perplexity of the model as it comes from `load_model()`."""
    return protocol.measure(load_model(), "full precision")


def _result(packed: Perplexity | None, fake: Perplexity | None, full: Perplexity) -> Result:
    return Result(
        packed=packed and packed.perplexity,
        fake=fake and fake.perplexity,
        difference=packed.perplexity / fake.perplexity - 1 if packed and fake else None,
        log_ratio_error=paired_standard_error(packed or fake, full),
    )


def table(
    load_model,
    protocol: Protocol,
    recipes: list[Recipe],
    formats: list[str],
    calibration: Tensor | str | None,
    tokenizer=None,
    seed: int = 0,
    each=lambda row: None,
    ledger: Ledger = NOTHING_KEPT,
) -> tuple[Found, list[Row]]:
    """Every recipe at every format; `load_model()` returns a fresh full-precision model, `each` is
    called with every row as it is measured, which those in the ledger are not again.

    calibration, tokenizer, seed   quantize's; of a text what learns rotations draws as many windows
                                   as it asks for, as `lowbit quantize` does
    """
    full = ledger.full()
    if full is None:
        full = full_precision(load_model, protocol)
        ledger.add_full(full)
    rows = []
    for format in formats:
        for recipe in recipes:
            row = ledger.row(recipe, format)
            if row is None:
                model, cost = quantize_at_cost(
                    load_model(), recipe, format, calibration, seed, tokenizer
                )
                row = row_of(model.to(torch.float32), cost, full, protocol)
                del model  # before the next one is read: its peak would hold this one too
                ledger.add(recipe, row)
                each(row)
            rows.append(row)
    return full, rows


def quantize_at_cost(
    model,
    recipe: Recipe | str,
    format: str,
    calibration: Tensor | str | None,
    seed: int,
    tokenizer=None,
) -> tuple[PreTrainedModel, Cost]:
    """The quantized model, and what quantizing it took."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    start = clock()
    with peak_memory(model.device) as peak:
        model = quantize(model, recipe, format, calibration, tokenizer, seed)
    return model, Cost(clock() - start, peak.bytes)


def row_of(model, cost: Cost, full: Found, protocol: Protocol) -> Row:
    """The row of one packed model, which is turned into its fake twin on the way (consumed)."""
    config = model.lowbit_config
    label = f"{config.recipe} {config.format}"
    packed = fake = dict.fromkeys(protocol.texts)
    if "packed" in protocol.kinds:
        packed = protocol.measure(model, f"{label} packed")
    if "fake" in protocol.kinds:
        fake = protocol.measure(to_fake(model), f"{label} fake")
    results = {name: _result(packed[name], fake[name], full[name]) for name in protocol.texts}
    return Row(config.recipe, config.format.name, results, cost)


COLUMNS = ("fake", "packed", "packed / fake - 1", "log(ppl / full)")


def markdown(full: Found, rows: list[Row]) -> str:
    """The table as it stands in the README: four columns a text, then what quantizing took."""
    several = len(full) > 1
    columns = [f"{name}: {column}" if several else column for name in full for column in COLUMNS]
    head = ["recipe", "format", *columns, "seconds", "peak GB"]
    whole = [cell for p in full.values() for cell in (f"{p.perplexity:.2f}", "", "", "")]
    lines = [_line(head), "|---" * len(head) + "|", _line(["full", "fp32", *whole, "", ""])]
    for row in rows:
        cells = [cell for name in full for cell in _cells(row.texts[name], full[name])]
        peak = row.cost.peak_bytes
        cost = [f"{row.cost.seconds:.0f}", "" if peak is None else f"{peak / 1e9:.2f}"]
        lines.append(_line([row.recipe, row.format, *cells, *cost]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(result: Result, full: Perplexity) -> list[str]:
    ratio = torch.tensor(result.measured / full.perplexity).log().item()
    return [
        "" if result.fake is None else f"{result.fake:.2f}",
        "" if result.packed is None else f"{result.packed:.2f}",
        "" if result.difference is None else f"{100 * result.difference:+.3f} %",
        f"{ratio:.3f} +- {result.log_ratio_error:.3f}",
    ]


def as_json(full: Found, rows: list[Row]) -> dict:
    """The same numbers, for `--json`."""
    return {
        "full_precision": {
            name: {
                "perplexity": found.perplexity,
                "standard_error": found.standard_error,
                "window": found.window,
                "windows": len(found.window_nll),
            }
            for name, found in full.items()
        },
        "rows": [asdict(row) for row in rows],
    }
