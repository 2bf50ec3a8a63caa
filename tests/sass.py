"""What nvcc makes of the CUDA kernels: their library for every architecture, logs, machine code.

Built once into build/cuda (minutes), then only what changed; tests that use it are slow. They need
nvcc, and cuobjdump and nvdisasm, which come with Triton; where these are missing they are skipped.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc"))

import build_kernels  # noqa: E402

ARCHITECTURES = build_kernels.ARCHITECTURES


@functools.cache
def built() -> tuple[Path, ...]:
    """The library for all architectures, and lowbit._launch where it can be built."""
    toolchain = build_kernels.find_toolchain()
    if isinstance(toolchain, str):
        pytest.skip(toolchain)
    return tuple(build_kernels.build(toolchain, ARCHITECTURES))


def tool(name: str) -> str:
    """cuobjdump or nvdisasm, of Triton or in PATH."""
    spec = importlib.util.find_spec("triton")
    bundled = spec and Path(spec.submodule_search_locations[0], "backends/nvidia/bin", name)
    found = str(bundled) if bundled and bundled.is_file() else shutil.which(name)
    return found or pytest.skip(f"needs {name}, which comes with triton")


def cuobjdump(*arguments) -> str:
    folder = str(Path(tool("nvdisasm")).parent)  # cuobjdump runs it
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        [tool("cuobjdump"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return done.stdout


def demangled(text: str) -> str:
    """Mangled names in a text as C++ writes them, where c++filt is installed."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def kernels_sass(library: Path, architecture: str) -> dict[str, str]:
    """Machine code of every kernel by its demangled name."""
    text = cuobjdump("-sass", "-arch", f"sm_{architecture}", library)
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)[1:]
    names = demangled("\n".join(parts[::2])).splitlines()
    return dict(zip(names, parts[1::2], strict=True))


def sass(library: Path, architecture: str, kernel: str) -> str:
    """Machine code of the kernels whose name, as C++ writes it, holds `kernel`.

    For example sass(built()[0], "90a", "quantize_kernel<float, ") holds that of each tile.
    """
    found = [code for name, code in kernels_sass(library, architecture).items() if kernel in name]
    assert found, f"no kernel {kernel!r} for sm_{architecture}"
    return "\n".join(found)


@functools.cache
def most_threads(library: Path, architecture: str) -> dict[str, int]:
    """A block's, as every kernel's launch bounds have them, by its demangled name."""
    text = cuobjdump("-elf", "-arch", f"sm_{architecture}", library)
    parts = re.split(r"^\.nv\.info\.(\S+)$", text, flags=re.M)[1:]
    bounds = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+) 0x1 0x1")
    names = demangled("\n".join(parts[::2])).splitlines()
    found = [int(bounds.search(info)[1], 16) for info in parts[1::2]]
    return dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class Compiled:
    """What ptxas said of a kernel for one architecture; bytes are a thread's."""

    source: str  # the object's name
    kernel: str  # mangled
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int  # stored and loaded


# All that ptxas says of a kernel that it has no complaint about
QUIET = re.compile(
    r"ptxas info\s+: (Compiling entry function|Function properties for|Used \d+ registers|"
    r"Compile time|Overriding|\d+ bytes [gc]mem)|"
    r"\s+\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads$|\s*$"
)


def logs() -> list[Path]:
    return sorted(built()[0].parent.glob("*.o.log"))


def complaints() -> list[str]:
    """Lines of the logs that are anything else: warnings, and C7510 of serialized wgmma."""
    return [
        f"{log.name}: {line}"
        for log in logs()
        for line in log.read_text().splitlines()
        if not QUIET.match(line)
    ]


def compiled() -> list[Compiled]:
    """Every kernel for every architecture."""
    return [kernel for log in logs() for kernel in parse_log(log.stem, log.read_text())]


def parse_log(source: str, text: str) -> list[Compiled]:
    """Of `-Xptxas -v`; functions that a kernel calls count as the kernel's."""
    found = []
    parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", text)[1:]
    for kernel, architecture, said in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes.*?, (\d+) bytes", said)
        found.append(
            Compiled(
                source,
                kernel,
                architecture,
                registers=int(re.search(r"Used (\d+) registers", said)[1]),
                stack_bytes=sum(int(stack) for stack, _, _ in frames),
                spilled_bytes=sum(int(stores) + int(loads) for _, stores, loads in frames),
            )
        )
    return found
