"""Rows of the published tables: what claims them, what counts as reproduced, and running some."""

import json
import math
import re
from dataclasses import replace

import pytest
from models import tiny_llama, tiny_tokenizer

from lowbit import cli
from lowbit.errors import InputError
from lowbit.evaluate import reproduce
from lowbit.evaluate.lines import Lines
from lowbit.evaluate.named_text import PUBLISHED, texts_folder
from lowbit.evaluate.published import published_tables
from lowbit.evaluate.published_rows import (
    CHECKPOINTS,
    PublishedRow,
    _interval,
    chosen,
    figure,
    model_of,
    rows_of,
    spread_of,
    table_name,
)
from lowbit.evaluate.zero_shot import Asked
from lowbit.formats import QuantFormat
from lowbit.recipes import RECIPES

PPL = "wikitext2_ppl"


def the_row(table: str, model: str, setting: str, name: str) -> PublishedRow:
    (row,) = (r for r in rows_of(table) if (r.model, r.setting, r.name) == (model, setting, name))
    return row


def test_every_cell_is_in_a_row_and_every_row_has_a_format():
    names = sorted({table_name(cell) for cell in published_tables()})
    assert len(names) == 20 and {"000.6", "002.5", "003.W4G-1", "003.other-W2G32"} <= set(names)
    rows = [row for name in names for row in rows_of(name)]
    assert sum(len(row.cells) for row in rows) == len(published_tables())
    assert {row.model for row in rows} == set(CHECKPOINTS)
    for row in rows:
        assert len(set(row.metrics)) == len(row.metrics)
        QuantFormat.parse(row.format)
        assert row.recipe is None or row.recipe is RECIPES[row.recipe.name]
        claimed = any(row.source == rows[0] for r in RECIPES.values() for rows in r.reproduces)
        assert row.is_full <= (row.recipe is None) and claimed
    assert rows_of("003.w4g128") == rows_of("003.W4G128")
    with pytest.raises(InputError, match="unknown table '000.66'.*did you mean '000.6'"):
        rows_of("000.66")


def test_recipes_and_formats_of_rows():
    row = the_row("001.6", "LLaMA-2-7B", "w4a4kv4", "QuaRot*, RTN")
    assert (row.recipe.name, row.format) == ("quarot-rtn", "w4a4kv4")
    assert the_row("001.6", "LLaMA-2-7B", "w4a4kv4", "LLM-QAT, QAT").recipe is None
    row = the_row("003.W3G128", "Mistral-7B", "w3a16g128", "AutoRound")
    assert (row.recipe.name, row.format) == ("autoround", "w3a16g128-wasym")
    assert the_row("000.6", "Mistral-7B", "w16a16", "FP16").format == "w16a16"
    for name in ("SpinQuant, RTN", "DuaRot, GPTQ"):
        assert the_row("000.6", "LLaMA-2-7B", "w4a4kv4", name).format == "w4a4kv4-aasym"
    assert the_row("001.6", "LLaMA-2-7B", "w4a16", "SpinQuant*, RTN").format == "w4a16"


def test_the_spread_between_papers():
    # 6.27 here, 6.4 in SpinQuant, 6.10 in QuaRot; half a digit to either side.
    row = the_row("000.6", "LLaMA-2-7B", "w4a4kv4", "QuaRot, GPTQ")
    spread = spread_of(row, PPL)
    assert (spread.low, spread.high, spread.papers) == (
        pytest.approx(6.095), pytest.approx(6.45), 3,
    )  # fmt: skip
    assert 6.44 in spread and 6.46 not in spread and 6.09 not in spread
    # 8.2 +- 0.36 in SpinQuant: the deviation counts.
    row = the_row("001.6", "LLaMA-2-7B", "w4a4kv4", "QuaRot*, RTN")
    assert spread_of(row, PPL).low == pytest.approx(7.84)
    assert (
        spread_of(the_row("000.6", "LLaMA-2-13B", "w16a16", "FP16"), PPL).papers == 3
    )  # 000, 001, 003
    assert spread_of(the_row("000.6", "LLaMA-2-7B", "w4a4kv4", "DuaRot, GPTQ"), PPL) is None
    assert spread_of(the_row("001.6", "LLaMA-2-7B", "w4a4kv4", "LLM-QAT, QAT"), PPL) is None
    assert spread_of(the_row("001.6", "LLaMA-2-7B", "w16a16", "FP16"), "piqa") is None


def test_intervals_of_printed_figures():
    row = the_row("002.5", "LLaMA-3-70B", "w4a4", "QuaRot*, RTN")
    assert spread_of(row, PPL) is None
    printed = {"6.27": (6.265, 6.275), "2e5": (150_000, 250_000), "2.60e+03": (2595, 2605)}
    for text, ends in printed.items():
        assert _interval(text) == pytest.approx(ends)
    assert _interval("8.2 ±0.36", "0.36") == pytest.approx((7.84, 8.56))
    for cell in published_tables():
        if figure(cell) is not None and math.isfinite(figure(cell)):
            low, high = _interval(cell["value_raw"])
            assert low <= figure(cell) <= high


