"""`lowbit bench`: which cases, on what, and where the rows go."""

import importlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import end_to_end, machine, report
from benchmarks.clock import clock_of
from benchmarks.harness import Case, run_case
from benchmarks.shapes import CONTEXTS, ROWS, Setup, model_named
from lowbit.errors import InputError
from lowbit.ops.dispatch import BACKENDS

WHOLE = "model"  # as an op's name: benchmarks/end_to_end.py

# Where no option says otherwise. On a CPU the reference is timed, to try the benchmarks themselves.
DEFAULT_SHAPES = {"cuda": ["llama3-8b"], "cpu": ["tiny"]}
DEFAULT_ROWS = {"cuda": ROWS, "cpu": (1, 16)}
DEFAULT_CONTEXTS = {"cuda": CONTEXTS, "cpu": (64,)}


def op_stems() -> list[str]:
    """The ops that have a benchmark."""
    return sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))


def cases_of(stem: str, setup: Setup) -> Iterator[Case]:
    return importlib.import_module(f"benchmarks.bench_{stem}").cases(setup)


def device_named(name: str | None) -> torch.device:
    """A GPU is what speed is about: the CPU is taken only by name."""
    if name == "cpu":
        return torch.device("cpu")
    if name not in (None, "cuda"):
        raise InputError(f"device must be 'cuda' or 'cpu', got {name!r}")
    if not torch.cuda.is_available():
        raise InputError("no CUDA device to measure; --device cpu times the references instead")
    return torch.device("cuda", torch.cuda.current_device())


def backends_for(device: torch.device, name: str | None) -> list[str]:
    if name is not None:
        return [name]
    return [b for b in BACKENDS if (b == "reference") == (device.type == "cpu")]


def selected(names: list[str]) -> list[str]:
    stems = op_stems()
    for name in names:
        if name not in stems:
            raise InputError(
                f"op must be one of {', '.join(stems)}, or {WHOLE!r} alone, got {name!r}"
            )
    return names or stems


def _refuse(args, names: tuple[str, ...], of: str):
    for name in names:
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is for {of}")


def positive(name: str, values: list[int]):
    if min(values) < 1:
        raise InputError(f"{name} must be positive, got {min(values)}")


def run(args) -> tuple[dict, str]:
    """The rows, printed as they are measured; (object for --json, last line for people)."""
    if args.op == [WHOLE]:
        _refuse(args, ("M", "backend"), "one op, got a whole model")
        return end_to_end.run(args, device_named(args.device))
    of_models = ("format", "prompt", "batch", "layers", "no_compile", "overlap_launches")
    _refuse(args, of_models, "lowbit bench model")
    stems, device = selected(args.op), device_named(args.device)
    kind = device.type
    models = [model_named(name) for name in args.shapes or DEFAULT_SHAPES[kind]]
    rows, contexts = args.M or DEFAULT_ROWS[kind], args.context or DEFAULT_CONTEXTS[kind]
    positive("M", rows)
    positive("context", contexts)
    csv = Path(args.csv).expanduser() if args.csv else None
    if csv is not None:
        report.check_target(csv)
    setups = [Setup(model, tuple(rows), tuple(contexts), device) for model in models]
    return measure(stems, setups, backends_for(device, args.backend), csv)


def measure(
    stems: list[str], setups: list[Setup], backends: list[str], csv: Path | None
) -> tuple[dict, str]:
    device = setups[0].device
    clock = clock_of(device)
    where = machine.facts(device)
    roof = machine.measure_roof(clock)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value))
    print(f"{roof}\n{report.HEADER}", flush=True)
    found, seen = [], set()
    for stem in stems:
        for case in (case for setup in setups for case in cases_of(stem, setup)):
            key = (case.name, case.shape, case.dtype)
            if key in seen:  # models share shapes
                continue
            seen.add(key)
            rows = [replace(row, **where) for row in run_case(case, backends, clock, roof)]
            print(report.title(rows[0]), *map(report.line, rows), sep="\n", flush=True)
            if csv is not None:
                report.append_csv(csv, rows)
            found += rows
    not_timed = sum(bool(row.why_not) for row in found)
    wrong = sum(row.why_not.startswith("wrong") for row in found)
    text = f"\n{len(found)} rows, {not_timed} not timed, {wrong} of them wrong"
    result = {"roof": asdict(roof), "wrong": wrong, "rows": [asdict(row) for row in found]}
    return result, text + (f"; in {csv}" if csv else "")
