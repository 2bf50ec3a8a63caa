"""The command line as a user meets it: stdout, stderr and the exit code."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from models import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file

from lowbit import cli, demo, training
from lowbit.checkpoint import load, save
from lowbit.errors import InputError
from lowbit.evaluate.text import manual_text
from lowbit.models.source import load_source
from lowbit.recipes import RECIPES, Calibration


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "tiny"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(source):
    path = source.parent / "packed"
    assert cli.main(["quantize", str(source), *RTN, "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(manual_text()[:2000].encode("ascii", "replace").decode())  # a token each
    return path


RTN = ["--recipe", "quarot-rtn", "--format", "w4a4kv4"]
WINDOW = 64
WINDOWS = ["--window", str(WINDOW), "--limit", "3"]


def lowbit(*args):
    """(exit code, stdout, stderr) of a process of its own."""
    command = [sys.executable, "-m", "lowbit.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def in_process(capsys, *args):
    """The same in this process, for the many cases that differ only in their arguments."""
    capsys.readouterr()
    try:
        code = cli.main([*map(str, args)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def assert_one_line(result, *parts):
    """Exit code 2, nothing on stdout, one line on stderr (progress bars before it aside)."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and "%|" not in line]
    assert code == 2 and out == "", (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("lowbit: error: "), err
    for part in parts:
        assert part in lines[0]


def test_quantize_eval_generate(capsys, tmp_path, source, text):
    out = tmp_path / "packed"
    code, stdout, stderr = lowbit("quantize", source, *RTN, "-o", out, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["format"] == "w4a4kv4" and "quantize" in stderr
    code, stdout, _ = in_process(capsys, "eval", out, "--text", text, *WINDOWS, "--json")
    (result,) = json.loads(stdout)["texts"]
    assert code == 0 and result["windows"] == len(result["window_nll"]) == 3
    code, stdout, _ = in_process(capsys, "eval", out, "--text", text, *WINDOWS)
    assert code == 0 and f"perplexity {result['perplexity']:.4f}" in stdout
    code, stdout, _ = in_process(capsys, "generate", out, "Once", "--max-new-tokens", "5")
    assert code == 0 and stdout.startswith("Once")


def test_packed_equals_fake_and_differs_from_full_precision(capsys, source, packed, text):
    found = {}
    for name, args in {"packed": [packed], "fake": [packed, "--fake"], "full": [source]}.items():
        code, out, err = in_process(capsys, "eval", *args, "--text", text, *WINDOWS, "--json")
        assert code == 0, err
        found[name] = json.loads(out)
    assert [r["kind"] for r in found.values()] == ["packed", "fake", "full precision"]
    ppl = {name: r["texts"][0]["perplexity"] for name, r in found.items()}
    assert ppl["packed"] == pytest.approx(ppl["fake"], rel=1e-3)
    assert abs(ppl["packed"] / ppl["full"] - 1) > 1e-3


def test_windows_of_few_rows_are_not_quantized(capsys, packed, source, text):
    """A window is a forward of so many rows: what decode runs is what is evaluated, or it is said
    that it is not."""
    decode, found = ("--decode", "w4a16", "--decode-rows"), {}
    runs = {"exact": [source], "own": [packed], "wide": [packed, *decode, WINDOW - 1]}
    runs |= {"few": [packed, *decode, WINDOW], "fake": [packed, "--fake", *decode, WINDOW]}
    for name, args in runs.items():
        code, out, err = in_process(capsys, "eval", *args, "--text", text, *WINDOWS, "--json")
        assert code == 0, err
        found[name] = json.loads(out)
    ppl = {name: r["texts"][0]["perplexity"] for name, r in found.items()}
    assert ppl["wide"] == ppl["own"] != ppl["few"] == pytest.approx(ppl["fake"], rel=1e-6)
    assert found["own"]["decode"] is None and found["exact"]["decode"] is None
    assert found["few"]["decode"] == {"format": "w4a16", "rows": WINDOW}
    for rows, note in ((WINDOW, "w4a16 up to {} rows; 3"), (WINDOW - 1, "rows: not these windows")):
        args = (packed, *decode, rows, "--text", text, *WINDOWS)
        code, out, _ = in_process(capsys, "eval", *args)
        assert code == 0 and note.format(rows) in out
    last = (packed / "evaluation.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["of"]["decode"] == f"w4a16 up to {WINDOW - 1} rows"
    args = (packed, *decode, 4, "--prefill-chunk", 4, "--text", text, *WINDOWS)
    code, out, _ = in_process(capsys, "eval", *args)  # of longer windows, so many at a time
    assert code == 0 and "w4a16 up to 4 rows; 3" in out


def test_prefill_options(capsys, tmp_path, packed, text):
    """Both change the numbers, packed and simulated alike, and both stand in the results."""
    folder, pieces, full = tmp_path / "packed", ("--prefill-chunk", 16), ("--prefill-kv", "full")
    shutil.copytree(packed, folder)
    found = []
    for args in ((), pieces, full, (*pieces, *full), (*pieces, *full, "--fake")):
        command = ("eval", folder, *args, "--text", text, *WINDOWS)
        code, out, err = in_process(capsys, *command, "--json")
        assert code == 0, err
        found.append((json.loads(out)["prefill"], json.loads(out)["texts"][0]["perplexity"]))
    how = ["", "16 tokens at a time", "full KV", "full KV, 16 tokens at a time"]
    assert [prefill for prefill, _ in found] == [*how, how[-1]]
    plain, in_pieces, in_full, both, fake = (perplexity for _, perplexity in found)
    assert in_pieces == pytest.approx(plain, rel=1e-3)
    assert fake == pytest.approx(both, rel=1e-3)
    assert len({plain, in_full, both}) == 3
    lines = (folder / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["of"].get("prefill", "") for line in lines[-5:]] == [*how, how[-1]]
    assert in_process(capsys, "report", folder)[0] == 0
    page = (folder / "report.md").read_text()
    assert all(f"float32 on cpu, {name} |" in page for name in how[1:])
    args = ("generate", folder, "Once", "--max-new-tokens", 2, *full, "--prefill-chunk", 3)
    assert in_process(capsys, *args)[0] == 0


def test_generate_is_deterministic_and_counts(capsys, packed):
    args = ("generate", packed, "Once upon", "--max-new-tokens", 4, "--json")
    first, second = (json.loads(in_process(capsys, *args)[1]) for _ in range(2))
    assert first["completion"] == second["completion"] and 1 <= first["new_tokens"] <= 4
    sampled = in_process(capsys, *args, "--temperature", 1.0, "--seed", 3)
    assert sampled[0] == 0 and json.loads(sampled[1])["prompt"] == "Once upon"


def test_gptq_calibrates_on_a_file(capsys, tmp_path, source, text):
    args = ("--calibration", text, "--samples", 2, "--length", 32, "-o", tmp_path / "gptq")
    code, out, err = in_process(capsys, "quantize", source, "--recipe", "gptq", *args, "--json")
    assert code == 0, err
    assert json.loads(out)["report"]["calibration"] == [2, 32]


def test_table_and_plot(capsys, tmp_path, source, text):
    args = ("--recipe", "rtn", "--format", "w8a8", "--text", text, *WINDOWS)
    small = ("--samples", 1, "--length", 32)
    code, out, err = in_process(capsys, "table", source, *args, *small, "--json")
    assert code == 0, err
    assert [row["recipe"] for row in json.loads(out)["rows"]] == ["rtn"]
    code, out, _ = in_process(capsys, "table", source, *args, *small)
    assert code == 0 and "| rtn | w8a8 |" in out
    mixed = ("--recipe", "rtn", "gptq", "--format", "w8a8", "--kind", "fake")
    mixed += ("--text", text, "manual")
    setting = ("--set", "rounding.damp=0.3")
    code, out, _ = in_process(capsys, "table", source, *mixed, *WINDOWS, *small, *setting)
    assert code == 0 and "| gptq | w8a8 |" in out
    assert "text.txt: fake" in out and "the Python manual: fake" in out
    wrong = in_process(capsys, "table", source, *mixed, *small, "--set", "rounding.dump=1")
    assert_one_line(wrong, "unknown field 'dump', expected one of clip")
    wrong = in_process(capsys, "table", source, *mixed, *small, "--set", "calibration.samples=2")
    assert_one_line(wrong, "--samples and --length must say it", "calibration.samples=2")
    pytest.importorskip("matplotlib")
    figure = tmp_path / "new" / "figure.png"
    args = ("--block", 1, "--tokens", 16, "--text", text, "-o", figure)
    code, out, err = in_process(capsys, "plot", source, *args)
    assert code == 0 and figure.read_bytes().startswith(b"\x89PNG"), err


def test_a_table_goes_on_from_its_file(capsys, tmp_path, source, text, monkeypatch):
    rows = tmp_path / "new" / "rows.jsonl"
    common = ("--format", "w8a8", "--kind", "fake", "--text", text, *WINDOWS, "--out", rows)
    common += ("--samples", 1, "--length", 32)
    code, first, _ = in_process(capsys, "table", source, "--recipe", "rtn", *common)
    lines = rows.read_text().splitlines()
    assert code == 0 and len(lines) == 2  # full precision too
    fields = json.loads(lines[1])["fields"]
    assert (fields["calibration.samples"], fields["calibration.length"]) == ("1", "32")
    both = ("table", source, "--recipe", "rtn", "gptq", *common)
    code, out, err = in_process(capsys, *both)
    assert code == 0 and "gptq w8a8: text.txt" in err and "rtn w8a8: text.txt" not in err
    assert first.splitlines()[-1] in out and len(rows.read_text().splitlines()) == 3
    with monkeypatch.context() as patch:
        patch.setattr("lowbit.evaluate.table.quantize", None)
        assert in_process(capsys, *both)[:2] == (0, out)
        before = [json.loads(line) for line in rows.read_text().splitlines()]
        assert before[2]["fields"].pop("rounding.damp") == "0.01"  # as of before this was a field
        rows.write_text("".join(json.dumps(line) + "\n" for line in before))
        assert in_process(capsys, *both)[:2] == (0, out)
        with pytest.raises(TypeError):  # quantize is patched out
            in_process(capsys, *both, "--set", "rounding.damp=0.3")
    in_process(capsys, *both, "--set", "rounding.damp=0.3", "--seed", 1)  # other conditions
    assert len(rows.read_text().splitlines()) == 6
    rows.write_text("nonsense\n")
    assert_one_line(in_process(capsys, *both), "line 1 of", "must be a result of lowbit's")


def test_a_table_learns_on_windows_of_its_own_as_quantize_does(capsys, source, text, monkeypatch):
    taken, learn = [], training.learn_rotations

    def learn_rotations(model, fitted, spec, format, clips, windows, *more):
        taken.append(tuple(windows.shape))
        return learn(model, fitted, spec, format, clips, windows, *more)

    monkeypatch.setattr(training, "learn_rotations", learn_rotations)
    learned = ("--recipe", "spinquant-rtn", "--samples", 1, "--length", 32)
    for setting in ("steps=2", "batch=2", "length=16"):
        learned += ("--set", f"training.{setting}")
    measured = ("--format", "w8a8", "--kind", "fake", "--text", text, *WINDOWS)
    code, _, err = in_process(capsys, "table", source, *learned, *measured)
    assert code == 0 and taken == [(4, 16)], err


def test_recipes_are_listed_and_changed(capsys, tmp_path, source):
    code, out, _ = in_process(capsys, "recipes")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == list(RECIPES)
    assert "252 published cells" in out
    code, out, _ = in_process(capsys, "recipes", "awq")
    assert "    rounding.clip = 'output'" in out and "w3a16g128" in out
    code, out, _ = in_process(capsys, "recipes", "gptq", "--json")
    (found,) = json.loads(out)["recipes"]
    assert found["fields"]["rounding.damp"] == 0.01
    small = ("--samples", 1, "--length", 32, "-o", tmp_path / "out", "--json")
    setting = ("--recipe", "gptq", "--set", "rounding.damp=0.25")
    code, out, err = in_process(capsys, "quantize", source, *setting, *small)
    damps = {r["damp"] for r in json.loads(out)["report"]["rounding"].values()}
    assert code == 0 and damps == {0.25}, err
    setting = ("--set", "rounding.dump=0.25")
    wrong = in_process(capsys, "quantize", source, *setting, *small)
    assert_one_line(wrong, "unknown field 'dump', expected one of act_order, static_groups")
    assert_one_line(in_process(capsys, "recipes", "gptk"), "did you mean 'gptq'?")


def test_demo(capsys, tmp_path, source, monkeypatch):
    monkeypatch.setattr(demo, "load_source", lambda name, dtype: load_source(source, dtype))
    monkeypatch.setattr(demo, "WINDOW", 64)
    monkeypatch.setattr(demo, "CALIBRATION", Calibration(2, 32))
    code, out, err = in_process(capsys, "demo", "-o", tmp_path / "out", "--limit", 2)
    assert code == 0, err
    assert "| quarot | w4a4kv4 |" in out and "bf16" in out and demo.PROMPT in out
    code, out, err = in_process(capsys, "demo", "-o", tmp_path / "out", "--limit", 2, "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == len(demo.RECIPES), err


def test_doctor_and_help(capsys):
    code, out, _ = in_process(capsys, "doctor", "--json")
    assert code == 0 and "hadamard" in json.loads(out)["ops"]
    code, out, _ = in_process(capsys, "--help")
    assert code == 0
    for command in ("quantize", "eval", "generate", "table", "plot", "doctor", "demo"):
        assert command in out
        assert in_process(capsys, command, "--help")[0] == 0


def test_json_never_holds_nan():
    assert cli.finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}


MISTAKES = {
    "format": (["quantize", "S", "--format", "w4b4", "-o", "O"], ["'w4b4'", "w<bits>", "nearest"]),
    "recipe": (["quantize", "S", "--recipe", "quarrot", "-o", "O"], ["'quarrot'", "'quarot'"]),
    "model": (["quantize", "smollm-135m", "-o", "O"], ["'smollm-135m'", "did you mean"]),
    "folder": (["eval", "./missing"], ["'./missing' does not exist"]),
    "group": (["quantize", "S", "--format", "w4a16g128", "-o", "O"], ["must divide", "got 128"]),
    "output": (["quantize", "S", "-o", "S"], ["exists", "--overwrite"]),
    "text": (["eval", "P", "--text", "missing.txt"], ["'missing.txt' does not exist"]),
    "short text": (["eval", "P", "--text", "T"], ["expected at least 2048 tokens, got 2000"]),
    "short calibration": (
        ["quantize", "S", "--calibration", "T", "-o", "O"],
        ["shorter than one window", "at least 2048 tokens, got 2000"],
    ),
    "window": (["eval", "P", "--window", "1"], ["window must be at least 2 tokens, got 1"]),
    "limit": (["eval", "P", "--text", "T", "--window", "8", "--limit", "0"], ["limit", "got 0"]),
    "fake": (["eval", "S", "--fake"], ["--fake needs a checkpoint"]),
    "decode": (["eval", "P", "--decode", "w8a16"], ["decode must be 'w4a16'", "got 'w8a16'"]),
    "decode rows": (["generate", "P", "x", "--decode-rows", "4"], ["needs decode", "got 4 alone"]),
    "decode, full": (["eval", "S", "--decode", "w4a16"], ["--decode needs a packed model"]),
    "prefill": (["eval", "P", "--prefill-kv", "bf16"], ["argument --prefill-kv", "'bf16'"]),
    "full": (["generate", "S", "Hi", "--prefill-kv", "full"], ["prefill_kv must be 'quantized'"]),
    "chunk": (["eval", "P", "--prefill-chunk", "0"], ["prefill_chunk must be", "got 0"]),
    "pieces": (["eval", "P", "--prefill-chunk", "8", "--tasks", "piqa"], ["of texts", "--tasks"]),
    "backend": (
        ["eval", "P", "--text", "T", *WINDOWS, "--backend", "cuda"],
        ["backend 'cuda' was asked for and cannot run this call", "cuda: the "],
    ),
    "prompt": (
        ["generate", "P", "x" * 250, "--max-new-tokens", "10"],
        ["prompt longer than the cache: expected at most 246 tokens", "got 250"],
    ),
    "empty prompt": (["generate", "P", ""], ["prompt must hold at least one token"]),
    "chat": (["generate", "P", "hello", "--chat"], ["--chat needs", "chat template"]),
    "already packed": (["quantize", "P", "-o", "O"], ["full precision", "quantized by 'lowbit'"]),
    "device": (["eval", "P", "--device", "tpu9"], ["device must be", "'tpu9'"]),
    "block": (["plot", "S", "--block", "2", "-o", "O"], ["block must be in 0..1, got 2"]),
    "option": (["eval", "P", "--window", "x"], ["argument --window: invalid int value: 'x'"]),
    "command": (["quantise"], ["invalid choice: 'quantise'"]),
    "no command": ([], ["COMMAND"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(capsys, tmp_path, source, packed, text, mistake):
    args, parts = MISTAKES[mistake]
    places = {"S": source, "P": packed, "T": text, "O": tmp_path / "out"}
    result = in_process(capsys, *(places.get(arg, arg) for arg in args))
    assert_one_line(result, *parts)
    assert list(tmp_path.iterdir()) == []


def damaged(folder, target, change):
    """A copy of a model folder with its tensors changed in place."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_mistake_in_a_process_of_its_own(tmp_path, packed):
    truncated = tmp_path / "truncated"
    shutil.copytree(packed, truncated)
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[:1000])
    assert_one_line(lowbit("generate", truncated, "x"), "must be a whole safetensors file")


def test_damaged_checkpoints_are_one_line(capsys, tmp_path, packed):
    name = "model.layers.0.mlp.up_proj.codes"

    def cut(tensors):
        tensors[name] = tensors[name][:-1].clone()

    missing = damaged(packed, tmp_path / "missing", lambda t: t.pop(name))
    assert_one_line(in_process(capsys, "eval", missing), f"missing tensor {name}")
    wrong = damaged(packed, tmp_path / "wrong", cut)
    assert_one_line(in_process(capsys, "eval", wrong), f"{name} must have shape", "got (95, 32)")
    config = json.loads((missing / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (missing / "config.json").write_text(json.dumps(config))
    assert_one_line(in_process(capsys, "eval", missing), "version must be at most", "got 99")


def test_nan_in_weights_or_calibration(capsys, tmp_path, source, text):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    def overflow(tensors):
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"].fill_(1e25)

    out = tmp_path / "out"
    poisoned = damaged(source, tmp_path / "nan", poison)
    result = in_process(capsys, "quantize", poisoned, *RTN, "-o", out)
    assert_one_line(result, "weights must be finite", "model.layers.1.mlp.up_proj.weight")
    overflowing = damaged(source, tmp_path / "inf", overflow)
    small = ("--calibration", text, "--samples", 4, "--length", 32)
    result = in_process(capsys, "quantize", overflowing, "--recipe", "gptq", *small, "-o", out)
    assert_one_line(result, "calibration activations must be finite", "block 0")
    assert not out.exists()


def test_a_failed_run_with_overwrite_leaves_the_old_folder(capsys, tmp_path, source, packed):
    target = tmp_path / "target"
    shutil.copytree(packed, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    args = ("--overwrite", "--format", "w4a16g128", "-o", target)
    assert_one_line(in_process(capsys, "quantize", source, *args), "must divide")
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    args = ("--overwrite", "--recipe", "rtn", "--format", "w8a8", "-o", target)
    assert in_process(capsys, "quantize", source, *args)[0] == 0
    assert (
        json.loads((target / "config.json").read_text())["quantization_config"]["recipe"] == "rtn"
    )


def test_a_tokenizer_of_another_model(capsys, tmp_path, source, packed):
    """Named before hours of work; and where it was put into a checkpoint later."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<of another model>"])
    wanted = "token ids in 0 .. 127, the rows of the model's embedding, got ids up to 128"
    for number, folder in enumerate((source, packed)):
        other = tmp_path / f"other-{number}"
        shutil.copytree(folder, other)
        tokenizer.save_pretrained(other)
        assert_one_line(in_process(capsys, "generate", other, "Once"), wanted)
    started = in_process(capsys, "quantize", tmp_path / "other-0", *RTN, "-o", tmp_path / "out")
    assert_one_line(started, wanted)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="got ids up to 128: is it the model's own"):
        save(load(packed), tmp_path / "out", tokenizer)


def test_serve(capsys, monkeypatch, packed):
    """transformers' server is called in this process, which has registered the format."""
    from transformers.cli import transformers as hf_cli
    from transformers.utils import import_utils

    called = []
    monkeypatch.setattr(hf_cli, "app", lambda words, **options: called.append((words, options)))
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    assert_one_line(in_process(capsys, "serve", packed), "pip install 'transformers[serving]'")
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    assert in_process(capsys, "serve", packed, "--port", 9, "--device", "cpu")[0] == 0
    ((words, options),) = called
    assert words == ["serve", str(packed), *"--host localhost --port 9 --device cpu".split()]
    assert not options["standalone_mode"]  # its errors are raised, not printed
    assert_one_line(in_process(capsys, "serve", packed / "no"), "does not exist")
