"""What the numbers were measured on, and the roof they are compared with: measured, not quoted."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.clock import Clock, repeated

ROOT = Path(__file__).resolve().parents[1]
COPY_BYTES = {"cuda": [1 << log2 for log2 in (28, 30, 32)], "cpu": [1 << 24, 1 << 26]}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}  # M, N and K


@dataclass(frozen=True)
class Roof:
    """What this machine reached just now.

    copy_gbs     best device-to-device copy, 10^9 bytes read and written a second
    matmul_tops  10^12 operations a second of torch's matrix product, of "bf16" and of "int8"
    """

    copy_gbs: float
    matmul_tops: dict[str, float]

    def floor_us(self, nbytes: int, operations: int, rate: str) -> float:
        """Microseconds below which a call of so many bytes and operations cannot fall here."""
        return max(nbytes / self.copy_gbs / 1e3, operations / self.matmul_tops[rate] / 1e6)

    def __str__(self) -> str:
        rates = ", ".join(f"{rate} {tops:.4g} TOP/s" for rate, tops in self.matmul_tops.items())
        return f"roof measured: copy {self.copy_gbs:.4g} GB/s, {rates}"


def measure_roof(clock: Clock) -> Roof:
    kind = clock.device.type
    copy_gbs = 0.0
    for nbytes in COPY_BYTES[kind]:
        source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        seconds = _median_us(clock, lambda s=source, t=target: t.copy_(s)) / 1e6
        copy_gbs = max(copy_gbs, 2 * nbytes / seconds / 1e9)
    size = MATMUL_SIZE[kind]
    operands = {
        "bf16": torch.randn(2, size, size, device=clock.device, dtype=torch.bfloat16),
        "int8": torch.randint(-127, 128, (2, size, size), device=clock.device, dtype=torch.int8),
    }
    multiply = {"bf16": torch.mm, "int8": torch._int_mm}
    tops = {
        rate: 2 * size**3 / _median_us(clock, lambda r=rate, a=a, b=b: multiply[r](a, b.T)) / 1e6
        for rate, (a, b) in operands.items()
    }
    return Roof(copy_gbs, tops)


def _median_us(clock: Clock, run) -> float:
    return repeated(clock, clock.prepare(run)).p50


def facts(device: torch.device) -> dict[str, str]:
    """The columns of a row that tell where and when it was measured."""
    is_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU {platform.machine()}",
        "driver": nvidia_smi("driver_version")[0] if is_gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks in MHz as they are now: to be read while the device is still busy or just was."""
    columns = ("sm_mhz", "memory_mhz")
    if device.type != "cuda":
        return dict.fromkeys(columns, "")
    return dict(zip(columns, nvidia_smi("clocks.sm", "clocks.mem"), strict=True))


def nvidia_smi(*queries: str) -> list[str]:
    """What it says of the first GPU; empty strings where it cannot tell."""
    nothing = [""] * len(queries)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return nothing
    command = [tool, f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return nothing
    if done.returncode or not done.stdout:
        return nothing
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def commit() -> str:
    """The commit that is measured, "-dirty" where files were changed since; $GIT_COMMIT where the
    files came without their repository."""
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    return os.environ.get("GIT_COMMIT", "unknown")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
