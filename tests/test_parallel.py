"""Two processes that share the calibration windows come to the weights of one.

The order of additions differs, and nothing else: Hessians, gradients and losses to the last bits,
so that a code in a thousand may round the other way. Between the two processes no bit differs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_jobs
import pytest
import torch
from helpers import assert_bitwise
from models import tiny_llama, tiny_tokenizer

from lowbit import parallel, streams
from lowbit.errors import InputError

pytestmark = pytest.mark.xdist_group("parallel")  # its jobs are run once
SHARE, FLOATS, REPORT = 1e-3, 1e-5, 5e-3  # of bytes that differ; relative, of the largest; relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With what the jobs of two processes left."""
    path = tmp_path_factory.mktemp("jobs")
    tiny_llama().save_pretrained(path / "source")
    tiny_tokenizer().save_pretrained(path / "source")
    program = [sys.executable, parallel_jobs.__file__, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(program, check=True, capture_output=True, timeout=900, env=environment)
    return path


def left(folder: Path, job: str) -> list:
    """By each process."""
    files = (folder / f"{job}-{rank}.pt" for rank in range(parallel_jobs.PROCESSES))
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("name", parallel_jobs.METHODS)
def test_two_processes_come_to_what_one_comes_to(name, folder, monkeypatch):
    monkeypatch.setattr(streams, "TOKENS_AT_ONCE", streams.TOKENS_AT_ONCE)  # it changes there
    (got, report), (other, other_report) = (found[name] for found in left(folder, "methods"))
    assert got.keys() == other.keys() and report == other_report
    for key, tensor in got.items():
        assert_bitwise(tensor, other[key])
    expected, alone = parallel_jobs.quantized(name)
    assert got.keys() == expected.keys()
    for key, tensor in got.items():
        if tensor.is_floating_point():
            largest = expected[key].abs().max().item()
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=FLOATS * largest)
    codes = [key for key, tensor in got.items() if not tensor.is_floating_point()]
    differ = sum((got[key] != expected[key]).sum().item() for key in codes)
    assert 0 < len(codes) and differ <= SHARE * sum(got[key].numel() for key in codes)
    assert numbers(report) == pytest.approx(numbers(alone), rel=REPORT)


def numbers(report, path="") -> dict[str, float]:
    """All in it, by where they are."""
    if isinstance(report, dict | list):
        items = report.items() if isinstance(report, dict) else enumerate(report)
        return {k: n for key, part in items for k, n in numbers(part, f"{path}/{key}").items()}
    return {path: report} if isinstance(report, int | float) else {}


def test_an_error_of_one_process_ends_the_other(folder):
    ended = torch.load(folder / "ended.pt")
    assert ended.pop("failure") == [1, 1]
    assert set(map(tuple, ended.values())) == {(0, 0)}
    one, other = ((folder / f"failure-{rank}.err").read_text() for rank in (1, 0))
    assert "broken in one" in one and "RuntimeError: " in other


def test_errors_of_windows_are_those_of_all(folder):
    for message in left(folder, "too_few_windows"):
        assert message == "calibration windows must be at least as many as processes, got 1 for 2"
    for message in left(folder, "not_finite_in_one"):
        assert message == "calibration activations must be finite, got NaN or inf here"


def test_the_command(folder):
    """The first process prints and writes; what it saved is taken up by both."""
    assert left(folder, "command") == [[0, 0, 2], [0, 0, 2]]
    out, nothing = ((folder / f"command-{rank}.out").read_text() for rank in (0, 1))
    first, rest = json.JSONDecoder().raw_decode(out)
    assert first["report"]["calibration"] == [5, 32] and nothing == ""
    error, other = ((folder / f"command-{rank}.err").read_text() for rank in (0, 1))
    assert "exists: pass --overwrite" in error.splitlines()[-1]
    assert other.startswith("lowbit: error in process 1: output folder ") and "\n" not in other[:-1]
    for file in (folder / "out").iterdir():
        assert file.read_bytes() == (folder / "again" / file.name).read_bytes()
    assert len(list((folder / "saved").iterdir())) == 3  # fit.json and two blocks


@pytest.mark.slow
def test_as_torchrun_starts_it(folder):
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = f"-m lowbit quantize {folder / 'source'} --recipe gptq --format w4a4 --device cpu"
    small = f"--samples 5 --length 32 --json -o {folder / 'by-torchrun'}"
    done = subprocess.run(
        [*program, *words.split(), *small.split()],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "gptq"
    weights = [(folder / name / "model.safetensors") for name in ("by-torchrun", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "device, devices, message",
    [
        ("cuda", 1, "processes on a machine must be at most its CUDA devices, got 1 for local"),
        ("cuda:" + "0", 2, "device must be 'cuda' for each process to take its own, got"),
    ],
)
def test_devices_that_cannot_be_shared_out(device, devices, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(InputError, match=message):
        parallel.start(torch.device(device))


def test_every_window_is_one_processes(monkeypatch):
    monkeypatch.setattr(parallel, "_size", 3)
    windows, found = torch.tensor([7, 0, 5, 3, 3]), []
    for rank in range(3):
        monkeypatch.setattr(parallel, "_rank", rank)
        mine, among = parallel.among_own(windows)
        assert torch.equal(torch.arange(8)[parallel.own()][among], windows[mine])
        found.append(mine)
    assert torch.equal(sum(mine.long() for mine in found), torch.ones(5, dtype=torch.int64))
