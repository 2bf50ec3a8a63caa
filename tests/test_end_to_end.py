"""benchmarks/end_to_end.py: what a row of a whole model says, and what its calls do, on a CPU."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from benchmarks import clock, end_to_end, report, speed_accuracy, whole_models
from benchmarks.shapes import MODELS
from benchmarks.whole_models import Contender, full_model, packed_model
from lowbit import cli
from lowbit.errors import InputError
from lowbit.evaluate.size import size_of
from lowbit.formats import QuantFormat

CPU = torch.device("cpu")
BENCH = ["bench", "model", "--device", "cpu", "--no-compile"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(clock, "REPEATS", 2)
    monkeypatch.setattr(clock, "FEWEST_REPEATS", 2)
    monkeypatch.setattr(clock, "CPU_FLUSH_BYTES", 1 << 10)


def packed(format: str, num_layers: int | None = None) -> Contender:
    model = packed_model("tiny", MODELS["tiny"], QuantFormat.parse(format), num_layers, CPU)
    return Contender(format, model)


def full() -> Contender:
    return Contender("bf16", full_model("tiny", MODELS["tiny"], None, CPU))


def test_rows(quick, capsys, tmp_path):
    csv = tmp_path / "a.csv"
    options = ["--prompt", "5", "--batch", "1", "3", "--context", "20", "--csv", str(csv), "--json"]
    assert cli.main([*BENCH, "--format", "w4a4kv4", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    bf16, own = rows[:4], rows[4:]
    phases = [("prefill", 1, 5), ("decode", 1, 20), ("decode", 3, 20), ("largest batch", 0, 20)]
    for part, name in ((bf16, "bf16"), (own, "w4a4kv4")):
        assert [(r["phase"], r["batch"], r["tokens"]) for r in part] == phases
        assert {(r["contender"], r["model"], r["layers"]) for r in part} == {(name, "tiny", 2)}
        assert "a GPU's memory" in part[3]["why_not"] and part[3]["ms_p50"] is None
    for a, b in zip(bf16[:3], own[:3], strict=True):
        assert a["vs_bf16"] == 1 and b["vs_bf16"] == a["ms_p50"] / b["ms_p50"]
        assert b["weight_bytes"] < a["weight_bytes"] and b["launch"] == "loop"
        tokens = b["tokens"] if b["phase"] == "prefill" else b["batch"]
        assert b["tokens_s"] == pytest.approx(1e3 * tokens / b["ms_p50"])
    # of 2 layers, 2 heads of 64, K and V: bf16; a page of 64 tokens for each of three sequences
    assert bf16[2]["kv_bytes"] == 3 * 20 * 2 * 2 * 2 * 64 * 2
    assert own[2]["kv_bytes"] == 3 * 64 * 2 * 2 * 2 * (32 + 3)
    assert csv.read_text().splitlines()[0] == ",".join(end_to_end.COLUMNS)
    assert len(csv.read_text().splitlines()) == 1 + len(rows)


@torch.inference_mode()
def test_a_call_does_the_same_again_and_fills_its_context():
    for contender in (packed("w4a8kv4"), packed("w8a8"), full()):
        for call in (contender.prefill(2, 9), contender.decode(3, 70)):
            first, again = call.run(), call.run()
            assert torch.equal(first.logits, again.logits)
            assert 0.1 < first.logits.std() < 10
            assert first.logits.shape[1] == 1
    cache = packed("w4a4kv4").decode(3, 70).run().past_key_values
    assert cache.seq_lens == [70, 70, 70] and cache.nbytes > 0
    assert full().decode(3, 70).run().past_key_values.get_seq_length() == 70


@torch.inference_mode()
def test_however_many_cases_all_are_compiled(monkeypatch):
    """Where dynamo has compiled a function for as many shapes as it may, it says nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = full_model("tiny", MODELS["tiny"], None, CPU)
    contender = Contender("bf16 compiled", model, compiled=True)
    few = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(few):
        for make in (contender.prefill, contender.decode):
            for tokens in (9, 12):
                call = make(2, tokens)
                assert torch.equal(call.run().logits, call.run().logits)


