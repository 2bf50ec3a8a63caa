"""How much memory a stretch of a program needed at its peak."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # man 5 proc: VmHWM starts again at what is resident now
SLACK = 16 << 20  # by which the kernel's two counts may differ at the same moment


@dataclass
class Peak:
    """bytes: None where it cannot be measured: without CUDA, another system than Linux, or one
    that does not let the process start its peak anew."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device):
    """Yields a Peak that is filled at the end: of torch's memory on a CUDA device, else of all that
    the process holds in RAM, the model it began with included."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK)
    before = _resident()
    # Some systems take the request and do nothing: a peak of the past shows it.
    anew = before is not None and before["VmHWM"] <= before["VmRSS"] + SLACK
    yield peak
    if anew:
        peak.bytes = _resident()["VmHWM"]


def _resident() -> dict[str, int] | None:
    """Bytes resident now and at the peak; None on a system that does not say."""
    if not STATUS.is_file():
        return None
    found = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    if not {"VmHWM", "VmRSS"} <= found.keys():
        return None
    return {name: int(found[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}
