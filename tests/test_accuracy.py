"""benchmarks/accuracy.py without any other package: one that the test makes stands for it."""

import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_tokens

from benchmarks import accuracy
from benchmarks.accuracy import Evaluator, Method, Protocol, Side, measure, most_values
from benchmarks.accuracy_table import markdown, read, result
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import perplexity
from lowbit.formats import QuantFormat
from lowbit.ops import dequantize
from lowbit.rounding import RTN

FORMAT = QuantFormat.parse("w3a16g32-wasym")
QUANTIZERS = Path(accuracy.__file__).parent / "quantizers"

# Rounds to nearest by hand, or does what its options say instead.
FAKE = """
import os, sys
sys.path.insert(0, {quantizers!r})
import job
job.version = lambda package: "7"
def quantize(what, windows):
    assert tuple(windows.shape) == (2, 24) and what.method == "rtn" and not what.symmetric
    model = job.load_model(what)
    how = what.options.get("do")
    if how == "refuse":
        raise job.Refused("has no such thing")
    if how == "crash":
        raise RuntimeError("it broke")
    if how == "die":
        os.kill(os.getpid(), 9)
    for linear in job.linears_of(model).values():
        w = linear.weight.data.unflatten(-1, (-1, what.group_size))
        low, high = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0)
        largest = 2 ** (what.bits + (how == "more bits")) - 1
        scale = ((high - low) / largest).half().float()
        zero = (-low / scale).round()
        codes = ((w / scale).round() + zero).clamp(0, largest)
        linear.weight.data = ((codes - zero) * scale).flatten(-2)
    tensors = job.block_tensors(model)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "forget":
        del tensors[name]
    if how == "transpose":
        tensors[name] = tensors[name].T
    if how == "head":
        tensors["lm_head.weight"] = model.lm_head.weight.detach()
    return tensors, "by hand", 0.5
job.run("fake", quantize)
"""


@pytest.fixture
def evaluator(tmp_path, monkeypatch) -> Evaluator:
    """Of a tiny model in a folder; `fake` and `absent` are packages that have RTN."""
    model = tiny_llama(intermediate_size=96)
    model.save_pretrained(tmp_path / "model")
    workers = tmp_path / "workers"
    workers.mkdir()
    (workers / "with_fake.py").write_text(FAKE.format(quantizers=str(QUANTIZERS)))
    (workers / "with_lowbit.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(QUANTIZERS)!r})\n"
        f"runpy.run_path({str(QUANTIZERS / 'with_lowbit.py')!r})\n"
    )
    monkeypatch.setattr(accuracy, "WORKERS", workers)
    sides = (Side("fake"), Side("fake", "broken", {"do": "crash"}), Side("absent"))
    monkeypatch.setattr(accuracy, "METHODS", {"rtn": Method({}, sides)})
    folder = str(tmp_path / "model")
    protocol = Protocol("tiny", folder, tiny_tokens(), tiny_tokens(4).flatten(), 24, 3)
    return Evaluator(protocol, model)


def row_of(evaluator: Evaluator, **options) -> dict:
    side = Side("fake", options=options)
    return measure(side, "rtn", FORMAT, sys.executable, evaluator, threads=1)


def test_what_comes_back_is_measured_in_the_model_as_it_was(evaluator):
    row = row_of(evaluator)
    expected = tiny_llama(intermediate_size=96)
    for name, module in expected.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(dequantize(RTN().round(module.weight, FORMAT.weight)[0]))
    tokens = evaluator.protocol.tokens
    found = perplexity(expected, tokens, 24, 3)
    assert (row["value"], row["window_logs"]) == (found.perplexity, found.window_nll)
    assert (row["seconds"], row["settings"]) == (0.5, "by hand")
    assert row["version"].startswith("fake 7, torch ")
    full = perplexity(tiny_llama(intermediate_size=96), tokens, 24, 3).window_nll
    assert evaluator.of(evaluator.original) == full  # nothing of a row is left behind


@pytest.mark.parametrize(
    "do, reason",
    [("crash", "^failed: RuntimeError: it broke$"), ("die", "^ended by signal 9$")],
)
def test_a_process_that_fails_is_a_reason(evaluator, do, reason):
    row = row_of(evaluator, do=do)
    assert "value" not in row
    assert re.search(reason, row["reason"])


@pytest.fixture
def run_here(monkeypatch):
    """Workers run in this process: one of their own would take seconds to import torch."""

    def run(_python: str, worker: Path, folder: Path, _threads: int):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(worker), str(folder)])
            patch.setattr(sys, "path", [*sys.path])
            runpy.run_path(str(worker))
        del sys.modules["job"]  # as the worker imports it, and has changed it

    monkeypatch.setattr(accuracy, "run_worker", run)


