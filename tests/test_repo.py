"""What STYLE and DESIGN promise about the tree, and what the documents promise about the code."""

import functools
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.cli import parser
from lowbit.ops.dispatch import OPS

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("build", "dist", "out", "__pycache__", "lowbit.egg-info")
SOURCE = (".py", ".cu", ".cuh", ".h", ".cpp")
MAX_COLUMNS, MAX_LINES, MAX_PUBLIC_NAMES = 100, 600, 20


@functools.cache
def all_files() -> list[Path]:
    """The repository's files, without what is hidden, built or installed."""
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [s for s in subfolders if s not in GENERATED and not s.startswith(".")]
        found += [Path(folder, name) for name in names]
    return sorted(found)


def files(*suffixes: str) -> list[Path]:
    return [path for path in all_files() if path.suffix in suffixes]


def complaints(pattern: str, paths: list[Path]) -> list[str]:
    """file:line of every line in which the pattern is found."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def op_stems() -> set[str]:
    """Files of lowbit/ops that define an op; one may define an op and its inverse."""
    return {sys.modules[op.reference.__module__].__name__.split(".")[-1] for op in OPS.values()}


def test_one_stem_per_op():
    plumbing = {"__init__", "cuda_rotation", "dispatch", "kernel_layouts", "rows"}
    assert {path.stem for path in (ROOT / "lowbit/ops").glob("*.py")} - plumbing == op_stems()
    shared = {"__init__", "common", "configs", "tiles"}  # helpers, and the data of all kernels
    kernels = [p for p in (ROOT / "kernels/triton").glob("*.py") if p.stem not in shared]
    kernels += (ROOT / "csrc").glob("*.cu")
    for path in kernels:
        assert re.sub(r"_sm\d+a?$", "", path.stem) in op_stems(), path
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert path.stem.removeprefix("bench_") in op_stems(), path


@pytest.mark.parametrize("stem", sorted(op_stems()))
def test_five_paths_of_an_op(stem):
    """Contract, Triton, CUDA, test, benchmark; a kernel where its backend has a target."""
    paths = [f"lowbit/ops/{stem}.py", f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py"]
    folders = {"triton": ("kernels/triton", "py"), "cuda": ("csrc", "cu")}
    ops = [op for op in OPS.values() if op.reference.__module__.endswith(f".{stem}")]
    for backend, (folder, suffix) in folders.items():
        if any(op.backends[backend].target for op in ops):
            paths.append(f"{folder}/{stem}.{suffix}")
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_backend_without_a_kernel_has_a_reason(name):
    assert set(OPS[name].backends) == {"cuda", "triton"}
    for backend in OPS[name].backends.values():
        if backend.target is None:
            assert re.fullmatch(r"no (CUDA|Triton) kernel for \w+ yet", backend.why_not())
        elif backend.target.startswith("lowbit.cuda:"):
            stem = backend.target.split(":")[1]
            assert f'm.impl("{stem}"' in (ROOT / f"csrc/{stem}.cu").read_text()
        elif backend.target.endswith(":run_on_cuda"):  # prepares arguments, then calls the kernel
            assert f'm.impl("{name}"' in (ROOT / f"csrc/{name}.cu").read_text()
            assert callable(backend.load())
        elif backend.target.startswith("lowbit.cuda:"):  # tests/test_build.py loads the library
            assert backend.target == f"lowbit.cuda:{name}"
        elif backend.why_not() != "triton is not installed":
            assert callable(backend.load())


def test_kernels_is_a_folder_not_a_package():
    # transformers imports a PyPI package called kernels: ours would be found instead
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "kernels/triton/__init__.py").is_file()


def test_pyproject_lists_every_package():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", project, re.S | re.M).group(1)
    found = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "lowbit").rglob("__init__.py")}
    expected = {name.replace("/", ".") for name in found} | {"lowbit.kernels"}
    assert set(re.findall(r'"([\w.]+)"', listed)) == expected
    assert f'version = "{lowbit.__version__}"' in project
    assert f"## {lowbit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names():
    assert len(lowbit.__all__) <= MAX_PUBLIC_NAMES
    assert lowbit.__all__ == sorted(lowbit.__all__, key=lambda n: (not n.isupper(), n.islower(), n))
    for name in lowbit.__all__:
        assert hasattr(lowbit, name), name


def test_length_of_files_and_lines():
    for path in files(*SOURCE):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= MAX_LINES, f"{path}: {len(lines)} lines"
    assert complaints(f"^.{{{MAX_COLUMNS + 1},}}", files(*SOURCE)) == []


@pytest.mark.parametrize(
    "what, pattern",
    [
        ("a path of one machine", r"(?<![\w.])/(work|root|home|Users)/\w"),
        ("one of several devices", "cuda" + r":\d"),
        ("a TODO without the condition that ends it", r"\bTO" + r"DO\b(?!.*\b(when|until|once)\b)"),
        ("a leftover", r"\bFIX" + r"ME\b|\bXX" + r"X\b|breakpoint" + r"\(\)"),
    ],
)
def test_nothing_is_left_behind(what, pattern):
    everything = files(*SOURCE, ".md", ".toml", ".csv") + [ROOT / "Makefile", ROOT / ".ci/run"]
    assert complaints(pattern, everything) == [], what


def test_no_environment_variable_changes_a_result():
    code = [p for p in files(".py") if p.relative_to(ROOT).parts[0] in ("lowbit", "kernels")]
    reads = complaints(r"\benviron\b|\bgetenv\b", code)
    # Where files lie, not what; and who shares the work: sums in another order, see parallel.py.
    given = ("XDG_CACHE_HOME", '"WORLD_SIZE"', '"LOCAL_RANK"')
    assert all(any(name in line for name in given) for line in reads), reads
    # The build's own: what is compiled, and with what.
    build = [ROOT / "setup.py", ROOT / "csrc/build_kernels.py"]
    read = {
        re.search(r"""environ\w*(?:\.get\(|\[)"(\w+)""", line)
        for line in complaints("environ", build)
    }
    names = {match[1] for match in read if match}
    assert names == {"LOWBIT_CUDA_ARCHS", "LOWBIT_SKIP_CUDA", "CUDA_HOME", "PATH"}


