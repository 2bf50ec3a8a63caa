"""A fit that was killed goes on to the bits it would have had; what is saved is never lost."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from brief import brief
from helpers import assert_bitwise
from models import tiny_llama, tiny_tokenizer, tiny_tokens

import lowbit
from lowbit import cli
from lowbit.errors import InputError
from lowbit.executor import Executor
from lowbit.recipes import overridden
from lowbit.rounding import GPTQ
from lowbit.training import Training

BLOCKS = 3
CALIBRATION = tiny_tokens(9, 32, seed=9)
# What each leaves for later blocks: weights; a full stream beside the rounded one; random batches;
# scales that were fitted, and those that were learned; rotations, fused and online; maps; nothing.
METHODS = {
    "gptq": ("gptq", "w4a4kv4"),
    "gptaq": ("gptaq", "w4a4kv4"),
    "autoround": ("autoround", "w2a16g32-wasym"),
    "autoround-1k-full": ("autoround-1k-full", "w2a16g32-wasym"),
    "awq": ("awq", "w2a16g32-wasym"),
    "omniquant-let": ("omniquant-let", "w4a4"),
    "spinquant": ("spinquant", "w4a4kv4"),
    "duarot-rtn": ("duarot-rtn", "w4a4kv4"),
    "dartquant": ("dartquant", "w4a8g32-wtwolevel"),
    "flatquant": ("flatquant", "w4a4kv4"),
    "flatquant-gptaq": ("flatquant-gptaq", "w4a4kv4"),
    "quarot": ("quarot", "w16a16kv4"),
}


class Killed(BaseException):
    pass


def model():
    return tiny_llama(num_layers=BLOCKS, bias=True)


def quantized(recipe, format, resume=None, calibration=CALIBRATION, model=model, seed=0):
    recipe = brief(recipe) if isinstance(recipe, str) else recipe
    return lowbit.quantize(
        model(), recipe, format, calibration, seed=seed, progress=False, resume=resume
    )


def kill_at(monkeypatch, index: int):
    run = Executor.run

    def killed(executor, block, i):
        if i == index:
            raise Killed
        return run(executor, block, i)

    monkeypatch.setattr(Executor, "run", killed)


def assert_same(got, expected):
    assert got.lowbit_config == expected.lowbit_config  # with all that was reported
    expected = expected.state_dict()
    assert got.state_dict().keys() == expected.keys()
    for name, tensor in got.state_dict().items():
        assert_bitwise(tensor, expected[name])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", METHODS)
def test_killed_and_taken_up_again(name, tmp_path, monkeypatch):
    expected = quantized(*METHODS[name])
    for index in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, index)
            quantized(*METHODS[name], tmp_path)
        assert (tmp_path / f"block-{index - 1:04d}.pt").exists()
    with monkeypatch.context() as patch:
        learn = "lowbit.training.learn_rotations", "lowbit.distribution.fit_rotations"
        for function in learn:  # what is learned is saved too
            patch.setattr(function, lambda *_: pytest.fail("learned again"))
        assert_same(quantized(*METHODS[name], tmp_path), expected)
        kill_at(patch, 0)  # nothing is left to do
        assert_same(quantized(*METHODS[name], tmp_path), expected)


def test_scales_with_a_rounder_that_quantizes_its_inputs(tmp_path, monkeypatch):
    """The full-precision stream stays so: scales of later blocks are fitted to it."""
    recipe = replace(lowbit.RECIPES["smoothquant"], rounding=GPTQ(quantized_inputs=True))
    expected = quantized(recipe, "w4a4")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        quantized(recipe, "w4a4", tmp_path)
    assert_same(quantized(recipe, "w4a4", tmp_path), expected)
    plain = quantized(replace(recipe, rounding=GPTQ()), "w4a4")
    for name in ("1.input_layernorm", "2.post_attention_layernorm"):
        gain = f"model.layers.{name}.weight"
        assert_bitwise(expected.state_dict()[gain], plain.state_dict()[gain])


def test_killed_while_it_learns(tmp_path, monkeypatch):
    recipe = replace(brief("spinquant"), training=Training(steps=3, batch=2, length=24))
    expected = quantized(recipe, "w4a4kv4")
    monkeypatch.setattr("lowbit.training.SAVE_EVERY", 1)
    rate = Training.lr_at

    def killed_at_two(training, step):
        if step == 2:
            raise Killed
        return rate(training, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "lr_at", killed_at_two)
        quantized(recipe, "w4a4kv4", tmp_path)
    assert sorted(contents(tmp_path)) == ["fit.json", "training.pt"]
    assert_same(quantized(recipe, "w4a4kv4", tmp_path), expected)


KILLED_IN_THE_MIDDLE_OF_A_FILE = """
import os, signal, sys, torch
from lowbit import cli

