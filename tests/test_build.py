"""How the CUDA kernels are built, and what becomes of all of them on every architecture."""

import ctypes
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sass
import torch
from sass import ARCHITECTURES, ROOT, build_kernels

from lowbit import cuda
from lowbit.ops.dispatch import OPS

TOOLCHAIN = build_kernels.Toolchain("/cuda/bin/nvcc", "ninja", Path("/torch"), None, ("/py", "/pb"))


# How it is built


@pytest.mark.parametrize(
    "text, expected",
    [
        ("80", ("80",)),
        ("80;90a", ("80", "90a")),
        ("120a 86, 80 80", ("80", "86", "120a")),
        ("90", ("90a",)),  # what only 90a may use is what the kernels are for
    ],
)
def test_architectures_that_are_asked_for(text, expected):
    assert build_kernels.parse_architectures(text) == expected
    assert build_kernels.architectures({"LOWBIT_CUDA_ARCHS": text}) == expected


@pytest.mark.parametrize("text", ["", "75", "sm_80", "8.0", "80+PTX", "native"])
def test_what_is_no_architecture(text):
    with pytest.raises(build_kernels.BuildError, match='such as "80 90a"'):
        build_kernels.parse_architectures(text)


@pytest.mark.parametrize(
    "gpus, expected",
    [
        (["90"], ("90a",)),
        (["86", "80", "86"], ("80", "86")),
        (["75"], ARCHITECTURES),
        ([], ARCHITECTURES),
    ],
)
def test_default_architectures(gpus, expected, monkeypatch):
    monkeypatch.setattr(build_kernels, "gpus", lambda: gpus)
    assert build_kernels.architectures({}) == expected


