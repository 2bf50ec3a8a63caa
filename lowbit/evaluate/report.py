"""One page, in Markdown, of a checkpoint: what it is, and all that was measured of it.

Nothing is measured here: results come from the checkpoint's evaluation.jsonl and its config.json,
and a part without one says which command fills it.
"""

from dataclasses import dataclass

from lowbit.config import LowbitConfig
from lowbit.evaluate import zero_shot
from lowbit.evaluate.size import Size


@dataclass(frozen=True)
class Page:
    """folder   as the user gave it
    lines    of evaluation.jsonl, oldest first
    figure   of activations, as the page links to it; else why there is none
    """

    folder: str
    config: LowbitConfig
    model_type: str
    size: Size
    on_disk: int
    lines: list[dict]
    figure: str | None
    why_no_figure: str

    def markdown(self) -> str:
        parts = [
            f"# {self.folder.rstrip('/').rpartition('/')[2]}",
            self._what(),
            "## Perplexity",
            self._perplexities(),
            "## Tasks",
            self._tasks(),
            "## Sizes",
            self._sizes(),
            "## Speed",
            self._speeds(),
            "## Errors, layer by layer",
            self._errors(),
            "## Activations before and after",
            f"![inputs before and after]({self.figure})" if self.figure else self.why_no_figure,
        ]
        return "\n\n".join(parts) + "\n"

    def _what(self) -> str:
        report = self.config.report
        windows = report.get("calibration")
        calibration = "none" if windows is None else f"{windows[0]} windows of {windows[1]} tokens"
        rows = [
            ["recipe", f"{self.config.recipe} ({report.get('source', 'not recorded')})"],
            ["format", self.config.format.name],
            ["architecture", self.model_type],
            ["calibration", calibration],
            ["seed", str(report.get("seed", "not recorded"))],
            ["transforms", "; ".join(report.get("transforms", [])) or "none"],
        ]
        return table(["", ""], rows)

    def _perplexities(self) -> str:
        last = {}
        for line in self.lines:
            if "perplexity" in line:
                of = line["of"]
                last[line["text"], line["window"], line["windows"], of["kind"], _as(of)] = line
        if not last:
            return self._not_measured("--text wikitext2")
        head = ["text", "windows", "of", "as", "perplexity", "word perplexity"]
        rows = [
            [
                line["text"],
                f"{line['windows']} x {line['window']}",
                line["of"]["kind"],
                _as(line["of"]),
                _number(line["perplexity"]) + f" +- {_number(line['standard_error'])}",
                _number(line["word_perplexity"]) if "word_perplexity" in line else "not measured",
            ]
            for line in last.values()
        ]
        return table(head, rows)

    def _tasks(self) -> str:
        last = {}
        for line in self.lines:
            if "task" in line:
                of = line["of"]
                last[line["task"], of["kind"], _as(of), of["items"]] = line
        if not last:
            return self._not_measured("--tasks commonsense")
        rows = [
            [task, kind, how, "all" if items == "None" else items, _metrics(line["metrics"])]
            for (task, kind, how, items), line in last.items()
        ]
        return table(["task", "of", "as", "items", "metrics"], rows)

    def _sizes(self) -> str:
        size = self.size
        rows = [
            [name, f"{packed / 1e6:.1f} MB", f"{bf16 / 1e6:.1f} MB", ratio(packed, bf16)]
            for name, packed, bf16 in (
                ("linears", size.linears, size.linears_bf16),
                ("whole model in memory", size.model, size.model_bf16),
                ("on disk", self.on_disk, size.model_bf16),
            )
        ]
        return table(["", "packed", "bf16", "ratio"], rows)

    def _speeds(self) -> str:
        measured = [line for line in self.lines if "speed" in line]
        last = {(line["speed"]["hardware"], _as(line["of"])): line for line in measured}
        if not last:
            return f"Not measured: `lowbit report {self.folder} --speed`"
        rows = [
            [
                hardware,
                how,
                f"{line['speed']['prefill']:.1f} of {line['speed']['prompt']}",
                f"{line['speed']['decode']:.1f} of {line['speed']['new']}",
            ]
            for (hardware, how), line in last.items()
        ]
        return table(["on", "as", "prefill, tokens/s", "decode, tokens/s"], rows)

    def _errors(self) -> str:
        """What the recipe measured while it rounded: of each linear, scaled space and block."""
        report, parts = self.config.report, []
        for kind, key, title in (
            ("rounding", "relative_error", "Of linears' outputs on the calibration windows"),
            ("scales", "error", "Of what reads each scaled space"),
        ):
            found = {name: each[key] for name, each in report.get(kind, {}).items() if key in each}
            if found:
                parts += [f"{title}:", by_block(found)]
        blocks = {name: each for name, each in report.get("blocks", {}).items() if "error" in each}
        if blocks:
            rows = [
                [name, *(_number(e) for e in (_at_first(each), each["error"]))]
                for name, each in blocks.items()
            ]
            parts += ["Of whole blocks' outputs:", table(["block", "at first", "learned"], rows)]
        return "\n\n".join(parts) or f"Not measured: {self.config.recipe} does not calibrate."

    def _not_measured(self, options: str) -> str:
        return f"Not measured: `lowbit eval {self.folder} {options}`"


def by_block(found: dict[str, float]) -> str:
    """ "3.mlp.up_proj" -> error, as a table: a line a block, a column a name; "-": none."""
    names = list(dict.fromkeys(name.partition(".")[2] for name in found))
    blocks = list(dict.fromkeys(name.partition(".")[0] for name in found))
    rows = [[block, *(_number(found.get(f"{block}.{name}")) for name in names)] for block in blocks]
    return table(["block", *names], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ratio(packed: int, bf16: int) -> str:
    return f"{packed / bf16:.3f}" if bf16 else "-"


def _at_first(block: dict) -> float | None:
    """Before anything was learned: of weights rounded to nearest, or of the maps it began with."""
    return block.get("rtn_error", block.get("start_error"))


def _as(of: dict[str, str]) -> str:
    backend = "" if of["backend"] == "None" else f", {of['backend']}"
    how = "".join(f", {of[name]}" for name in ("decode", "prefill") if name in of)
    return f"{of['dtype']} on {of['device']}{backend}{how}"


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(zero_shot.figures(metrics))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:.4f}"