saves, save = [], torch.save

def half(state, path):
    save(state, path)
    saves.append(path)
    if len(saves) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
cli.main(sys.argv[1:])
"""


def test_sigkill_in_the_middle_of_a_file(tmp_path, capsys):
    source, saved = tmp_path / "source", tmp_path / "saved"
    model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)

    def command(output):
        words = f"quantize {source} --recipe gptq --format w4a4 --samples 4 --length 32 -o {output}"
        return words.split()

    resume = ["--resume", str(saved)]
    program = [sys.executable, "-c", KILLED_IN_THE_MIDDLE_OF_A_FILE]
    done = subprocess.run(
        [*program, *command(tmp_path / "out"), *resume],
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert {"fit.json", "block-0000.pt"} == {n for n in contents(saved) if not n.startswith(".")}
    first = contents(saved)["block-0000.pt"]
    assert cli.main([*command(tmp_path / "out"), *resume]) == 0
    assert cli.main(command(tmp_path / "whole")) == 0
    assert contents(saved)["block-0000.pt"] == first
    out, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert out == whole and "model.safetensors" in out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "fit"
    quantized("gptq", "w4a4", folder)
    return folder


def other_weight():
    other = model()
    other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    return other


OTHERS = {
    "recipe": (("rtn", "w4a4"), {}, "recipe gptq instead of rtn"),
    "field": (
        (overridden(lowbit.RECIPES["gptq"], ["rounding.damp=0.05"]), "w4a4"),
        {},
        "of rounding.damp 0.01 instead of 0.05:",
    ),
    "format": (("gptq", "w4a8"), {}, "of format w4a4 instead of w4a8:"),
    "seed": (("gptq", "w4a4"), {"seed": 1}, "of seed 0 instead of 1:"),
    "windows": (("gptq", "w4a4"), {"calibration": tiny_tokens(9, 32, 8)}, "of windows [0-9a-f]+ "),
    "weights": (("gptq", "w4a4"), {"model": other_weight}, "of weights [0-9a-f]+ instead of "),
    "dtype": (("gptq", "w4a4"), {"model": lambda: model().bfloat16()}, "dtype torch.float32"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_fit_is_refused_and_nothing_lost(case, saved):
    (recipe, format), options, message = OTHERS[case]
    before = contents(saved)
    with pytest.raises(InputError, match=f"is another, of .*{message}|is another, {message}"):
        quantized(recipe, format, saved, **options)
    assert contents(saved) == before


@pytest.mark.parametrize("name", ["fit.json", "block-0001.pt"])
def test_what_is_no_saved_fit(name, saved, tmp_path):
    for file, content in contents(saved).items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=f"{name}' holds no saved fit"):
        quantized("gptq", "w4a4", tmp_path)
    assert (tmp_path / name).read_bytes() == b"nonsense"


def test_files_of_who_knows_what(saved, tmp_path):
    for name in ("block-0000.pt", "block-0002.pt"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    before = contents(tmp_path)
    with pytest.raises(InputError, match="must hold a fit.json beside what was saved, got none"):
        quantized("gptq", "w4a4", tmp_path)
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="resume must be a folder, got the file"):
        quantized("rtn", "w4a4", file)
    assert file.read_text() == "mine"


def test_a_fit_says_what_it_is_of(saved):
    found = json.loads((saved / "fit.json").read_text())
    assert found["recipe"] == "gptq" and found["rounding.damp"] == "0.01"
    assert found["format"] == "w4a4"
