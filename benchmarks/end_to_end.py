"""`lowbit bench model`: a whole model, lowbit's formats beside transformers in bf16.

    lowbit bench model --shapes llama3-8b --format w4a4kv4 --prompt 4096 --batch 1 64 --context 8192

    prefill         a prompt, to the logits of its last token: the time to the first token
    decode          one token a sequence, the last of `context` in the cache
    largest batch   sequences of `context` tokens that a decoding step has memory for; on a GPU

transformers runs as it is ("bf16") and compiled ("bf16 compiled"), both with torch's attention;
what lowbit is compared with is the faster one at that row. Everything that can be captured runs as
a CUDA graph, and a row says whether it did. Host work of generate() between tokens is in none.
"""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.clock import Clock, Timing, clock_of, repeated
from benchmarks.harness import reason_of
from benchmarks.shapes import Model, model_named
from benchmarks.whole_models import Contender, full_model, largest_batch, packed_model
from lowbit import cuda
from lowbit.errors import InputError
from lowbit.formats import QuantFormat

FORMATS = ("w4a4kv4", "w4a8kv4", "w8a8kv8", "w4a16kv4")
DEFAULT_PROMPTS = {"cuda": (128, 4096), "cpu": (16,)}
DEFAULT_BATCHES = {"cuda": (1, 16, 64), "cpu": (1,)}
DEFAULT_CONTEXTS = {"cuda": (1024, 8192), "cpu": (64,)}


@dataclass(frozen=True)
class Case:
    """phase as above; tokens: of the prompt, or of the context."""

    phase: str
    batch: int
    tokens: int


@dataclass(frozen=True)
class Row(report.Where):
    """One contender at one case. Numbers that there are not are None, and `why_not` says why.

    ms         milliseconds of one forward, percentiles
    tokens_s   tokens a second, of all sequences together
    vs_bf16    the time of the fastest bf16 over this one's; of largest batches this one's over it
    overlaps   1: with programmatic dependent launch of lowbit's kernels
    kv, weight, peak_bytes  of the cache, of all parameters, of torch's allocator during the row
    """

    model: str
    layers: int
    contender: str
    phase: str
    batch: int
    tokens: int
    ms_p10: float | None = None
    ms_p50: float | None = None
    ms_p90: float | None = None
    tokens_s: float | None = None
    largest_batch: int | None = None
    vs_bf16: float | None = None
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    overlaps: int = 0
    why_not: str = ""


COLUMNS = report.columns_of(Row)


@dataclass(frozen=True)
class Setup:
    """What is measured of one model: lowbit at `formats`, transformers as `peers`."""

    name: str
    model: Model
    num_layers: int | None
    formats: tuple[QuantFormat, ...]
    cases: tuple[Case, ...]
    compiled: bool

    def contenders(self, device: torch.device) -> Iterator[Contender]:
        """bf16 first; each model is gone before the next one is made."""
        full = full_model(self.name, self.model, self.num_layers, device)
        yield Contender("bf16", full)
        if self.compiled:
            yield Contender("bf16 compiled", full, compiled=True)
        del full
        for format in self.formats:
            packed = packed_model(self.name, self.model, format, self.num_layers, device)
            yield Contender(str(format), packed)
            del packed


def cases_of(prompts, batches, contexts) -> tuple[Case, ...]:
    return (
        *(Case("prefill", 1, tokens) for tokens in prompts),
        *(Case("decode", batch, tokens) for tokens in contexts for batch in batches),
        *(Case("largest batch", 0, tokens) for tokens in contexts),
    )


