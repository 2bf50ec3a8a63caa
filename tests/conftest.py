"""Before any test module is imported: no network. Tests that cannot run here are skipped.

Tests marked `emulate` run CUDA kernels: on a CPU in the emulator (emulator.py), on a GPU compiled.

Triton reads TRITON_INTERPRET when a kernel is defined, so a process either interprets all kernels
and runs the tests marked `interpret`, or compiles them and runs the others. With a GPU the latter
runs the tests marked `interpret` too, with its kernels compiled.
"""

import importlib.util
import inspect
import os
import sys
from pathlib import Path

import emulator
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/, which is not installed


def pytest_collection_modifyitems(items):
    import torch  # here, so that the line above comes before every import of transformers

    available = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if available else (0, 0)
    here = 10 * capability[0] + capability[1]
    no_triton = importlib.util.find_spec("triton") is None
    for item in items:
        wanted = [marker.args[0] for marker in item.iter_markers("sm")]
        interpret = item.get_closest_marker("interpret") is not None
        emulate = item.get_closest_marker("emulate") is not None
        if (wanted or item.get_closest_marker("gpu")) and not available:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif wanted and here not in wanted:
            item.add_marker(pytest.mark.skip(reason=f"needs sm_{wanted[0]}, this is sm_{here}"))
        elif emulate and not available and emulator.why_not():
            item.add_marker(pytest.mark.skip(reason=emulator.why_not()))
        elif interpret and no_triton:
            item.add_marker(pytest.mark.skip(reason="needs triton"))
        elif interpret != INTERPRETED and not (interpret and available):
            runs_with = "needs" if interpret else "not run with"
            item.add_marker(pytest.mark.skip(reason=f"{runs_with} TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def kernels_on_the_gpu(request, monkeypatch):
    """Tests marked `interpret` have their tensors on the CPU, where the interpreter needs them.

    The same holds for `emulate`. Compiled kernels get copies on the GPU, and what they return or
    write comes back: the test compares them with the reference on the CPU, whichever ran.
    """
    import torch

    moved = set()
    if request.node.get_closest_marker("interpret") and not INTERPRETED:
        moved.add("triton")
    if request.node.get_closest_marker("emulate") and torch.cuda.is_available():
        moved.add("cuda")
    if moved:
        from lowbit.ops.dispatch import Op

        on_cpu = Op.__call__

        def call(op, *args, backend=None):
            if backend not in moved:
                return on_cpu(op, *args, backend=backend)
            return run_on(op, args, "cuda", lambda *moved: on_cpu(op, *moved, backend=backend))

        monkeypatch.setattr(Op, "__call__", call)


@pytest.fixture
def seed():
    """The same random numbers, whichever tests ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    return emulator.build()


@pytest.fixture(autouse=True)
def emulated_kernels(request):
    """Without a GPU, tests marked `emulate` find their CUDA kernels in the emulator, as sm_90.

    With the marker's argument, emulate(80), as that architecture; on a GPU of another one they are
    skipped, but with emulate(80, later=True) run on those after it too: by the same kernels, or by
    those that take their place.
    """
    import torch

    from lowbit import cuda

    marker = request.node.get_closest_marker("emulate")
    if marker is None:
        yield
        return
    sm = marker.args[0] if marker.args else None
    if torch.cuda.is_available():
        later = marker.kwargs.get("later", False)
        if sm is not None and cuda.sm() != sm and not (later and cuda.sm() > sm):
            pytest.skip(f"needs sm_{sm}, this is sm_{cuda.sm()}")
        yield
        return
    library = request.getfixturevalue("emulated_library")
    before = cuda.use_library(library, emulator.NAMESPACE, "cpu", sm or 90)
    cuda.why_not_loaded()
    emulator.stand_for(sm or 90)
    yield
    cuda.LIBRARY = before


def run_on(op, args: tuple, device: str, run):
    """run(*args) with tensors on `device`; its outputs, and what it wrote in place, come back."""
    import torch

    moved = [copied(a, device) if isinstance(a, torch.Tensor) else a for a in args]
    out = run(*moved)
    names = inspect.signature(op.reference).parameters
    for name, arg, new in zip(names, args, moved, strict=False):  # the last may have defaults
        if name in op.mutates_args:
            arg.copy_(new)
    return tuple(t.cpu() for t in out) if isinstance(out, tuple | list) else out.cpu()


def copied(t, device: str):
    """A copy of all of t's memory on a device, seen through t's own strides."""
    memory = t.new_empty(0).set_(t.untyped_storage()).to(device, copy=True)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())
