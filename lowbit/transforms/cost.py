"""What rotations that run online cost on a GPU: how much of one can be learned for nothing.

A learned matrix is multiplied densely, a Hadamard matrix by a fast transform. DuaRot (equation 11)
finds no difference up to order 512 on an A100, and learns online rotations up to there. Here the
`hadamard` op is timed both ways on the GPU that quantizes, and what costs at most FACTOR times the
fast transform, whatever the number of rows, can be learned.

Times are kept in a file, by GPU, driver and lowbit: the same choice every time. Deleting it, or
what is no longer readable in it, has them measured again.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from lowbit import parallel
from lowbit.doctor import driver_version, installed_version
from lowbit.files import write_whole
from lowbit.hadamard import exists
from lowbit.models.source import cache_folder
from lowbit.ops import hadamard
from lowbit.transforms.online import OnlineTransform

FACTOR = 1.2  # what a learned rotation may cost: the fast one, and how far two timings are apart
ROWS = (1, 64, 2048)  # tokens of decoding one sequence, of many, of prefill
LARGEST_TRIED = 4096  # order of a matrix: its product alone is slower than any fast transform
WARM_UP, REPEATS, CALLS = 3, 15, 10
FILE = "rotation_costs.json"

Timer = Callable[[OnlineTransform, int], float]


class Costs:
    """timer  (transform, rows) -> microseconds on rows of its order
    machine   what the times are of
    file      a JSON object: machine -> transform -> microseconds at each of ROWS
    """

    def __init__(self, timer: Timer, machine: str, file: Path):
        self.timer, self.machine, self.file = timer, machine, file

    def of(self, transform: OnlineTransform) -> list[float]:
        """Microseconds at each of ROWS. The first process measures for all."""
        return parallel.first(lambda: self._of(transform))

    def _of(self, transform: OnlineTransform) -> list[float]:
        known, name = self._known(), str(transform.to_dict())
        times = known.setdefault(self.machine, {}).get(name)
        if not _are_times(times):
            times = [self.timer(transform, rows) for rows in ROWS]
            known[self.machine][name] = times
            text = json.dumps(known, indent=2) + "\n"
            with contextlib.suppress(OSError):  # a home that cannot be written: measured each time
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.file, lambda beside: beside.write_text(text))
        return times

    def _known(self) -> dict[str, dict]:
        try:
            found = json.loads(self.file.read_text())
            return {machine: dict(times) for machine, times in dict(found).items()}
        except (OSError, ValueError, TypeError):
            return {}

    def best_learned(self, dim: int, fast: OnlineTransform) -> OnlineTransform | None:
        """Of the learned rotations of order `dim` that cost no more than `fast`, the one with the
        most to learn; None where each costs more."""
        limits = [FACTOR * time for time in self.of(fast)]
        for learned in candidates(dim):
            if all(t <= limit for t, limit in zip(self.of(learned), limits, strict=True)):
                return learned
        return None


def candidates(dim: int) -> list[OnlineTransform]:
    """Dense, and A (x) B of two Hadamard orders, B a power of two; those with most to learn first.

    All orders are at most LARGEST_TRIED.
    """
    rights = [1 << i for i in range(1, dim.bit_length()) if dim % (1 << i) == 0]
    lefts = [1, *(dim // r for r in rights if r < dim and exists(dim // r))]
    found = [OnlineTransform("learned", dim, left=left) for left in lefts]
    found = [t for t in found if max(_orders(t)) <= LARGEST_TRIED]
    return sorted(found, key=lambda t: -sum(order**2 for order in _orders(t)))


def costs_on(device: torch.device) -> Costs | None:
    """Those of a CUDA device; None elsewhere: nothing is fast there, so that nothing is learned
    by it."""
    if device.type != "cuda":
        return None
    machine = (
        f"{torch.cuda.get_device_name(device)}, driver {driver_version()}, "
        f"lowbit {installed_version('lowbit')}"
    )
    return Costs(
        lambda transform, rows: microseconds(transform, rows, device),
        machine,
        cache_folder() / FILE,
    )


@torch.no_grad()
def microseconds(transform: OnlineTransform, rows: int, device: torch.device) -> float:
    """Median of a call on bf16 [rows, order], by CUDA events around CALLS of them."""
    width = transform.order * transform.inner
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    if transform.kind == "learned":
        eyes = (torch.eye(order, device=device) for order in _orders(transform))
        stages = list(zip(transform.stages, eyes, strict=True))
    else:
        matrix = transform.matrix
        stages = [(transform.stages[0], None if matrix is None else matrix.to(device))]

    def calls(number: int):
        for _ in range(number):
            y = x
            for (order, inner), matrix in stages:
                y = hadamard(y, order, inner, matrix)

    with torch.cuda.device(device):
        calls(WARM_UP)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # launch by launch it would be the host that is timed
            calls(CALLS)
        graph.replay()
        spans = []
        for _ in range(REPEATS):
            span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            span[0].record()
            graph.replay()
            span[1].record()
            spans.append(span)
        torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) / CALLS for start, end in spans)


def _orders(transform: OnlineTransform) -> list[int]:
    return [order for order, _ in transform.stages]


def _are_times(times) -> bool:
    return (
        isinstance(times, list)
        and len(times) == len(ROWS)
        and all(isinstance(t, float) and math.isfinite(t) and t > 0 for t in times)
    )
