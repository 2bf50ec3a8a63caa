"""`python -m benchmarks.tune OP`: measures tiles and writes the tables of kernels/triton/tiles.py.

A kernel's launcher takes its tile from a table, an attribute of a module. Here one candidate after
the other stands in for that table; each must pass the op's gate at every shape that reaches an
entry, then the fastest take turns with the entry's own. Candidates are compiled and checked by
several processes, timed by one.

Each shape is a JSON line in the output once it is measured; the tables are written from those lines
at the end, by the rule of benchmarks/tables.py. `--from FILE` writes them from the lines alone, on
any machine: after a run that was killed, or that ran elsewhere. What an entry is for is chosen by
hand: to split one, give the table a line more and measure again.

tests/test_compile.py compiles every entry for every architecture. Where it cannot, write again with
that tile left out, as in `--without BLOCK_M=128 BLOCK_N=256`.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.clock import Clock, Prepared, clock_of, interleaved
from benchmarks.harness import Case, checked, reason_of
from benchmarks.machine import facts
from benchmarks.run import cases_of, device_named
from benchmarks.shapes import Setup, model_named
from benchmarks.workers import Workers
from lowbit.errors import InputError
from lowbit.kernels import tiles
from lowbit.kernels.tiles import SMALLEST_BLOCK_M, head_words, limit_names

BACKEND = "triton"
FINALISTS = 6  # of the candidates, by one cold call at each shape


def gemm_sizes(case: Case) -> dict[str, int]:
    return {name: _number(rf"\b{name}=(\d+)", case.shape) for name in ("M", "N")}


def attention_sizes(case: Case) -> dict[str, int]:
    """As kv_attention's launcher counts them; a sequence has so many queries."""
    names = ("queries", "heads", "kv_heads", "head_dim")
    queries, heads, kv_heads, head_dim = (_number(rf"\b{n}=(\d+)", case.shape) for n in names)
    words = head_words(head_dim, _number(r"kv(\d+)", case.dtype))
    return {"rows": heads // kv_heads * queries, "head_dim": head_dim, "words": words}


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


@dataclass(frozen=True)
class Sweep:
    """table: "module:ATTRIBUTE" as the launcher reads it, by its name in tiles.py; dtype: that of
    the cases that read it; sizes: what the entry of a case is found by; fields: values to combine
    for fields of an entry."""

    table: str
    dtype: str
    sizes: Callable[[Case], dict[str, int]]
    fields: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        return self.table.partition(":")[2]


_GEMM = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
}
_WEIGHT_ONLY = {**_GEMM, "BLOCK_M": (1, 16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}
_ATTENTION = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (2, 3, 4),
}
SWEEPS = {
    "int_gemm": Sweep("lowbit.kernels.int_gemm:INT_GEMM_TILES", "w4a8 bf16", gemm_sizes, _GEMM),
    "weight_only_gemm": Sweep(
        "lowbit.kernels.weight_only_gemm:WEIGHT_ONLY_TILES",
        "w4a16g128 bf16",
        gemm_sizes,
        _WEIGHT_ONLY,
    ),
    "kv_attention": Sweep(
        "lowbit.kernels.tiles:KV_ATTENTION_TILES", "bf16 x kv4", attention_sizes, _ATTENTION
    ),
}


@dataclass(frozen=True)
class Place:
    """A case, in a form that another process can rebuild it from."""

    stem: str
    setup: Setup
    index: int  # of the case among cases_of(stem, setup)

    def case(self) -> Case:
        return next(itertools.islice(cases_of(self.stem, self.setup), self.index, None))


@dataclass(frozen=True)
class Candidate:
    """One tile for one case."""

    place: Place
    table: str
    tile: object


def table_of(name: str) -> tuple:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def replaced(table: str, tile):
    """The module's table holds this tile alone."""
    name, attribute = table.split(":")
    module = importlib.import_module(name)
    before = getattr(module, attribute)
    setattr(module, attribute, (tile,))
    try:
        yield
    finally:
        setattr(module, attribute, before)


