"""The CUDA kernels: where their library lies, what it can run, and its ops.

The library is one file without Python in it, lowbit/_cuda.so, made by `make build` or by installing
lowbit where nvcc is. Importing this module does not load it: the first call with CUDA tensors does.
A backend's target is "lowbit.cuda:<op>", which is torch.ops.lowbit_cuda.<op>.

Tests point LIBRARY at one that runs the same kernels emulated, on CPU tensors (use_library).
"""

import ctypes
import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

NOT_BUILT = "the CUDA kernels are not built (make build, or install lowbit where nvcc is)"


@dataclass
class Library:
    """A library of kernels: its ops are torch.ops.<namespace>, on tensors of device_type."""

    path: Path
    namespace: str
    device_type: str
    sm: int | None = None  # what an emulator stands for; None: asked of the device


BUILT = Path(__file__).with_name("_cuda.so")
LIBRARY = Library(BUILT, "lowbit_cuda", "cuda")


def use_library(path: str | Path, namespace: str, device_type: str, sm: int | None) -> Library:
    """Take the ops from another library from now on; returns the one before, to restore LIBRARY."""
    global LIBRARY
    before, LIBRARY = LIBRARY, Library(Path(path), namespace, device_type, sm)
    return before


def why_not_cuda(*tensors: Tensor | None) -> str | None:
    """What every CUDA kernel needs: the library, and tensors on one GPU that it has code for.

    Without tensors, the answer is about the machine.
    """
    if not LIBRARY.path.exists():
        return NOT_BUILT
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    if devices and next(iter(devices)).type != LIBRARY.device_type:
        return f"the tensors are on {next(iter(devices))}"
    if not devices and LIBRARY.device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    reason = why_not_loaded()
    if reason or LIBRARY.device_type != "cuda":
        return reason
    return _why_not_here(LIBRARY.path, *devices)


@functools.cache
def _why_not_here(path: Path, device: torch.device | None = None) -> str | None:
    here, built = sm(device), _architectures(path)
    if any(runs_on(architecture, here) for architecture in built):
        return None
    return f"it is built for {', '.join(map(sm_name, built))}, this is sm_{here}"


def why_not_loaded() -> str | None:
    """Loads the library, or says why it cannot be."""
    return _load(LIBRARY.path) if LIBRARY.path.exists() else NOT_BUILT


@functools.cache
def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def __getattr__(name: str):
    """torch.ops.<namespace>.<op> of the library."""
    if name.startswith("_"):
        raise AttributeError(name)
    reason = why_not_loaded()
    if reason:
        raise AttributeError(f"no op {name}: {reason}")
    try:
        return getattr(getattr(torch.ops, LIBRARY.namespace), name)
    except AttributeError:
        raise AttributeError(
            f"no op {name} in {LIBRARY.path}: build it again (make build)"
        ) from None


def overlap_launches(enabled: bool):
    """Programmatic dependent launch of the kernels: each is scheduled while the one before it ends,
    which is meant to close the gaps between them: not measured, so off at first. Bits do not
    change. sm_90 and later, elsewhere nothing.

    RuntimeError where the library cannot be loaded.
    """
    reason = why_not_loaded()
    if reason:
        raise RuntimeError(reason)
    ctypes.CDLL(str(LIBRARY.path)).lowbit_overlap_launches(int(enabled))


def sm(device: torch.device | int | None = None) -> int:
    """80, 90, ...: the architecture of a device (default: the current one), or the emulator's."""
    if LIBRARY.sm is not None:
        return LIBRARY.sm
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _architectures(path: Path) -> tuple[str, ...]:
    function = ctypes.CDLL(str(path)).lowbit_archs
    function.restype = ctypes.c_char_p
    return tuple(filter(None, function().decode().split(",")))


def architectures() -> tuple[str, ...]:
    """What the loaded library has code for, such as ("80", "90a")."""
    return _architectures(LIBRARY.path)


def runs_on(architecture: str, here: int) -> bool:
    """Whether code for it runs on sm_<here>: later minor versions do, unless it ends in an a."""
    number = int(architecture.rstrip("a"))
    if architecture.endswith("a"):
        return here == number
    return here // 10 == number // 10 and here >= number


def sm_name(architecture: str) -> str:
    return f"sm_{architecture}"


def launch() -> ModuleType:
    """lowbit._launch: kernels(), attributes(i, device) and plan(op, numbers, sm, num_sms).

    It describes the library that is built into this package; RuntimeError says why it cannot.
    """
    reason = _load(BUILT) if BUILT.exists() else NOT_BUILT
    if reason:
        raise RuntimeError(reason)
    try:
        return importlib.import_module("lowbit._launch")
    except ImportError as error:
        raise RuntimeError(f"lowbit._launch is not built for this Python ({error})") from error
