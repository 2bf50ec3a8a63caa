"""A figure of speed against accuracy: what a format is worth in both.

    python -m benchmarks.speed_accuracy --speed FILE.csv --accuracy FILE.jsonl --batch 1 \\
        --tokens 1024 -o FIGURE.png

Speed is that of `lowbit bench model --csv`, of one phase, batch and length, and does not depend on
the recipe but where it leaves rotations in the model, which are timed all. Accuracy is that of
`lowbit table --out`: a point for every recipe that was measured at a format that was timed.
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import InputError
from lowbit.evaluate.ledger import FULL
from lowbit.evaluate.lines import Lines
from lowbit.evaluate.rows import Result

BF16 = "bf16"


@dataclass(frozen=True)
class Point:
    recipe: str
    format: str
    tokens_s: float
    perplexity: float


def speeds(path: Path, model: str, phase: str, batch: int, tokens: int) -> dict[str, float]:
    """format -> tokens a second, as it was measured last; under BF16 the fastest of them."""
    wanted = {"model": model, "phase": phase, "batch": str(batch), "tokens": str(tokens)}
    found: dict[str, float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["tokens_s"] and all(row[name] == value for name, value in wanted.items()):
                found[row["contender"]] = float(row["tokens_s"])
    ours = {name: speed for name, speed in found.items() if not name.startswith(BF16)}
    peers = [speed for name, speed in found.items() if name.startswith(BF16)]
    if not ours or not peers:
        raise InputError(f"{path} must have rows of bf16 and of a format where {wanted}")
    return {BF16: max(peers), **ours}


def points(speed: dict[str, float], lines: list[dict], text: str) -> list[Point]:
    """Of every line whose format was timed; full precision is bf16's."""
    found = {}
    for line in lines:
        if text not in line["texts"]:
            continue
        is_full = line["recipe"] == FULL
        format, result = BF16 if is_full else line["format"], line["texts"][text]
        perplexity = result["perplexity"] if is_full else Result(**result).measured
        if format in speed:
            found[line["recipe"], format] = Point(line["recipe"], format, speed[format], perplexity)
    if not found:
        raise InputError(f"no line of the accuracies is of the text {text!r} and a timed format")
    return list(found.values())


def draw(found: list[Point], title: str, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 6))
    formats = list(dict.fromkeys(point.format for point in found))
    for index, format in enumerate(formats):
        own = [point for point in found if point.format == format]
        axis.scatter([p.tokens_s for p in own], [p.perplexity for p in own], label=format)
        best = min(own, key=lambda point: point.perplexity)
        axis.annotate(
            best.recipe, (best.tokens_s, best.perplexity), xytext=(4, -10 - 2 * (index % 2)),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("tokens / s")
    axis.set_ylabel("perplexity")
    axis.set_title(title, fontsize=10)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", required=True, metavar="FILE", help="of lowbit bench model")
    parser.add_argument("--accuracy", required=True, metavar="FILE", help="of lowbit table --out")
    parser.add_argument("--model", default="smollm2-135m", help="the shapes that were timed")
    parser.add_argument("--phase", default="decode", choices=["decode", "prefill"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, required=True, help="of the context or the prompt")
    parser.add_argument("--text", default="the Python manual", help="of the perplexities")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    args = parser.parse_args()
    speed = speeds(Path(args.speed), args.model, args.phase, args.batch, args.tokens)
    found = points(speed, Lines(Path(args.accuracy)).read(), args.text)
    title = f"{args.model}, {args.phase}, batch {args.batch}, {args.tokens} tokens; {args.text}"
    draw(found, title, Path(args.output))
    for point in sorted(found, key=lambda point: point.perplexity):
        print(
            f"{point.format:<24} {point.recipe:<16} {point.tokens_s:10.1f} {point.perplexity:.3f}"
        )


if __name__ == "__main__":
    main()
