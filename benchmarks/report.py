"""One row per contender and case: a line of the table, a line of the CSV, an object of the JSON."""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from lowbit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Where:
    """Of every row: what it was measured on. launch: "graph" (CUDA graph replay) or "loop"."""

    launch: str = ""
    sm_mhz: str = ""
    memory_mhz: str = ""
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


def columns_of(kind: type[Where]) -> list[str]:
    """Of a CSV: what was measured, and then on what."""
    where = [field.name for field in fields(Where)]
    return [field.name for field in fields(kind) if field.name not in where] + where


@dataclass(frozen=True)
class Row(Where):
    """A contender is a backend of the op or a peer, the other column is empty. A row that was not
    timed says why in `why_not` and leaves its numbers at None.

    bytes, operations  counted from the op's contract; of a peer: those of the op it stands beside
    *_us               microseconds; cold: L2 flushed before each call; floor: measured roof
    gbs, tops          10^9 bytes and 10^12 operations a second, cold
    roof_percent       floor_us / cold_p50_us
    vs_torch, vs_best  cold time of torch, and of the fastest peer, over this one's
    plan               the tile, grid and split that a CUDA kernel's launcher chose
    """

    op: str
    backend: str
    peer: str
    shape: str
    dtype: str
    inputs: str
    why_not: str = ""
    bytes: int | None = None
    operations: int | None = None
    cold_p10_us: float | None = None
    cold_p50_us: float | None = None
    cold_p90_us: float | None = None
    warm_p10_us: float | None = None
    warm_p50_us: float | None = None
    warm_p90_us: float | None = None
    floor_us: float | None = None
    gbs: float | None = None
    tops: float | None = None
    roof_percent: float | None = None
    vs_torch: float | None = None
    vs_best: float | None = None
    plan: str = ""
    roof_copy_gbs: float | None = None
    roof_bf16_tops: float | None = None
    roof_int8_tops: float | None = None

    @property
    def contender(self) -> str:
        return self.backend or self.peer


COLUMNS = columns_of(Row)
_OF_TEXT = {str: str, int | None: int, float | None: float}
PARSERS = {field.name: _OF_TEXT[field.type] for field in fields(Row)}


def append_csv(path: Path, rows: list, columns: list[str] = COLUMNS):
    """Rows at the end of a CSV file, which is made with its header where there is none."""
    check_target(path, columns)
    is_new = _is_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(columns)
        writer.writerows([_cell(getattr(row, name)) for name in columns] for row in rows)


def _is_empty(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def check_target(path: Path, columns: list[str] = COLUMNS):
    """A file that rows are appended to is new, empty or begins with their columns."""
    if not _is_empty(path):
        check_header(path, columns)


def check_header(path: Path, columns: list[str] = COLUMNS):
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != columns:
        raise InputError(f"{path} must begin with the columns of a benchmark, got {header[:3]}...")


def read_csv(path: Path) -> list[Row]:
    check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: _parsed(PARSERS[name], text) for name, text in cells.items()})
            for cells in csv.DictReader(file)
        ]


def _parsed(parser: type, text: str):
    return None if text == "" and parser is not str else parser(text)


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


HEADER = (
    f"{'contender':<34} {'cold us p50 (p10-p90)':>26} {'warm us':>9} "
    f"{'GB/s':>6} {'TOP/s':>6} {'roof':>6} {'torch':>7} {'best':>7}"
)


def title(row: Row) -> str:
    return f"\n{row.op}  {row.shape}  {row.dtype}  ({row.inputs})"


def line(row: Row) -> str:
    """A row under its title() and HEADER; ratios above 1 are in favour of the row."""
    if row.why_not:
        return f"{row.contender:<34} not timed: {row.why_not}"
    cold = f"{row.cold_p50_us:.1f} ({row.cold_p10_us:.1f}-{row.cold_p90_us:.1f})"
    return (
        f"{row.contender:<34} {cold:>26} {row.warm_p50_us:>9.1f} "
        f"{_number(row.gbs):>6} {_number(row.tops):>6} {_number(row.roof_percent, '%'):>6} "
        f"{_number(row.vs_torch, 'x'):>7} {_number(row.vs_best, 'x'):>7}"
    ).rstrip() + (f"\n    {row.plan}" if row.plan else "")


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.2f}{unit}" if unit == "x" else f"{value:.3g}{unit}"
