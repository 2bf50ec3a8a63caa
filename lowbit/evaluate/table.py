"""Perplexity of recipes x formats, the fake-quantized model and the packed one side by side."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lowbit.evaluate.fake_quant import to_fake
from lowbit.evaluate.perplexity import Perplexity, paired_standard_error, perplexity
from lowbit.quantize import quantize


@dataclass(frozen=True)
class Row:
    """One row. `fake` and `packed` are perplexities on the same windows; `difference` is
    packed / fake - 1; `log_ratio_error` the paired standard error of log(packed / full)."""

    recipe: str
    format: str
    fake: float
    packed: float
    difference: float
    log_ratio_error: float


def full_precision(load_model, tokens: Tensor, window: int, limit: int | None) -> Perplexity:
    """Perplexity of the model as it comes from `load_model()`."""
    return perplexity(load_model(), tokens, window, limit, "full precision")


def measure(model, full: Perplexity, tokens: Tensor, window: int, limit: int | None) -> Row:
    """The row of one packed model, which is turned into its fake twin on the way (consumed)."""
    config = model.lowbit_config
    label = f"{config.recipe} {config.format}"
    packed = perplexity(model, tokens, window, limit, f"{label} packed")
    fake = perplexity(to_fake(model), tokens, window, limit, f"{label} fake")
    return Row(
        recipe=config.recipe,
        format=config.format.name,
        fake=fake.perplexity,
        packed=packed.perplexity,
        difference=packed.perplexity / fake.perplexity - 1,
        log_ratio_error=paired_standard_error(packed, full),
    )


def table(
    load_model,
    tokens: Tensor,
    recipes: list[str],
    formats: list[str],
    window: int,
    limit: int | None,
    calibration: Tensor | None,
    seed: int = 0,
) -> tuple[Perplexity, list[Row]]:
    """Every recipe at every format; `load_model()` returns a fresh full-precision model."""
    full = full_precision(load_model, tokens, window, limit)
    rows = []
    for format in formats:
        for recipe in recipes:
            model = quantize(load_model(), recipe, format, calibration=calibration, seed=seed)
            rows.append(measure(model.to(torch.float32), full, tokens, window, limit))
    return full, rows


def markdown(full: Perplexity, rows: list[Row]) -> str:
    """The table as it stands in the README."""
    lines = [
        "| recipe | format | fake | packed | packed / fake - 1 | log(packed / full) |",
        "|---|---|---|---|---|---|",
        f"| full precision | fp32 | {full.perplexity:.2f} | | | |",
    ]
    for row in rows:
        ratio = torch.tensor(row.packed / full.perplexity).log().item()
        lines.append(
            f"| {row.recipe} | {row.format} | {row.fake:.2f} | {row.packed:.2f} "
            f"| {100 * row.difference:+.3f} % | {ratio:.3f} +- {row.log_ratio_error:.3f} |"
        )
    return "\n".join(lines)


def as_json(full: Perplexity, rows: list[Row]) -> dict:
    """The same numbers, for `--json`."""
    return {
        "full_precision": {"perplexity": full.perplexity, "standard_error": full.standard_error},
        "window": full.window,
        "windows": len(full.window_nll),
        "rows": [asdict(row) for row in rows],
    }
