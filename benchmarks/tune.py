"""`python -m benchmarks.tune OP`: which tile is fastest at which shape, as data.

A kernel's launcher takes its tile from a table, an attribute of a module. Here one candidate after
the other stands in for that table; each must pass the op's gate, then the fastest take turns with
the table as it is. Candidates are compiled and checked by several processes, timed by one.

What is written is what kernels/triton/tiles.py is edited from, by hand: where a tile should end
and the next begin is a choice between neighbouring shapes, and every entry is compiled for every
architecture by tests/test_compile.py.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.clock import Clock, clock_of, interleaved
from benchmarks.harness import Case, checked, reason_of
from benchmarks.machine import facts
from benchmarks.run import cases_of, device_named
from benchmarks.shapes import Setup, model_named
from lowbit.errors import InputError

BACKEND = "triton"
FINALISTS = 6  # of the candidates, by one cold call each
SMALLEST_BLOCK_M = 16  # of the matrix units; a GEMV has 1


@dataclass(frozen=True)
class Sweep:
    """table: "module:ATTRIBUTE" as the launcher reads it, a tuple of frozen dataclasses whose last
    entry is for any shape; dtype: that of the cases that read it; fields: values to combine for
    fields of an entry."""

    table: str
    dtype: str
    fields: dict[str, tuple[int, ...]]


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
    "int_gemm": Sweep("lowbit.kernels.int_gemm:INT_GEMM_TILES", "w4a8 bf16", _GEMM),
    "weight_only_gemm": Sweep(
        "lowbit.kernels.weight_only_gemm:WEIGHT_ONLY_TILES", "w4a16g128 bf16", _WEIGHT_ONLY
    ),
    "kv_attention": Sweep("lowbit.kernels.tiles:KV_ATTENTION_TILES", "bf16 x kv4", _ATTENTION),
}


@dataclass(frozen=True)
class Candidate:
    """One tile for one case, in a form that another process can rebuild both from."""

    stem: str
    setup: Setup
    index: int  # of the case among cases_of(stem, setup)
    table: str
    tile: object

    def case(self) -> Case:
        return next(itertools.islice(cases_of(self.stem, self.setup), self.index, None))


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


def tiles(sweep: Sweep, M: int) -> list:
    """Every combination of the fields whose rows are not mostly empty."""
    last = table_of(sweep.table)[-1]
    least = 1 if M == 1 else SMALLEST_BLOCK_M
    most = max(SMALLEST_BLOCK_M, 1 << (M - 1).bit_length())
    values = itertools.product(*sweep.fields.values())
    found = [replace(last, **dict(zip(sweep.fields, v, strict=True))) for v in values]
    return [t for t in found if least <= t.BLOCK_M <= most]


@torch.inference_mode()
def refused(candidate: Candidate) -> str | None:
    """Why a candidate cannot be used here; compiles it where it can."""
    with replaced(candidate.table, candidate.tile):
        return checked(candidate.case(), BACKEND)


@torch.inference_mode()
def fastest(clock: Clock, candidates: list[Candidate], case: Case) -> dict:
    """The winner's fields and its time, and the time of the table as it is, cold, in us."""
    torch.manual_seed(0)
    args = case.arguments(False)

    def run(candidate: Candidate):
        with replaced(candidate.table, candidate.tile):
            return case.call(args, BACKEND)

    prepared = {"table": clock.prepare(lambda: case.call(args, BACKEND))}
    for i, candidate in enumerate(candidates):
        try:
            prepared[i] = clock.prepare(lambda c=candidate: run(c))
        except RuntimeError as error:  # no memory for one more graph: time the others
            print(f"  {candidate.tile}: {reason_of(error)}", file=sys.stderr)
    first = sorted(prepared, key=lambda name: prepared[name].estimate)[:FINALISTS]
    timings = interleaved(clock, {name: prepared[name] for name in {*first, "table"}})
    cold = {name: timing[0] for name, timing in timings.items()}
    best = min((name for name in cold if name != "table"), key=lambda i: cold[i].p50)
    return {
        "tile": asdict(candidates[best].tile),
        "us": asdict(cold[best]),
        "table_us": asdict(cold["table"]),
    }


def tune(stem: str, sweep: Sweep, setup: Setup, jobs: int) -> Iterator[dict]:
    """The fastest tile of every case of the op that the sweep is for."""
    clock = clock_of(setup.device)
    spawn = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    with spawn.Pool(jobs) as pool:
        for M in setup.rows:
            rows = replace(setup, rows=(M,))
            for index, case in enumerate(cases_of(stem, rows)):
                if case.dtype != sweep.dtype or case.variant:
                    continue
                all_tiles = tiles(sweep, M)
                candidates = [Candidate(stem, rows, index, sweep.table, t) for t in all_tiles]
                reasons = pool.map(refused, candidates, chunksize=1)
                right = [c for c, r in zip(candidates, reasons, strict=True) if r is None]
                where = {"op": stem, "table": sweep.table, "shape": case.shape, "dtype": case.dtype}
                if not right:
                    raise InputError(f"{stem} {case.shape}: no candidate is right: {reasons[0]}")
                result = {**where, **fastest(clock, right, case)}
                print(line(result, len(right), len(candidates)), flush=True)
                yield result


def line(result: dict, right: int, candidates: int) -> str:
    tile = " ".join(f"{k}={v}" for k, v in result["tile"].items() if not k.startswith("max_"))
    return (
        f"{result['op']}  {result['shape']}  {tile}: {result['us']['p50']:.1f} us, the table "
        f"{result['table_us']['p50']:.1f} us ({right} of {candidates} candidates right)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("op", choices=SWEEPS)
    parser.add_argument("--shapes", default="llama3-8b")
    parser.add_argument("--M", nargs="+", type=int, default=[1, 16, 64, 512, 2048])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--table", help="module:ATTRIBUTE, another table than the op's first")
    parser.add_argument("--dtype", help="of the cases that read it, as `lowbit bench` names it")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile and check")
    parser.add_argument("--device")
    parser.add_argument("-o", "--output", default="tiles.jsonl", help="JSON lines, appended")
    args = parser.parse_args()
    sweep = SWEEPS[args.op]
    sweep = replace(sweep, table=args.table or sweep.table, dtype=args.dtype or sweep.dtype)
    try:
        device = device_named(args.device)
        setup = Setup(model_named(args.shapes), tuple(args.M), tuple(args.context), device)
        where = facts(device)
        with Path(args.output).open("a", encoding="utf-8") as file:
            for result in tune(args.op, sweep, setup, args.jobs):
                # Infinity, where a tile is for any size, is what Python's json writes and reads
                print(json.dumps({**where, **result}), file=file, flush=True)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
