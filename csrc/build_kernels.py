"""Builds the CUDA kernels: lowbit/_cuda.so and lowbit/_launch.<abi>.so (make build, setup.py).

csrc/*.cu and csrc/common/*.cpp become _cuda.so: no Python in it, torch's stable ABI, and the CUDA
runtime linked statically, so that one file serves every torch from 2.10 on, with CUDA or without.
csrc/bindings.cpp becomes _launch, for this Python: what is in the library, for `lowbit doctor`.
ninja runs nvcc; objects, and beside each what ptxas said of its kernels (registers, spills), are in
build/cuda/<architectures>.

Settings, by environment, of the build alone:
  LOWBIT_CUDA_ARCHS  such as "80 90a" (default: of the GPUs here, or all where there is none)
  LOWBIT_SKIP_CUDA   1: do not build
  CUDA_HOME          where nvcc is (default: PATH, then /usr/local/cuda)
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
OLDEST_TORCH, TORCH_TARGET_VERSION = (2, 10), "0x020a000000000000"
LIBRARY = "_cuda.so"
LAUNCH = "_launch" + sysconfig.get_config_var("EXT_SUFFIX")
HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-fmad=false",  # rounds after each operation, as the references do; fmaf() fuses where meant
    "-Xptxas=-v",
    "-Xfatbin=-compress-all",  # a quarter of the size
    f"-Xcompiler={HOST_FLAGS}",
)
LINK = ("-shared", "-cudart=static", "--no-device-link", f"-Xlinker=-soname={LIBRARY}")


class BuildError(RuntimeError):
    """A mistake in the settings, or a compiler's complaint."""


@dataclass(frozen=True)
class Toolchain:
    """What it takes; `why_no_launch` is the reason for building without _launch, or None."""

    nvcc: str
    ninja: str
    torch: Path  # the package's folder
    why_no_launch: str | None
    launch_includes: tuple[str, ...]


def find_toolchain(environment=os.environ) -> Toolchain | str:
    """The toolchain, or the reason why there is none."""
    if environment.get("LOWBIT_SKIP_CUDA") == "1":
        return "LOWBIT_SKIP_CUDA=1"
    nvcc = find_nvcc(environment)
    if nvcc is None:
        return "nvcc is not in $CUDA_HOME/bin, PATH or /usr/local/cuda/bin"
    torch = find_torch()
    if isinstance(torch, str):
        return torch
    ninja = find_ninja()
    if ninja is None:
        return "ninja is not installed"
    includes = [sysconfig.get_path("include")]
    try:
        import pybind11
    except ImportError:
        reason = "pybind11 is not installed"
    else:
        includes.append(pybind11.get_include())
        found = Path(includes[0], "Python.h").is_file()
        reason = None if found else f"Python.h is not in {includes[0]}"
    return Toolchain(nvcc, ninja, torch, reason, tuple(includes))


def find_nvcc(environment=os.environ) -> str | None:
    """In $CUDA_HOME alone where that is set."""
    if environment.get("CUDA_HOME"):
        return shutil.which("nvcc", path=Path(environment["CUDA_HOME"], "bin"))
    return shutil.which("nvcc", path=environment.get("PATH")) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )


def find_ninja() -> str | None:
    """The ninja package's, as pip and make have it; another version would start over."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR)


def find_torch(python: str = sys.executable) -> Path | str:
    """The folder of the torch that a Python has, or why there is none to build for.

    pip builds in an environment of the build requirements alone, and torch, gigabytes, is not one;
    -I sees past it (PYTHONPATH), to what is installed where lowbit will be.
    """
    code = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("torch")
if spec is not None:
    print(importlib.metadata.version("torch"), spec.submodule_search_locations[0], sep="\\n")
"""
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        return f"{python} has no torch (tools other than pip need --no-build-isolation to see it)"
    version, folder = done.stdout.splitlines()
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {version} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    return Path(folder)


def parse_architectures(text: str) -> tuple[str, ...]:
    """("80", "90a") of "80;90a" or "80 90", in ascending order.

    From 90 on an architecture has instructions that only code for "90a" may use, so that is built.
    """
    found = set()
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d{2,3})a?", word)
        if match is None or int(match[1]) < 80:
            raise BuildError(
                f'LOWBIT_CUDA_ARCHS must hold architectures from 80 on, such as "80 90a", '
                f"got {text!r}"
            )
        found.add(int(match[1]))
    return tuple(f"{number}a" if number >= 90 else str(number) for number in sorted(found))


def architectures(environment=os.environ) -> tuple[str, ...]:
    """Those asked for, else those of the GPUs here, else all."""
    asked = environment.get("LOWBIT_CUDA_ARCHS")
    if asked:
        return parse_architectures(asked)
    here = [number for number in map(int, gpus()) if number >= 80]
    return parse_architectures(" ".join(map(str, here))) if here else ARCHITECTURES


