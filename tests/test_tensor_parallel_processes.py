"""Two processes with a share of a model each compute what one computes with all of it.

To the bit in fp32 where inputs are quantized: sums of codes are exact, and of two ranks there is
one order of additions. Elsewhere to the order of additions.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel_jobs as jobs
import torch
from helpers import assert_bitwise
from models import tiny_tokenizer

import lowbit
from lowbit.models import adapter_of
from lowbit.tensor_parallel import parts_of
from lowbit.tensors import named_tensors, read_tensors, tensor_files

pytestmark = pytest.mark.xdist_group("tensor parallel")  # its jobs are run once
NOT_TO_THE_BIT = {"w4a16kv4g32": 1e-5, "four ranks": 1e-2, "weights alone": 1e-5, jobs.GPTQ: 2e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With checkpoints, and what the jobs of two processes left."""
    path = tmp_path_factory.mktemp("jobs")
    jobs.make(path)
    subprocess.run(
        [sys.executable, jobs.__file__, str(path)],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ended = torch.load(path / "ended.pt")
    errors = "\n".join((path / f"{job}-{rank}.err").read_text() for job in ended for rank in (0, 1))
    assert set(map(tuple, ended.values())) == {(0, 0)}, errors
    return path


def left(folder: Path, job: str) -> list:
    """By each process."""
    return [torch.load(folder / f"{job}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", jobs.RUN)
def test_two_processes_compute_what_one_computes(name, folder):
    for found in (found[name] for found in left(folder, "run")):
        alone = found.pop("alone")
        assert found.keys() == set(jobs.ways_of(name))
        for share in found.values():
            for part in ("generated", "static"):
                assert torch.equal(share.get(part, alone["generated"]), alone["generated"])
            got, expected = share["logits"], alone["logits"]
            if name in NOT_TO_THE_BIT:
                error = (got.float() - expected.float()).norm() / expected.float().norm()
                assert error < NOT_TO_THE_BIT[name]
            else:
                assert_bitwise(got, expected)


@pytest.mark.parametrize("name", jobs.RUN)
def test_each_has_half(name, folder):
    """Of the codes and the KV cache; scales that stand for whole rows both have."""
    shares = [found[name] for found in left(folder, "run")]
    for way in shares[0].keys() - {"alone"}:
        for what in ("codes bytes", "kv bytes"):
            whole = shares[0]["alone"].get(what, 0)
            assert [2 * share[way].get(what, 0) for share in shares] == [whole] * 2
        whole = shares[0]["alone"]["bytes"]
        assert all(share[way]["bytes"] < 0.55 * whole for share in shares)


def test_between_the_two_no_bit_differs(folder):
    one, other = left(folder, "run")
    for name in jobs.RUN:
        for way, found in one[name].items():
            assert_bitwise(found["logits"], other[name][way]["logits"])


@pytest.mark.parametrize("name", ["w4a4kv4", "two levels", "experts"])
def test_what_a_rank_reads_is_its_share_and_all_are_the_whole(name, folder):
    model = lowbit.load(folder / name, fused=False)
    adapter, files = adapter_of(model), tensor_files(folder / name)
    parts = [parts_of(model, adapter, rank, 2) for rank in (0, 1)]
    shares = [dict(read_tensors(files, of_one)) for of_one in parts]
    for tensor_name, whole in named_tensors(model).items():
        first, second = (share[tensor_name] for share in shares)
        if tensor_name in parts[0]:
            dim = len(parts[0][tensor_name]) - 1
            assert first.shape == second.shape and 2 * first.shape[dim] == whole.shape[dim]
            assert_bitwise(torch.cat((first, second), dim), whole)
        else:
            assert_bitwise((first, second), (whole, whole))
    assert all(f"model.layers.0.self_attn.{p}_proj.codes" in parts[0] for p in "qkvo")


def test_what_cannot_be(folder):
    together = "64 inputs together, and 2 ranks have 32 each: quantize .* --set tensor_parallel=2"
    expected = [
        f"self_attn.o_proj quantizes {together}",
        f"self_attn.o_proj rotates {together}",
        "tensor_parallel must divide num_key_value_heads, got 2 for 1",
        "tensor_parallel shares out packed linears, got w16a16kv4",
        f"self_attn.o_proj quantizes {together}",
        "the model needs 0.1. MB on cpu, 0.1. MB more than the 0.00 MB that are free there",
    ]
    whole = "{} needs a whole model, got a share of one among 2 ranks"
    expected += [whole.format(do) for do in ("save", "save_pretrained", "export", "to_fake")]
    for messages in left(folder, "refused"):
        for message, pattern in zip(messages, expected, strict=True):
            assert re.search(pattern, message)


def test_a_mesh_of_one_process_has_all(folder):
    assert left(folder, "mesh_of_one") == [True, True]


@pytest.mark.slow
def test_as_torchrun_starts_it(folder):
    """The command, which the first process prints."""
    checkpoint = folder / "w4a4kv4"
    tiny_tokenizer().save_pretrained(checkpoint)
    words = f"-m lowbit generate {checkpoint} Hello --max-new-tokens 8 --device cpu --json".split()
    torchrun = "-m torch.distributed.run --nproc-per-node 2".split()
    outputs = []
    for program in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *program, *words],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))
    assert outputs[0]["completion"] == outputs[1]["completion"]