@pytest.mark.usefixtures("run_here")
@pytest.mark.parametrize(
    "do, reason",
    [
        ("refuse", "^has no such thing$"),
        ("more bits", "wrong weights: .* at most 8 values, got (9|1[0-6])"),
        ("forget", "wrong weights: every linear .* model.layers.1.mlp.up_proj"),
        ("transpose", r"wrong weights: .*up_proj.weight must have shape \(96, 64\)"),
        ("head", "wrong weights: tensors must be of the model's blocks, got lm_head"),
    ],
)
def test_what_is_not_measured_has_a_reason(evaluator, do, reason):
    row = row_of(evaluator, do=do)
    assert "value" not in row
    assert re.search(reason, row["reason"])


def test_a_python_that_is_not_there_is_a_reason(evaluator):
    row = measure(Side("fake"), "rtn", FORMAT, "/nowhere/python", evaluator, threads=1)
    assert row == {"reason": "/nowhere/python does not run: No such file or directory"}


def test_a_run_goes_on_without_what_is_missing_and_is_not_done_twice(
    evaluator, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(accuracy, "_protocol", lambda *_: (evaluator.protocol, evaluator.model))
    out = tmp_path / "rows.jsonl"
    words = ["--out", str(out), "--format", FORMAT.name, "--method", "rtn"]
    words += ["--python", f"fake={sys.executable}"]
    rows = accuracy.run(accuracy.parser().parse_args(words))
    printed = capsys.readouterr().out
    assert "absent: no --python absent=INTERPRETER, not measured\n" in printed
    assert [row["side"] for row in rows] == ["", "lowbit", "fake", "fake, broken"]
    assert rows[1]["window_logs"] == rows[2]["window_logs"]  # the same rounding, by two packages
    assert read(out) == rows
    again = []
    monkeypatch.setattr(accuracy, "measure", lambda side, *_: again.append(side) or rows[3])
    assert accuracy.run(accuracy.parser().parse_args(words)) == rows
    assert [side.name for side in again] == ["fake, broken"]  # what failed is tried again
    table = markdown(rows, ["rtn"], [FORMAT.name])
    assert (
        "| w3a16g32-wasym | rtn | fake |" in table and "| +0.00 +- 0.00 % | 0 | by hand |" in table
    )
    assert "w3a16g32-wasym rtn fake, broken: failed: RuntimeError: it broke" in table


def test_of_few_blocks_it_is_the_error_of_their_output(evaluator):
    protocol = replace(evaluator.protocol, blocks=2)
    evaluator = Evaluator(protocol, evaluator.model)
    name = "model.layers.1.mlp.down_proj.weight"
    half = {name: evaluator.original[name] / 2}

    def added(tensors: dict) -> torch.Tensor:
        """By the last MLP, whose output joins the residual stream."""
        kept = []
        module = evaluator.model.model.layers[1].mlp
        handle = module.register_forward_hook(lambda _m, _a, out: kept.append(out.double()))
        evaluator.of(tensors)
        handle.remove()
        return torch.cat(kept)

    lost = added(evaluator.original) - added(half)
    error = lost.square().sum((1, 2)) / torch.cat(evaluator.wanted).square().sum((1, 2))
    torch.testing.assert_close(torch.tensor(evaluator.of(half)).exp(), error.float())


def test_the_table_marks_what_is_worse():
    row = {"method": "rtn", "format": "w4a16g64", "protocol": "p", "seconds": 1, "settings": "s"}

    def side(name, perplexity):
        return {**row, "side": name, **result([math.log(perplexity)] * 2)}

    ours = side("lowbit", 10.0)
    assert "| +0.50 +- 0.00 % |" in markdown([ours, side("hqq", 10 / 1.005)], ["rtn"], ["w4a16g64"])
    assert "| **+2.00 +- 0.00 %** |" in markdown(
        [ours, side("hqq", 10 / 1.02)], ["rtn"], ["w4a16g64"]
    )
    assert "| -2.00 +- 0.00 % |" in markdown([ours, side("hqq", 10 / 0.98)], ["rtn"], ["w4a16g64"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--python", "vim=/usr/bin/vim"], "--python must be one of .*'hqq'"),
        (["--python", "hqq"], "an interpreter, got 'hqq'"),
        (["--format", "w4a16"], "weights in groups and no more, got w4a16"),
        (["--format", "w4a8g64"], "weights in groups and no more, got w4a8g64"),
    ],
)
def test_errors(words, message):
    with pytest.raises(InputError, match=message):
        accuracy.run(accuracy.parser().parse_args(words))


def test_values_of_a_group():
    weight = torch.tensor([[0.0, 1.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert most_values(weight, 4) == 3
    assert most_values(weight, 2) == 2
    assert most_values(replace_last(weight), 4) == 3


def replace_last(weight):
    changed = weight.clone()
    changed[0, -2:] = torch.tensor([6.0, 7.0])
    return changed


def test_every_package_has_its_worker():
    packages = {side.package for method in accuracy.METHODS.values() for side in method.sides}
    names = {f"with_{package.replace('-', '_')}.py" for package in packages}
    assert names == {path.name for path in QUANTIZERS.glob("with_*.py")}
    assert all(method.sides[0] == Side("lowbit") for method in accuracy.METHODS.values())
    assert replace(Side("hqq"), note="x").name == "hqq, x"