def test_models_are_those_of_the_shapes():
    for name, model in MODELS.items():
        config = whole_models.config_of(model)
        if name.startswith("qwen"):
            assert isinstance(config, Qwen2Config)
        assert config.num_hidden_layers == model.num_layers
    tiny = packed("w4a4kv4-head8", num_layers=1)
    assert len(tiny.model.model.layers) == 1
    assert tiny.weight_bytes == size_of(tiny.model).model


@pytest.mark.parametrize("room", [0, 1, 2, 5, 64, 100])
def test_largest_batch(monkeypatch, room):
    asked = []

    def has_room(contender, batch, context):
        asked.append(batch)
        return batch <= room

    monkeypatch.setattr(whole_models, "_has_room", has_room)
    assert whole_models.largest_batch(None, 8192) == room
    assert len(asked) == len(set(asked)) <= 16


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "w4b4"], "unknown format 'w4b4'"),
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--layers", "0"], "layers must be positive, got 0"),
        (["--shapes", "llama9"], "shapes must be among"),
        (["--overlap-launches"], "--overlap-launches is for a GPU, got --device cpu"),
        (["--M", "4"], "--M is for one op, got a whole model"),
    ],
)
def test_bad_input(quick, capsys, options, message):
    assert cli.main([*BENCH, *options]) == 2
    assert message in capsys.readouterr().err


def test_its_options_are_not_for_ops(capsys):
    assert cli.main(["bench", "pack", "--device", "cpu", "--prompt", "4"]) == 2
    assert "--prompt is for lowbit bench model" in capsys.readouterr().err
    assert cli.main(["bench", "pack", "model", "--device", "cpu"]) == 2
    assert "op must be one of" in capsys.readouterr().err


# the figure


def lines_of(perplexities: dict) -> list[dict]:
    """(recipe, format) -> perplexity, as `lowbit table --out` writes them."""
    lines = []
    for (recipe, format), value in perplexities.items():
        result = {"packed": value, "fake": None, "difference": None, "log_ratio_error": 0.1}
        found = {"perplexity": value} if recipe == "full" else result
        lines.append({"recipe": recipe, "format": format, "texts": {"t": found}})
    return lines


def test_speed_against_accuracy(tmp_path):
    speeds = {"bf16": 50.0, "bf16 compiled": 90.0, "w4a4kv4": 200.0, "w8a8kv8": 120.0}
    rows = [
        end_to_end.Row("tiny", 2, name, "decode", batch, 64, tokens_s=batch * speed)
        for batch in (1, 2)
        for name, speed in speeds.items()
    ]
    report.append_csv(tmp_path / "a.csv", rows, end_to_end.COLUMNS)
    measured = {("full", "fp32"): 10.0, ("rtn", "w4a4kv4"): 99.0, ("quarot", "w4a4kv4"): 12.0}
    measured |= {("rtn", "w2a16g64"): 50.0, ("rtn", "w8a8kv8"): 11.0}
    lines = lines_of(measured)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))

    speed = speed_accuracy.speeds(tmp_path / "a.csv", "tiny", "decode", 2, 64)
    assert speed == {"bf16": 180.0, "w4a4kv4": 400.0, "w8a8kv8": 240.0}
    found = {(p.recipe, p.format): p for p in speed_accuracy.points(speed, lines, "t")}
    assert {key: (p.tokens_s, p.perplexity) for key, p in found.items()} == {
        ("full", "bf16"): (180.0, 10.0),
        ("rtn", "w4a4kv4"): (400.0, 99.0),
        ("quarot", "w4a4kv4"): (400.0, 12.0),
        ("rtn", "w8a8kv8"): (240.0, 11.0),
    }
    command = [sys.executable, "-m", "benchmarks.speed_accuracy", "--model", "tiny", "--text", "t"]
    command += ["--speed", "a.csv", "--accuracy", "b.jsonl", "--tokens", "64", "-o", "c.png"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert [line.split()[:2] for line in out.splitlines()][0] == ["bf16", "full"]
    assert (tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(InputError, match="must have rows of bf16 and of a format"):
        speed_accuracy.speeds(tmp_path / "a.csv", "tiny", "decode", 3, 64)
    with pytest.raises(InputError, match="of the text 'u' and a timed format"):
        speed_accuracy.points(speed, lines, "u")
