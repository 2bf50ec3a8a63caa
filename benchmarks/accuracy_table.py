"""Rows of benchmarks/accuracy.py: one JSON object a line, and a table for people.

method, format, side, protocol   what makes two rows one
value, window_logs               exp of the mean of the windows' logarithms, and these; or
reason                           why there are none
settings, version, seconds       in the package's own words, without reading the model
threads, commit
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

OURS = "lowbit"
AIM = 0.01  # how much worse than another package is no defect
DONE = ("method", "format", "side", "protocol")


def result(logs: list[float]) -> dict:
    """What a row has: the windows' logarithms, and exp of their mean."""
    mean = math.fsum(logs) / len(logs)
    return {"value": math.inf if mean > 700 else math.exp(mean), "window_logs": logs}


def read(path: Path) -> list[dict]:
    """The rows of a file, of those about the same only the last."""
    if not path.exists():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return list({tuple(row[key] for key in DONE): row for row in rows}.values())


HEAD = ("format", "method", "package", "perplexity or error", "lowbit / it - 1", "s", "settings")


def markdown(rows: list[dict], methods: list[str], formats: Sequence[str]) -> str:
    """For each protocol a table, a line for each side, and those that have a reason."""
    place = {name: i for i, name in enumerate(["fp32", "full", *formats, *methods])}

    def order(row: dict) -> tuple:
        return tuple(place.get(row[key], len(place)) for key in ("format", "method"))

    parts = []
    for protocol in sorted({row["protocol"] for row in rows}):
        those = sorted((row for row in rows if row["protocol"] == protocol), key=order)
        ours = {order(row): row for row in those if row["side"] == OURS and "value" in row}
        lines = [_line(HEAD), "|---" * len(HEAD) + "|"]
        lines += [_line(_cells(r, ours.get(order(r)))) for r in those if "value" in r]
        reasons = [f"* {line(row)}" for row in those if "value" not in row]
        parts += [protocol, "\n".join(lines), *(["\n".join(reasons)] if reasons else [])]
    return "\n\n".join(parts)


def _cells(row: dict, ours: dict | None) -> list[str]:
    compared = against(ours, row) if ours and row["side"] != OURS else ""
    seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
    names = [row["format"], row["method"], row["side"]]
    return [*names, f"{row['value']:.4g}", compared, seconds, row.get("settings", "")]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def line(row: dict) -> str:
    """A row for people, as it is measured."""
    found = row.get("reason") or f"{row['value']:.4g}"
    return f"{row['format']} {row['method']} {row['side']}: {found}"


def against(mine: dict, other: dict) -> str:
    """In per cent, with its paired standard error over windows; worse than AIM stands out."""
    pairs = list(zip(mine["window_logs"], other["window_logs"], strict=True))
    logs = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
    difference, error = logs.mean().expm1().item(), (logs.std() / len(logs) ** 0.5).item()
    text = f"{100 * difference:+.2f} +- {100 * error:.2f} %"
    return f"**{text}**" if difference > AIM or math.isnan(difference) else text
