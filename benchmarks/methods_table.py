"""The table of README.md: every method at every format, from the rows that `make methods` measured.

python -m benchmarks.methods_table [benchmarks/results/methods.jsonl]
"""

import json
import sys
from pathlib import Path

ROWS = Path(__file__).parent / "results" / "methods.jsonl"
METHODS = (  # weights to nearest, then by more; as the model is, scaled, rotated, mapped
    *("rtn", "hqq", "gptq", "gptaq", "qronos", "autoround", "omniquant", "omniquant-let"),
    *("smoothquant", "os+", "awq"),
    *("quarot-rtn", "quarot", "quarot-gptaq", "quarot-qronos", "dartquant"),
    *("spinquant-rtn", "spinquant", "duarot-rtn", "duarot"),
    *("flatquant-rtn", "flatquant", "flatquant-gptaq"),
)
FORMATS = ("w4a4kv4", "w4a8kv4", "w4a16g64", "w3a16g64", "w2a16g64", "w8a8")
FULL = "full"


def read(path: Path) -> dict[tuple[str, str], dict]:
    """recipe, format -> its row, the last where there are several; all under one protocol."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    protocols = {json.dumps(row["of"], sort_keys=True) for row in rows}
    if len(protocols) != 1:
        raise ValueError(f"rows of {path} must be of one protocol, got {len(protocols)}")
    return {(row["recipe"], row["format"]): row for row in rows}


def markdown(rows: dict[tuple[str, str], dict]) -> str:
    """A line for each method: the perplexities at each format, and what quantizing took."""
    unknown = {recipe for recipe, _ in rows} - {FULL, *METHODS}
    if unknown:
        raise ValueError(f"METHODS has no place for {', '.join(sorted(unknown))}")
    full = next(row for (recipe, _), row in rows.items() if recipe == FULL)
    texts = list(full["texts"])
    lines = [
        _line(["recipe", *FORMATS, "seconds", "peak GB"]),
        "|---" * (len(FORMATS) + 3) + "|",
    ]
    for recipe in METHODS:
        found = [rows.get((recipe, format)) for format in FORMATS]
        cells = ["" if row is None else _perplexities(row, texts) for row in found]
        costs = [row["cost"] for row in found if row is not None]
        seconds = _span([cost["seconds"] for cost in costs], ".0f")
        peaks = _span([cost["peak_bytes"] / 1e9 for cost in costs], ".1f")
        lines.append(_line([recipe, *cells, seconds, peaks]))
    whole = " / ".join(_number(full["texts"][text]["perplexity"]) for text in texts)
    return "\n".join([f"{' / '.join(texts)}, full precision {whole}", "", *lines])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _perplexities(row: dict, texts: list[str]) -> str:
    return " / ".join(_number(row["texts"][text]["packed"]) for text in texts)


def _number(perplexity: float) -> str:
    digits = 0 if perplexity >= 1000 else 1 if perplexity >= 100 else 2
    return f"{perplexity:.{digits}f}"


def _span(values: list[float], digits: str) -> str:
    ends = [format(f(values), digits) for f in (min, max)] if values else [""]
    return "-".join(dict.fromkeys(ends))


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1]) if len(sys.argv) > 1 else ROWS)))