def candidates(sweep: Sweep, entry, rows: int) -> list:
    """The entry's own tile, then every combination of the fields whose rows are not mostly empty at
    so many; for any shape, whatever the entry is for, as they stand in for the whole table."""
    limits = limit_names(type(entry))
    for_any = replace(entry, **{limit: tiles.ANY for limit in limits})
    least = 1 if getattr(entry, limits[0]) == 1 else SMALLEST_BLOCK_M
    most = max(SMALLEST_BLOCK_M, 1 << (rows - 1).bit_length())
    values = itertools.product(*sweep.fields.values())
    found = [replace(for_any, **dict(zip(sweep.fields, v, strict=True))) for v in values]
    return list(dict.fromkeys([for_any, *(t for t in found if least <= t.BLOCK_M <= most)]))


@torch.inference_mode()
def refused(candidate: Candidate) -> tuple[str | None, bool]:
    """Why a candidate cannot be used here, having compiled it where it can; and whether it left
    this process without a working GPU, as any error of a running kernel does."""
    with replaced(candidate.table, candidate.tile):
        reason = checked(candidate.place.case(), BACKEND)
    if reason is None or not torch.cuda.is_initialized():
        return reason, False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return reason, True
    return reason, False


@torch.inference_mode()
def prepared(clock: Clock, table: str, found: list, case: Case) -> dict[int, Prepared]:
    """The calls of those that there is memory for, by index."""
    torch.manual_seed(0)
    args = case.arguments(False)

    def run(tile):
        with replaced(table, tile):
            return case.call(args, BACKEND)

    ready = {}
    for i, tile in enumerate(found):
        try:
            ready[i] = clock.prepare(lambda t=tile: run(t))
        except RuntimeError as error:  # no memory for one more graph: time the others
            print(f"  {tables.text_of(tile)}: {reason_of(error)}", file=sys.stderr)
    return ready


def finalists(clock: Clock, table: str, found: list, cases: list[Case]) -> list:
    """The first, and those that are fastest by one cold call at each case."""
    product = dict.fromkeys(range(len(found)), 1.0)
    for case in cases:
        ready = prepared(clock, table, found, case)
        product = {i: product[i] * ready[i].estimate for i in product if i in ready}
    best = sorted(product, key=product.get)[:FINALISTS]
    return [found[i] for i in sorted({0, *best})]


def entry_results(
    clock: Clock, workers: Workers, sweep: Sweep, entry, places: list[Place]
) -> Iterator[dict]:
    """What is measured of one entry, a case a dict: its own tile, always, and the fastest. (A case
    without memory for the first tile has none.)"""
    cases = [place.case() for place in places]
    rows = max(next(iter(sweep.sizes(case).values())) for case in cases)
    found = candidates(sweep, entry, rows)
    why_not: dict[object, str] = {}
    for place in places:
        left = [tile for tile in found if tile not in why_not]
        reasons = workers.map(refused, [Candidate(place, sweep.table, tile) for tile in left])
        why_not.update((t, reason) for t, reason in zip(left, reasons, strict=True) if reason)
    right = [tile for tile in found if tile not in why_not]
    print(f"{sweep.name} {tables.text_of(entry)}: {len(right)} of {len(found)} candidates right")
    own_reason = why_not.get(found[0], "")
    if not right or own_reason.startswith("not checked"):  # no memory, say: no fault of the tile's
        print(f"  not measured: {own_reason}", file=sys.stderr)
        return
    final = finalists(clock, sweep.table, right, cases)
    for case in cases:
        ready = prepared(clock, sweep.table, final, case)
        if 0 not in ready:  # nothing to compare the others with
            print(f"  {case.shape}: not measured", file=sys.stderr)
            continue
        timings = interleaved(clock, ready)
        timed = [
            {"tile": tables.tile_of(final[i]), "us": asdict(cold)}
            for i, (cold, _) in timings.items()
        ]
        if found[0] in why_not:
            timed.append({"tile": tables.tile_of(found[0]), "why_not": why_not[found[0]]})
        yield {"shape": case.shape, "sizes": sweep.sizes(case), "tiles": timed}