def run(args, device: torch.device) -> tuple[dict, str]:
    """The rows, printed as they are measured; (object for --json, last line for people)."""
    kind = device.type
    formats = tuple(QuantFormat.parse(name) for name in args.format or FORMATS)
    sizes = {
        "prompt": tuple(args.prompt or DEFAULT_PROMPTS[kind]),
        "batch": tuple(args.batch or DEFAULT_BATCHES[kind]),
        "context": tuple(args.context or DEFAULT_CONTEXTS[kind]),
        "layers": (1 if args.layers is None else args.layers,),
    }
    for name, values in sizes.items():
        if min(values) < 1:
            raise InputError(f"{name} must be positive, got {min(values)}")
    cases = cases_of(sizes["prompt"], sizes["batch"], sizes["context"])
    csv = Path(args.csv).expanduser() if args.csv else None
    if csv is not None:
        report.check_target(csv, COLUMNS)
    if args.overlap_launches:
        if kind != "cuda":
            raise InputError("--overlap-launches is for a GPU, got --device cpu")
        cuda.overlap_launches(True)
    where, clock, rows = machine.facts(device), clock_of(device), []
    print(", ".join(f"{name} {value}" for name, value in where.items() if value))
    for name in args.shapes or [{"cuda": "llama3-8b", "cpu": "tiny"}[kind]]:
        setup = Setup(name, model_named(name), args.layers, formats, cases, not args.no_compile)
        for row in measure(setup, clock):
            row = replace(row, **where, overlaps=int(args.overlap_launches))
            print(line(row), flush=True)
            rows.append(row)
            if csv is not None:
                report.append_csv(csv, [row], COLUMNS)
    text = f"{len(rows)} rows" + (f" in {csv}" if csv else "")
    return {"rows": [asdict(row) for row in rows]}, text


@torch.inference_mode()
def measure(setup: Setup, clock: Clock) -> Iterator[Row]:
    """Contender by contender: two models at once may not fit."""
    fastest: dict[Case, float] = {}  # of bf16: milliseconds, or the largest batch
    for contender in setup.contenders(clock.device):
        for case in setup.cases:
            row = _row(setup, contender, case, clock)
            _free(clock.device)
            own = row.ms_p50 or row.largest_batch
            if own and not contender.is_packed:
                better = min if row.ms_p50 else max
                fastest[case] = better(own, fastest.get(case, own))
            if own and case in fastest:
                best = fastest[case]
                row = replace(row, vs_bf16=best / own if row.ms_p50 else own / best)
            yield row
        del contender
        _free(clock.device)


def _row(setup: Setup, contender: Contender, case: Case, clock: Clock) -> Row:
    layers = setup.num_layers or setup.model.num_layers
    row = Row(setup.name, layers, contender.name, case.phase, case.batch, case.tokens)
    is_gpu = clock.device.type == "cuda"
    try:
        if case.phase == "largest batch":
            if not is_gpu:
                return replace(row, why_not="a GPU's memory is what it asks for")
            return replace(row, largest_batch=largest_batch(contender, case.tokens))
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(clock.device)
        make = contender.prefill if case.phase == "prefill" else contender.decode
        call = make(case.batch, case.tokens)
        prepared = clock.prepare(call.run)
        timing = repeated(clock, prepared)
    except torch.OutOfMemoryError as error:
        return replace(row, why_not=reason_of(error))
    tokens = case.batch * (case.tokens if case.phase == "prefill" else 1)
    return replace(
        row,
        **milliseconds(timing),
        tokens_s=tokens / timing.p50 * 1e6,
        weight_bytes=contender.weight_bytes,
        kv_bytes=call.kv_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(clock.device) if is_gpu else None,
        launch="graph" if prepared.is_graph else "loop",
        **machine.clocks(clock.device),
    )


def milliseconds(timing: Timing) -> dict[str, float]:
    return {f"ms_{name}": us / 1e3 for name, us in asdict(timing).items()}


def _free(device: torch.device):
    """What a case held: a graph's memory goes with the graph."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(row: Row) -> str:
    case = f"{row.model} ({row.layers} layers) {row.phase:<13} "
    case += f"batch {row.batch:<4}" if row.batch else " " * 10
    case += f" {row.tokens:>6} tokens  {row.contender:<14} "
    ratio = "" if row.vs_bf16 is None else f"  {row.vs_bf16:.2f}x"
    if row.why_not:
        return f"{case}not measured: {row.why_not}"
    if row.largest_batch is not None:
        return f"{case}{row.largest_batch} sequences{ratio}"
    memory = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 1e9:.2f}"
    return (
        f"{case}{row.ms_p50:.3f} ms ({row.ms_p10:.3f}-{row.ms_p90:.3f}, {row.launch})"
        f"  {row.tokens_s:.1f} tokens/s{ratio}"
        f"  GB: weights {row.weight_bytes / 1e9:.2f}, KV {row.kv_bytes / 1e9:.3f}{memory}"
    )
