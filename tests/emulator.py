"""The CUDA kernels compiled for the CPU (csrc/emulator), for tests marked `emulate`.

One shared library, built with g++ and ninja into build/emulated when a source has changed. It needs
the CUDA headers that come with nvcc, and no GPU.
"""

import ctypes
import fcntl
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/emulated"
LIBRARY = BUILD / "_emulated.so"
NAMESPACE = "lowbit_emulated"

# -O1: half the compile time of -O2 and nearly its speed. No contraction: a GPU's is pinned off too.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unknown-pragmas "
    "-DLOWBIT_EMULATE -DTORCH_TARGET_VERSION=0x020a000000000000"
)


def cuda_include() -> Path | None:
    """The headers beside nvcc, None where it is not installed."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for folder in (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")):
        if (folder / "include/cuda_fp16.h").is_file():
            return folder / "include"
    return None


def why_not() -> str | None:
    """What is missing to build it."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if cuda_include() is None:
        missing.append("the CUDA headers")
    return f"needs {' and '.join(missing)}" if missing else None


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    return sorted([*csrc.glob("*.cu"), *csrc.glob("common/*.cpp"), *csrc.glob("emulator/*.cpp")])


def ninja_file() -> str:
    """The build, as ninja reads it; all paths relative to BUILD."""
    torch_folder = Path(torch.__file__).parent
    includes = f"-I{ROOT / 'csrc'} -I{cuda_include()} -I{torch_folder / 'include'}"
    lines = [
        "rule compile",
        f"  command = g++ {FLAGS} {includes} -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $in -o $out -Wl,--no-as-needed -L{torch_folder / 'lib'} -ltorch",
    ]
    objects = []
    for source in sources():
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {LIBRARY.name}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build() -> Path:
    """The library's path, up to date; one process at a time builds. RuntimeError shows g++'s."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script, text = BUILD / "build.ninja", ninja_file()
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        done = subprocess.run(["ninja", "-C", str(BUILD)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels do not build:\n{done.stdout[-4000:]}")
    return LIBRARY


def stand_for(sm: int, num_sms: int = 4):
    """What the launchers take the device to be: the architecture, and how many SMs it has."""
    ctypes.CDLL(str(LIBRARY)).lowbit_emulate(sm, num_sms)