def test_what_is_missing_in_print_is_no_figure():
    missing = [c for c in published_tables() if figure(c) is None]
    assert len(missing) == 2 and {c["value_raw"] for c in missing} == {"0.00"}


def test_chosen_rows():
    rows = rows_of("004.1")
    assert chosen(rows, []) == rows
    found = chosen(rows, ["rtn", "FP16", "w4a4"])
    assert [(r.name, r.setting) for r in found] == [("FP16", "w16a16"), ("RTN", "w4a4")]
    assert {r.setting for r in chosen(rows, ["quarot-offline"])} == {"w4a4", "w6a6", "w8a8"}
    assert {r.name for r in chosen(rows, ["w8a8"])} > {"RTN", "OS+, RTN"}
    with pytest.raises(InputError, match="no row 'quarott'.*did you mean 'quarot'"):
        chosen(rows, ["quarott"])


def test_which_checkpoint_is_held_against_which():
    one, several = rows_of("004.1"), rows_of("000.6")
    smollm = "HuggingFaceTB/SmolLM-135M"
    assert model_of(one, "smollm-135m", None) == ("SmolLM-135M", smollm, True)
    assert model_of(one, smollm, None) == ("SmolLM-135M", smollm, True)
    assert model_of(one, "smollm2-135m", None) == ("SmolLM-135M", "smollm2-135m", False)
    folder = "./models/Llama-2-7b-hf/"
    assert model_of(several, folder, None) == ("LLaMA-2-7B", folder, True)
    assert model_of(several, "./mine", "llama-3-8b") == ("LLaMA-3-8B", "./mine", False)
    with pytest.raises(InputError, match="pass --of with the one to hold './mine' against"):
        model_of(several, "./mine", None)
    with pytest.raises(InputError, match="--of must be a model of the table.*got 'phi-2'"):
        model_of(several, "./mine", "phi-2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "tiny"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def table(model, tmp_path, monkeypatch, capsys):
    """`lowbit table TABLE --model tiny` on a small WikiText-2, no C4 and no hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setitem(PUBLISHED, "wikitext2", replace(PUBLISHED["wikitext2"], rows=2))
    texts_folder().mkdir(parents=True)
    (texts_folder() / "wiki.test.raw").write_text("some words\n" + "of a text " * 20 + "\n")

    def run(*args):
        capsys.readouterr()
        code = cli.main(["table", *map(str, args), "--window", "32", "--json"])
        out, err = capsys.readouterr()
        return (json.loads(out), err) if code == 0 else (code, err)

    return run


def test_rows_are_run_and_held_against_the_paper(table, model, tmp_path, monkeypatch):
    command = ["004.1", "--model", model, "--rows", "FP16", "RTN", "w4a4", "w4a16g128"]
    command += ["--metrics", PPL, "c4_ppl", "--limit", "2", "--out", tmp_path / "rows.jsonl"]
    found, err = table(*command)
    assert (found["model"], found["same_checkpoint"]) == ("SmolLM-135M", False), err
    full, grouped, rounded = found["rows"]
    assert (full["row"], full["recipe"]) == ("FP16", None)
    assert (rounded["row"], rounded["recipe"], rounded["format"]) == ("RTN", "rtn", "w4a4")
    for row in (full, rounded):
        wikitext2, c4 = row["figures"]
        paper = wikitext2["paper"]
        assert wikitext2["difference"] == pytest.approx(wikitext2["ours"] - paper)
        assert c4["ours"] is None and "put c4-validation" in c4["why"]
    assert rounded["figures"][0]["ours"] != full["figures"][0]["ours"]
    assert "group_size must divide" in grouped["figures"][0]["why"]
    assert "a different checkpoint" not in err and "| RTN | w4a4 | wikitext2_ppl |" in err
    with monkeypatch.context() as patch:  # what is in the file is not measured again
        patch.setattr("lowbit.evaluate.reproduce.perplexity", None)
        assert table(*command)[0] == found


def test_a_file_in_place_of_a_published_text(table, model, tmp_path):
    """It is said with every figure that it is of another text."""
    file = tmp_path / "joined.txt"
    file.write_text("of another text " * 40)
    command = ["004.1", "--model", model, "--rows", "FP16", "--limit", "2", "--metrics"]
    command += [PPL, "c4_ppl", "avg_ppl", "--out", tmp_path / "rows.jsonl"]
    (own,) = table(*command)[0]["rows"]
    (row,) = table(*command, "--text", f"c4={file}")[0]["rows"]
    ours = [figure["ours"] for figure in row["figures"]]
    assert ours[0] == own["figures"][0]["ours"] and ours[2] == (ours[0] + ours[1]) / 2
    told = "c4 is joined.txt here"
    assert [figure["why"] for figure in row["figures"]] == [None, told, told]
    for word in (file, f"c5={file}"):
        code, err = table(*command, "--text", word)
        assert code == 2 and "must be NAME=FILE, of wikitext2, ptb, c4, got" in err
    assert "does not exist" in table(*command, "--text", "c4=nowhere")[1]


def test_what_people_see(table, model, capsys):
    words = ["table", "004.1", "--model", str(model), "--rows", "fp16", "--metrics", PPL]
    assert cli.main([*words, "--window", "32", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    first, _, head, _, row = out.splitlines()
    assert "a different checkpoint than SmolLM-135M" in first and "2 windows of each" in first
    assert head == reproduce.HEAD and row.startswith("| FP16 | w16a16 | wikitext2_ppl | ")
    assert "| one paper |" in row


def test_rows_that_cannot_be_run_say_why(table, model):
    command = ("001.6", "--model", model, "--of", "LLaMA-2-7B", "--metrics", PPL, "--rows")
    (row,) = table(*command, "LLM-QAT", "w4a4kv4")[0]["rows"]
    assert row["figures"][0]["why"] == "LLM-QAT is not there: no recipe claims the row"
    command = ("000.6", "--model", "LLaMA-3-8B", "--metrics", PPL, "--rows", "RTN", "w4a4kv4")
    found, err = table(*command)
    (row,) = found["rows"]
    assert "meta-llama/Meta-Llama-3-8B" in row["figures"][0]["why"]
    assert " | not run (1) |  | " in err
    assert f"(1) {row['figures'][0]['why']}" in err


def test_tasks_in_the_metric_that_the_paper_prints(monkeypatch, tmp_path):
    """acc_norm where DuaRot's tables have it, acc in the survey's, and the mean of the row."""
    asked = []

    def evaluate(model, tokenizer, tasks, manager, batch_size, items, lines, of):
        (task,) = tasks.tasks
        asked.append(task)
        return {task: {"acc": 0.25} | ({} if task == "boolq" else {"acc_norm": 0.5})}

    monkeypatch.setattr("lowbit.evaluate.zero_shot.task_manager", lambda names, path: None)
    monkeypatch.setattr(
        "lowbit.evaluate.zero_shot.asked_for", lambda names, manager: Asked(tuple(names), ())
    )
    monkeypatch.setattr("lowbit.evaluate.zero_shot.evaluate", evaluate)
    lines = Lines(tmp_path / "rows.jsonl")
    conditions = reproduce.Conditions(32, None, None, 1, None, False, {}, lines, {})
    for table, model, expected in (("000.7", "LLaMA-2-7B", 50.0), ("004.1", "SmolLM-135M", 25.0)):
        row = the_row(table, model, "w16a16", "FP16")
        metrics = tuple(m for m in row.metrics if not m.endswith("_ppl"))
        harness = reproduce.Harness([*metrics], conditions)
        harness.measure(row, ("piqa",), lambda: (None, None))
        ours, why_not = harness.measure(row, metrics, lambda: (None, None))
        assert (ours["piqa"], ours["boolq"]) == (expected, 25.0) and why_not == {}
        assert ours["avg_acc"] == pytest.approx((7 * expected + 25) / 8)
        assert len(asked) == 8 and "social_iqa" in asked  # each once, the first call's too
        asked.clear()


def test_a_figure_inside_and_outside():
    row = the_row("000.6", "LLaMA-2-7B", "w4a4kv4", "QuaRot, GPTQ")
    for ours, verdict in ((6.2, "yes"), (7.0, "no")):
        found = reproduce.figures(row, (PPL,), {PPL: ours}, {}, {})
        text = reproduce.markdown([(row, found)])
        assert text.splitlines()[-1] == (
            f"| QuaRot, GPTQ | w4a4kv4 | {PPL} | 6.27 | {ours:.3f} | {ours - 6.27:+.3f} | "
            f"6.095 to 6.450 | {verdict} |"
        )
    row = the_row("001.6", "LLaMA-2-7B", "w16a16", "FP16")
    (found,) = reproduce.figures(row, ("piqa",), {"piqa": 78.0}, {}, {})
    assert found.inside is None and "not public" in found.why


@pytest.mark.parametrize(
    "args, message",
    [
        (("004.1", "--recipe", "rtn"), "--recipe must not be given with a published table"),
        (("smollm2-135m", "--rows", "RTN"), "--rows is for a published table"),
        (("004.1", "--metrics", "c4"), "unknown metric 'c4'.*did you mean 'c4_ppl'"),
        (("004.9",), "unknown table '004.9'"),
    ],
)
def test_mistakes(table, args, message):
    code, err = table(*args)
    assert code == 2
    assert re.search(message, err), err