@pytest.fixture
def rules(tmp_path) -> dict[str, str]:
    """The lines of build.ninja about each output, for a tree of four files."""
    for name in ("op.cu", "op_sm90.cu", "bindings.cpp", "common/registry.cpp", "common/ptx.cuh"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    text = build_kernels.ninja_file(TOOLCHAIN, ("80", "90a"), tmp_path)
    parts = re.split(r"^build (\S+):", text, flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_what_is_built_of_what(rules):
    launch = build_kernels.LAUNCH
    assert set(rules) == {
        "", "op.o", "op_sm90.o", "common_registry.o", "_cuda.so", "bindings.o", launch
    }  # fmt: skip
    assert rules["_cuda.so"].startswith(" link op.o op_sm90.o common_registry.o\n")
    assert rules[launch].startswith(" link bindings.o | _cuda.so\n")


def test_architectures_of_each_file(rules):
    built_for = {name: re.findall(r"code=sm_(\w+)", rules[name]) for name in rules}
    assert built_for["op.o"] == ["80", "90a"]
    assert built_for["op_sm90.o"] == ["90a"]
    assert "compute_90a,code=sm_90a" in rules["op_sm90.o"]
    assert build_kernels.architectures_of(Path("op_sm90.cu"), ("80", "86")) == ()
    assert build_kernels.architectures_of(Path("op_sm89.cu"), ARCHITECTURES) == ("89",)
    assert '"80,90a"' in rules["common_registry.o"]


def test_flags(rules):
    words = rules[""].split()
    for flag in ("-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v", "-fmad=false", "-MD"):
        assert flag in words, flag
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in words
    everything = "".join(rules.values())
    assert not re.search(r"fast_math|-ftz=true|-prec-(div|sqrt)=false", everything)
    assert "--no-as-needed -ltorch\n" in rules["_cuda.so"]  # and no other of torch's libraries
    assert everything.count("-ltorch") == 1
    assert "-cudart=static" in rules["_cuda.so"]
    assert "-rpath=$$ORIGIN" in rules[build_kernels.LAUNCH]


def test_without_python_headers_the_library_is_built_alone(tmp_path):
    (tmp_path / "csrc/common").mkdir(parents=True)
    toolchain = build_kernels.Toolchain("nvcc", "ninja", Path("/torch"), "no Python.h", ())
    text = build_kernels.ninja_file(toolchain, ("80",), tmp_path)
    assert "_cuda.so" in text and "_launch" not in text


def test_why_there_is_no_toolchain(tmp_path):
    find = build_kernels.find_toolchain
    assert find({"LOWBIT_SKIP_CUDA": "1"}) == "LOWBIT_SKIP_CUDA=1"
    assert find({"CUDA_HOME": str(tmp_path)}).startswith("nvcc is not in $CUDA_HOME/bin")


@pytest.mark.parametrize(
    "prints, expected",
    [
        ("", r"python has no torch"),
        ("2.9.1+cpu\\n/torch", r"torch 2\.9\.1\+cpu is older than 2\.10"),
        ("2.10.0\\n/torch", r"/torch$"),
        ("2.13.0a0+git\\n/torch", r"/torch$"),
    ],
)
def test_torch_is_looked_for_where_lowbit_will_be(tmp_path, prints, expected):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    python.chmod(0o755)
    assert re.search(expected, str(build_kernels.find_torch(str(python))))
    assert build_kernels.find_torch() == Path(torch.__file__).parent


def test_installing_without_nvcc_says_so_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LOWBIT_SKIP_CUDA": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("lowbit:")]
    assert len(said) == 1 and "without its CUDA backend: LOWBIT_SKIP_CUDA=1" in said[0]
    assert (tmp_path / "lowbit/cuda.py").is_file()
    assert list(tmp_path.rglob("*.so")) == []


def test_a_log_of_ptxas():
    text = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 412 bytes cmem[0]
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
    assert sass.parse_log("op.o", text) == [
        sass.Compiled("op.o", "f", "80", 64, 8, 40),
        sass.Compiled("op.o", "f", "90a", 40, 0, 0),
    ]
    assert all(sass.QUIET.match(line) for line in text.splitlines())
    for complaint in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are",
        "ptxas warning : Registers are spilled to local memory in function 'f'",
        "op.cu(3): warning #177-D: variable was declared but never referenced",
    ):
        assert not sass.QUIET.match(complaint)


# How Python finds it


@pytest.fixture
def library(monkeypatch, tmp_path):
    """lowbit.cuda without a library, or with a file in its place."""
    path = tmp_path / "_cuda.so"
    monkeypatch.setattr(cuda, "LIBRARY", cuda.Library(path, "lowbit_cuda", "cuda"))
    return path


def test_not_built(library):
    assert cuda.why_not_cuda() == cuda.why_not_loaded() == cuda.NOT_BUILT
    assert cuda.why_not_cuda(torch.ones(1)) == cuda.NOT_BUILT
    with pytest.raises(RuntimeError, match="are not built"):
        cuda.overlap_launches(True)
    with pytest.raises(AttributeError, match="no op quantize: the CUDA kernels are not built"):
        cuda.quantize  # noqa: B018
    with pytest.raises(AttributeError):
        cuda.__wrapped__  # noqa: B018


def test_tensors_elsewhere(library):
    library.touch()  # not even loaded to say so
    assert cuda.why_not_cuda(torch.ones(1), None) == "the tensors are on cpu"
    two = torch.ones(1), torch.ones(1, device="meta")
    assert cuda.why_not_cuda(*two) == "the tensors are on several devices: cpu, meta"


def test_a_library_that_does_not_load(library):
    library.write_bytes(b"no library")
    assert re.match(r"_cuda\.so does not load: .*", cuda.why_not_loaded())


def test_a_library_older_than_an_op(library, monkeypatch):
    monkeypatch.setattr(cuda, "why_not_loaded", lambda: None)
    with pytest.raises(AttributeError, match="no op of_tomorrow in .*: build it again"):
        cuda.of_tomorrow  # noqa: B018


def test_use_library(library):
    library.touch()
    before = cuda.use_library("elsewhere.so", "lowbit_emulated", "cpu", 89)
    assert before.path == library
    assert cuda.LIBRARY == cuda.Library(Path("elsewhere.so"), "lowbit_emulated", "cpu", 89)
    assert cuda.sm() == 89


@pytest.mark.parametrize(
    "architecture, here, runs",
    [
        ("80", 80, True),
        ("80", 86, True),
        ("86", 80, False),
        ("86", 89, True),
        ("89", 90, False),
        ("90a", 90, True),
        ("100a", 103, False),
        ("120a", 121, False),
    ],
)
def test_where_machine_code_runs(architecture, here, runs):
    assert cuda.runs_on(architecture, here) == runs


def test_importing_loads_nothing():
    code = "import lowbit, lowbit.cuda, torch; print(torch.ops.loaded_libraries)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "_cuda.so" not in done.stdout


# What is built: slow, on the library for all architectures


class KernelInfo(ctypes.Structure):
    """Of csrc/common/registry.h."""

    _fields_ = [
        ("op", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("threads", ctypes.c_int),
        ("smem_bytes", ctypes.c_int),
        ("min_sm", ctypes.c_int),
        ("max_sm", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def registered() -> list[KernelInfo]:
    loaded = ctypes.CDLL(str(sass.built()[0]))  # RTLD_NOW, on this torch
    loaded.lowbit_kernel.restype = ctypes.POINTER(KernelInfo)
    return [loaded.lowbit_kernel(i).contents for i in range(loaded.lowbit_kernel_count())]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_for_every_architecture(architecture):
    listed = sass.cuobjdump("--list-elf", sass.built()[0])
    found = set(re.findall(rf"(\w+)\.sm_{architecture}\.cubin", listed))
    sources = (ROOT / "csrc").glob("*.cu")
    assert {s.stem for s in sources if build_kernels.architectures_of(s, (architecture,))} <= found


@pytest.mark.slow
def test_no_spills_and_no_local_memory():
    kernels = sass.compiled()
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    spilling = [
        f"{k} = {sass.demangled(k.kernel)}" for k in kernels if k.spilled_bytes or k.stack_bytes
    ]
    assert not spilling, "\n".join(spilling)


def test_every_kernel_first_waits_for_the_one_before():
    """What overlap_launches rests on, in the source: before it, barriers of its own at the most."""
    its_own = {"block", "mbarrier_init", "fence_mbarrier_init", "sync_cluster", "sync_block"}
    wait = "\n  wait_for_earlier_kernels();"  # at the depth of the body: every thread comes by
    files = [*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc/common").glob("*.cuh")]
    kernels = [k for f in files for k in f.read_text().split("__global__ void")[1:]]
    assert len(kernels) >= 11
    for kernel in kernels:
        body = kernel[kernel.index(") {") + 3 : kernel.index("\n}\n")]
        assert wait in body, kernel[:120]
        before = body[: body.index(wait)]
        assert "return" not in before, kernel[:120]
        called = set(re.findall(r"(\w+)\(", before)) - {"if", "for", "constexpr"}
        assert called <= its_own, (called - its_own, kernel[:120])
        assert not re.search(r"[*]\s*\w+\s*=|->|\w\[", before), kernel[:120]  # no memory


@pytest.mark.slow
def test_nothing_is_read_or_written_before_the_wait():
    """The same in machine code, where the compiler might have moved a load ahead of it."""
    memory = re.compile(r"\b(LDG|STG|LDGSTS|UTMA\w+|UBLK\w+|ATOM|ATOMG|RED|LD|ST)\b")
    for name, code in sass.kernels_sass(sass.built()[0], "90a").items():
        if memory.search(code):
            assert "ACQBULK" in code[: memory.search(code).start()], name
            assert "PREEXIT" in code, name


@pytest.mark.slow
def test_compilers_have_nothing_to_say():
    """Neither ptxas, C7510 (serialized wgmma) included, nor nvcc, nor the host's compiler."""
    assert sass.complaints() == []


@pytest.mark.slow
def test_every_kernel_is_registered(registered):
    """Each instantiation once or more, so `lowbit doctor --kernels` leaves none out."""
    assert len({k.function for k in registered}) == len({k.kernel for k in sass.compiled()})
    names = [(k.op, k.name) for k in registered]
    assert sorted(set(names)) == sorted(names)
    for kernel in registered:
        assert 80 <= kernel.min_sm <= kernel.max_sm, kernel.name
        assert kernel.threads % 32 == 0 and 32 <= kernel.threads <= 1024, kernel.name
        assert 0 <= kernel.smem_bytes <= 227 * 1024, kernel.name


@pytest.mark.slow
def test_blocks_are_registered_with_the_threads_they_are_compiled_for(registered):
    """More would not launch; fewer would have the compiler spare registers for nobody."""
    given, compiled = {}, {}
    for kernel in registered:
        given.setdefault(kernel.op.decode(), set()).add(kernel.threads)
    for name, threads in sass.most_threads(sass.built()[0], "90a").items():
        function = re.search(r"(\w+)_kernel\b", name)[1]
        op = max((op for op in given if function.startswith(op)), key=len)
        compiled.setdefault(op, set()).add(threads)
    assert given == compiled


@pytest.mark.slow
def test_loads_on_this_torch_and_holds_every_op():
    """In a process of its own, where lowbit's own library is not loaded."""
    ops = [name for name, op in OPS.items() if op.backends["cuda"].target]
    code = f"""
import importlib.util, json, torch
torch.ops.load_library({str(sass.built()[0])!r})
held = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [op for op in {ops!r} if not held(f"lowbit_cuda::{{op}}", "CUDA")]
kernels = None
for path in {[str(path) for path in sass.built()[1:]]!r}:
    spec = importlib.util.spec_from_file_location("lowbit._launch", path)
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    kernels = launch.kernels()
print(json.dumps([missing, kernels]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, kernels = json.loads(done.stdout)
    assert missing == []
    keys = {"op", "name", "threads", "smem_bytes", "min_sm", "max_sm"}
    assert kernels is None or (kernels and all(set(kernel) == keys for kernel in kernels))


@pytest.mark.slow
def test_undefined_symbols_are_those_of_torch_2_10():
    """What _cuda.so takes from torch is declared in the shim headers as of 2.10.

    Loading it into torch 2.10, 2.11, ... itself takes gigabytes of downloads. Instead: the
    installed torch's headers, preprocessed for 2.10, leave out what later versions added.
    """
    includes = Path(torch.__file__).parent / "include"
    shims = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
    declared = subprocess.run(
        ["g++", "-E", "-x", "c++", "-std=c++17", f"-I{includes}", "-DUSE_CUDA"]
        + [f"-DTORCH_TARGET_VERSION={build_kernels.TORCH_TARGET_VERSION}", "-"],
        input="".join(f'#include "{shim}"\n' for shim in shims),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torch_library_impl(" in declared and "torch_from_blob(" not in declared  # of 2.11
    known = set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\s*\()", declared))
    names = undefined_symbols(sass.built()[0])
    system = re.compile(r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_|_ITM_|__gmon_start__|__cxa_finalize")
    assert [name for name in names if name not in known and not system.match(name)] == []
    # The one that a torch without CUDA lacks is weak, or the library would not load there.
    cuda_only = {n for n in names if re.search("cuda", n) and not n.startswith("aoti_torch_device")}
    assert {names[name] for name in cuda_only} <= {"w"}, cuda_only


def undefined_symbols(path: Path) -> dict[str, str]:
    """Name -> U, or w where it is weak."""
    command = ["nm", "-D", "--undefined-only", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: kind for kind, name in re.findall(r"^\s+(\w) (\S+)$", text, re.M)}


@pytest.mark.slow
def test_files_of_one_architecture_can_be_left_out():
    """A build for others does not compile <op>_sm90.cu, so nothing outside needs its symbols."""
    objects = sorted(sass.built()[0].parent.glob("*.o"))
    command = ["nm", "--format=posix", "--undefined-only"]
    for left_out in (path for path in objects if re.search(r"_sm\d+$", path.stem)):
        defined = ["nm", "--format=posix", "--defined-only", "--extern-only", left_out]
        text = subprocess.run(defined, capture_output=True, text=True, check=True).stdout
        own = {line.split()[0] for line in text.splitlines() if line.split()[1] in "TDBR"}
        for path in objects:
            if path != left_out and path.name != "bindings.o":
                text = subprocess.run([*command, path], capture_output=True, text=True).stdout
                needed = own & {line.split()[0] for line in text.splitlines()}
                assert not needed, f"{path.stem} needs {needed} of {left_out.stem}"


@pytest.mark.slow
def test_the_wheel_holds_the_kernels(tmp_path):
    sass.built()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        env={**os.environ, "LOWBIT_CUDA_ARCHS": " ".join(ARCHITECTURES)},
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    assert held == {f"lowbit/{path.name}" for path in sass.built()}
    assert "none-any" not in wheel.name