def documents() -> list[Path]:
    return files(".md")


@pytest.mark.parametrize("document", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
    top = "|".join(("lowbit", "kernels", "tests", "docs", "csrc", "benchmarks"))
    for path in re.findall(rf"`((?:{top})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"
    for module, name in re.findall(r"`(lowbit(?:\.[a-z_]+)*)\.(\w+)(?:\([^`]*)?`", text):
        assert is_there(module, name), f"{document.name} names {module}.{name}"


def is_there(module: str, name: str) -> bool:
    """Whether module.name is an attribute or a submodule; `module` may end in a function."""
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def shell_commands(document: Path) -> list[str]:
    """Lines of sh blocks, prompts taken off and continuations joined, and indented commands."""
    text = document.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    (?:\$ )?((?:make|lowbit) .*)$", text, re.M)
    return [line.removeprefix("$ ").strip() for line in lines if line.strip()]


@pytest.mark.parametrize("document", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_show_commands_that_exist(document):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = [shlex.split(line, comments=True) for line in shell_commands(document)]
    for words in filter(None, commands):
        program = words[0].rpartition("/")[2]
        if program == "make":
            named = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
            assert set(named) <= set(targets), words
        elif program == "lowbit":
            parser().parse_args(words[1:])  # exits, and so fails, on what does not parse


def test_documents_name_make_targets_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for document in documents():
        for target in re.findall(r"`make ([a-z-]+)`", document.read_text()):
            assert target in targets, f"{document.name} names make {target}"
