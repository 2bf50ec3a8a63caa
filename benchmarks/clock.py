"""Timing: CUDA events around graph replays, or time.perf_counter; cold and warm L2.

Every time is in microseconds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS, FEWEST_REPEATS = 50, 10
BUDGET_US = 100_000  # of one contender's repeats, where that leaves FEWEST_REPEATS
WARM_CALLS = 10  # in one graph, so that the gap between launches is not what is timed
SHORT_US = 200  # longer calls hide that gap by themselves
CPU_FLUSH_BYTES = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Percentiles of the repeats of one call, in microseconds."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(deciles[0], statistics.median(samples), deciles[-1])


@dataclass(frozen=True)
class Prepared:
    """A call, warmed up, and where there are graphs captured.

    once, many  run it once, and `calls` times
    estimate    microseconds of one cold call, roughly
    """

    once: Callable[[], object]
    many: Callable[[], object]
    calls: int
    estimate: float
    is_graph: bool


class CpuClock:
    """The host's clock; caches are flushed by writing a buffer that no cache holds."""

    device = torch.device("cpu")

    def __init__(self):
        self._buffer = torch.empty(CPU_FLUSH_BYTES, dtype=torch.uint8)

    def prepare(self, run: Callable[[], object]) -> Prepared:
        run()
        return Prepared(run, run, 1, self.microseconds(self.span(run)), False)

    def flush(self):
        self._buffer.fill_(1)

    def span(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)

    def finish(self):
        pass

    def microseconds(self, span: float) -> float:
        return span


class CudaClock:
    """Events on the current stream; a graph where the call can be captured, a launch elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        L2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # Writing four times the L2 also takes longer than the host needs to enqueue a replay.
        self._buffer = torch.empty(4 * L2_bytes, dtype=torch.uint8, device=device)

    def prepare(self, run: Callable[[], object]) -> Prepared:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capture needs it: nothing is compiled or loaded in it
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.finish()
        once, is_graph = self._captured(run, 1)
        self.flush()
        span = self.span(once)
        self.finish()
        estimate = self.microseconds(span)
        if not is_graph or estimate > SHORT_US:
            return Prepared(once, once, 1, estimate, is_graph)
        many, _ = self._captured(run, WARM_CALLS)
        return Prepared(once, many, WARM_CALLS, estimate, True)

    def _captured(self, run: Callable[[], object], calls: int):
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one: a capture that fails leaves its stream current.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                for _ in range(calls):
                    run()
        except RuntimeError:  # it synchronizes or reads back
            torch.cuda.synchronize()
            return run, False
        return graph.replay, True

    def flush(self):
        self._buffer.fill_(1)

    def span(self, run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end

    def finish(self):
        torch.cuda.synchronize(self.device)

    def microseconds(self, span) -> float:
        return 1e3 * span[0].elapsed_time(span[1])


Clock = CpuClock | CudaClock


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def repeated(clock: Clock, prepared: Prepared) -> Timing:
    """Of one call again and again: of one so long that what lies in the L2 does not matter."""
    repeats = min(REPEATS, max(FEWEST_REPEATS, int(BUDGET_US / prepared.estimate)))
    spans = [clock.span(prepared.once) for _ in range(repeats)]
    clock.finish()
    return Timing.of([clock.microseconds(span) for span in spans])


def interleaved(clock: Clock, prepared: dict[str, Prepared]) -> dict[str, tuple[Timing, Timing]]:
    """(cold, warm) of each contender. They take turns, so that a clock that drifts meets all.

    Cold: the L2 is flushed before each call, outside the timed span. Warm: the call has just run.
    """
    slowest = max(p.estimate for p in prepared.values())
    repeats = min(REPEATS, max(FEWEST_REPEATS, int(BUDGET_US / slowest)))
    spans = {name: ([], []) for name in prepared}
    for _ in range(repeats):
        for name, p in prepared.items():
            clock.flush()
            spans[name][0].append(clock.span(p.once))
            p.once()
            spans[name][1].append(clock.span(p.many))
    clock.finish()
    timings = {}
    for name, (cold, warm) in spans.items():
        calls = prepared[name].calls
        timings[name] = (
            Timing.of([clock.microseconds(s) for s in cold]),
            Timing.of([clock.microseconds(s) / calls for s in warm]),
        )
    return timings