def gpus() -> list[str]:
    """["90"]: the architecture of each GPU here."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [f"{major}{minor}" for major, minor in re.findall(r"^(\d+)\.(\d)$", done.stdout, re.M)]


def architectures_of(source: Path, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """What a file is compiled for: <op>_sm90.cu for 90a alone, if at all; others for everything."""
    match = re.search(r"_sm(\d+)$", source.stem)
    if match is None:
        return chosen
    return tuple(a for a in chosen if a == parse_architectures(match[1])[0])


def code_for(architecture: str) -> str:
    """nvcc's option for machine code, which ptxas has seen, and no PTX beside it."""
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


def ninja_file(toolchain: Toolchain, chosen: tuple[str, ...], root: Path = ROOT) -> str:
    """The text of build.ninja; paths in it are absolute, but for what is built."""
    csrc = root / "csrc"
    includes = [f"-I{csrc}", "-isystem", str(toolchain.torch / "include")]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA"]
    nvcc = shlex.quote(toolchain.nvcc)
    lines = [
        "ninja_required_version = 1.5",
        f"flags = {shlex.join([*FLAGS, *defines, *includes])}",
        # The log is what ptxas said; it is shown only if the file does not compile.
        "rule compile",
        f"  command = {nvcc} $flags $extra -MD -MF $out.d -c $in -o $out >$out.log 2>&1 "
        "|| (cat $out.log; false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        f"  command = {nvcc} $extra -o $out $in $libraries",
        "  description = $out",
        "",
    ]

    def build(out: str, rule: str, inputs: list[str], after: str = "", **variables: list[str]):
        joined = " ".join(path.replace("$", "$$").replace(" ", "$ ") for path in inputs)
        lines.append(f"build {out}: {rule} {joined}{after and ' | ' + after}")
        lines.extend(
            f"  {name} = {shlex.join(words).replace('$', '$$')}"
            for name, words in variables.items()
        )

    objects = []
    for source in sorted(csrc.glob("*.cu")):
        if built_for := architectures_of(source, chosen):
            objects.append(f"{source.stem}.o")
            build(objects[-1], "compile", [str(source)], extra=[*map(code_for, built_for)])
    for source in sorted((csrc / "common").glob("*.cpp")):
        objects.append(f"common_{source.stem}.o")
        # It shares headers with the kernels, device code included, but has none of its own.
        extra = ["-x=cu", code_for(chosen[0]), f'-DLOWBIT_ARCHS="{",".join(chosen)}"']
        build(objects[-1], "compile", [str(source)], extra=extra)
    torch = [f"-L{toolchain.torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"]
    build(LIBRARY, "link", objects, extra=list(LINK), libraries=torch)
    if toolchain.why_no_launch is None:
        python = [word for path in toolchain.launch_includes for word in ("-isystem", path)]
        build("bindings.o", "compile", [str(csrc / "bindings.cpp")], extra=python)
        # Found by its soname beside _launch.
        library = ["-L.", f"-l:{LIBRARY}", "-Xlinker=-rpath=$ORIGIN"]
        extra = ["-shared", "-cudart=none"]
        build(LAUNCH, "link", ["bindings.o"], after=LIBRARY, extra=extra, libraries=library)
    return "\n".join(lines) + "\n"


def build(toolchain: Toolchain, chosen: tuple[str, ...], root: Path = ROOT) -> list[Path]:
    """Builds what is not up to date; returns the library, and _launch where it is built."""
    folder = root / "build/cuda" / "-".join(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time; ninja does not see to that
        (folder / "build.ninja").write_text(ninja_file(toolchain, chosen, root))
        done = subprocess.run([toolchain.ninja, "-C", str(folder)], stdout=sys.stderr)
    if done.returncode:
        raise BuildError("the CUDA kernels do not build (LOWBIT_SKIP_CUDA=1 installs without them)")
    if toolchain.why_no_launch is not None:
        print(f"lowbit: built without _launch: {toolchain.why_no_launch}", file=sys.stderr)
        return [folder / LIBRARY]
    return [folder / LIBRARY, folder / LAUNCH]


def install(built: list[Path], folder: Path):
    """Copies to a package folder, by renaming: a process may have the old files open."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in built:
        fresh = folder / f"{path.name}.new"
        shutil.copy2(path, fresh)
        fresh.replace(folder / path.name)


def main() -> int:
    """In place: lowbit/ of this checkout."""
    toolchain = find_toolchain()
    if isinstance(toolchain, str):
        print(f"lowbit: the CUDA kernels cannot be built: {toolchain}", file=sys.stderr)
        return 1
    try:
        chosen = architectures()
        install(build(toolchain, chosen), ROOT / "lowbit")
    except BuildError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        return 1
    print(f"built lowbit/{LIBRARY} for {', '.join(f'sm_{a}' for a in chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