def tune(stem: str, sweep: Sweep, setups: list[Setup], jobs: int) -> Iterator[dict]:
    """Every case of the op that the sweep is for, entry after entry."""
    clock = clock_of(setups[0].device)
    table = table_of(sweep.table)
    places: dict[int, dict[str, Place]] = {}  # by entry, and by shape, which models share
    for setup in setups:
        for index, case in enumerate(cases_of(stem, setup)):
            if case.dtype == sweep.dtype and not case.variant:
                entry = tables.entry_for(table, sweep.sizes(case))
                places.setdefault(entry, {}).setdefault(case.shape, Place(stem, setup, index))
    if not places:
        raise InputError(f"no case of {stem} is {sweep.dtype!r}")
    where = {"op": stem, "table": sweep.name, "dtype": sweep.dtype}
    with Workers(jobs) as workers:
        for entry, of_entry in sorted(places.items()):
            found = entry_results(clock, workers, sweep, table[entry], list(of_entry.values()))
            for result in found:
                print(f"  {result['shape']}: {fastest_text(result)}", flush=True)
                yield {**where, **result}


def fastest_text(result: dict) -> str:
    best = min((t for t in result["tiles"] if "us" in t), key=lambda t: t["us"]["p50"])
    tile = " ".join(f"{k}={v}" for k, v in best["tile"].items())
    return f"{tile} {best['us']['p50']:.1f} us, of {len(result['tiles'])}"


def append(path: Path, lines: Iterator[dict]):
    """JSON lines, each there once it is measured; one that a killed run left unfinished goes."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        for line in lines:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()


def sweep_to(path: Path, args):
    sweep = SWEEPS[args.op]
    sweep = replace(sweep, table=args.table or sweep.table, dtype=args.dtype or sweep.dtype)
    known = tiles.read()
    if sweep.name not in known:
        raise InputError(f"table must be module:NAME, NAME among {', '.join(known)}")
    if path.exists():
        list(tables.read_results(path, known))  # nothing is appended to another file
    device = device_named(args.device)
    setups = [
        Setup(model_named(name), tuple(args.M), tuple(args.context), device) for name in args.shapes
    ]
    where = facts(device)
    append(path, ({**where, **line} for line in tune(args.op, sweep, setups, args.jobs)))


def write_tables(paths: list[Path], without: list[dict[str, int]]):
    """The tables from the lines of the files, and what became of every measured entry."""
    before = tiles.read()
    results = [result for path in paths for result in tables.read_results(path, before)]
    after, lines = tables.rewritten(before, results, without)
    changed = tables.write(tiles.FOLDER, after)
    print(*lines, sep="\n")
    print(f"written: {', '.join(path.name for path in changed) or 'nothing new'}")


def tile_sizes(texts: list[str]) -> dict[str, int]:
    """BLOCK_M=128 BLOCK_N=256"""
    if not all(re.fullmatch(r"\w+=\d+", text) for text in texts):
        raise InputError(f"without must be like BLOCK_M=128, got {' '.join(texts)}")
    return {name: int(value) for name, value in (text.split("=") for text in texts)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", choices=SWEEPS, nargs="?")
    parser.add_argument("--from", nargs="+", type=Path, dest="files", help="write from these alone")
    parser.add_argument(
        "--without", nargs="+", action="append", default=[], metavar="FIELD=SIZE",
        help="a tile to leave out, by some of its sizes; may be given again",
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b"])
    parser.add_argument("--M", nargs="+", type=int, default=[1, 16, 64, 512, 2048])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--table", help="module:ATTRIBUTE, another table than the op's first")
    parser.add_argument("--dtype", help="of the cases that read it, as `lowbit bench` names it")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile and check")
    parser.add_argument("--device")
    parser.add_argument(
        "-o", "--output", type=Path, default="tiles.jsonl",
        help="JSON lines, appended; the tables are written from all of them",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if (args.op is None) == (args.files is None):
        parser.error("an op to measure, or --from files to write from")
    try:
        without = [tile_sizes(texts) for texts in args.without]
        if args.op:
            sweep_to(args.output, args)
        write_tables(args.files or [args.output], without)
    except (InputError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
