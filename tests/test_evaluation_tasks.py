"""lm-eval's tasks: with a stand-in for it, and, where it is installed, on a local task."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from models import tiny_llama, tiny_tokenizer

from lowbit import cli
from lowbit.errors import InputError
from lowbit.evaluate import zero_shot
from lowbit.evaluate.lines import Lines
from lowbit.evaluate.published import published_tables, source_of
from lowbit.evaluate.word_perplexity import word_perplexity

TAG = "pairs"


class Manager:
    """What of lm-eval's TaskManager is used."""

    def __init__(self, include_path=None, include_defaults=True):
        names = ["piqa", "mmlu", "hellaswag", "social_iqa", "one", "two"]
        self.all_tags = [TAG]
        self.all_tasks = sorted(["local"] if not include_defaults else [*names, TAG])
        self.task_index = {TAG: SimpleNamespace(tags={"two", "one"})}


@pytest.fixture
def lm_eval(monkeypatch):
    """Modules under lm-eval's names; `ran` has the tasks that were run."""
    ran = []

    def simple_evaluate(model, tasks, task_manager, limit, log_samples, bootstrap_iters):
        (task,) = tasks
        if task == "piqa" and model.pretrained == "offline":
            raise ConnectionError("no\nnetwork")
        ran.append(task)
        print("Determined largest batch size")
        result = {"alias": task, "acc,none": 0.25, "acc_stderr,none": "N/A", "em,strict": 1}
        return {"results": {task: result, f"{task}_part": {}}}

    package, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = simple_evaluate
    package.__spec__ = SimpleNamespace(name="lm_eval")
    models.HFLM = lambda **given: SimpleNamespace(**given)
    tasks = ModuleType("lm_eval.tasks")
    tasks.TaskManager = Manager
    parts = {"": package, ".models": ModuleType("m"), ".models.huggingface": models}
    for name, module in {**parts, ".tasks": tasks}.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    return ran


def run(asked, lines=Lines(), model="model", items=None, of=None):  # noqa: B008
    found = zero_shot.Asked(tuple(asked), ())
    return zero_shot.evaluate(model, None, found, Manager(), 1, items, lines, of or {"model": "a"})


def test_the_groups_are_those_of_the_tables():
    metrics = {"000": set(), "003": set()}
    for cell in published_tables():
        for source in metrics.keys() & {source_of(cell)}:
            metrics[source].add(cell["metric"])
    eight = {zero_shot.ALIASES.get(name, name) for name in metrics["000"]}
    assert eight - {"avg_acc", "wikitext2_ppl"} == set(zero_shot.GROUPS["commonsense"])
    eleven = {name for name in metrics["003"] if not name.endswith("_ppl")}
    assert eleven - {"avg_acc"} == set(zero_shot.GROUPS["autoround"])
    assert [len(tasks) for tasks in zero_shot.GROUPS.values()] == [8, 11]


def test_names():
    asked = zero_shot.asked_for(["siqa", TAG, "piqa", "social_iqa"], Manager())
    assert asked.tasks == ("social_iqa", "one", "two", "piqa") and asked.groups == ()
    asked = zero_shot.asked_for(["mmlu", "commonsense"], Manager())
    assert asked.tasks == ("mmlu", *zero_shot.GROUPS["commonsense"])
    assert asked.groups == ("commonsense",)
    with pytest.raises(InputError, match="unknown task 'helaswag'.*did you mean 'hellaswag'"):
        zero_shot.asked_for(["piqa", "helaswag"], Manager())
    with pytest.raises(InputError, match="a task of lm-eval$"):
        zero_shot.asked_for(["zzzz"], Manager())


def test_a_folder_that_has_all_the_tasks_is_read_alone(lm_eval, tmp_path):
    assert zero_shot.task_manager(["local"], tmp_path).all_tasks == ["local"]
    assert "piqa" in zero_shot.task_manager(["local", "piqa"], tmp_path).all_tasks
    with pytest.raises(InputError, match="task folder .*missing' does not exist"):
        zero_shot.task_manager(["local"], tmp_path / "missing")


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="need the package lm-eval.*lowbit\\[eval\\]"):
        zero_shot.task_manager(["piqa"])


def test_batch_sizes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert zero_shot.batch_size_of("auto", gpu) == "auto"
    assert zero_shot.batch_size_of("auto", cpu) == zero_shot.CPU_BATCH
    assert zero_shot.batch_size_of("3", gpu) == 3
    for wrong in ("0", "-1", "x"):
        with pytest.raises(InputError, match=f"at least 1, got '{wrong}'"):
            zero_shot.batch_size_of(wrong, cpu)


def test_a_run_goes_on_with_the_tasks_not_done(lm_eval, tmp_path, capsys):
    lines = Lines(tmp_path / "results.jsonl")
    with pytest.raises(InputError, match="task 'piqa' cannot be run: no network"):
        run(["one", "piqa", "two"], lines, model="offline")
    found = run(["one", "piqa", "two"], lines)
    assert lm_eval == ["one", "piqa", "two"]
    assert found["one"] == {"acc": 0.25, "em,strict": 1.0}
    out, err = capsys.readouterr()
    assert out == "" and "task one: from" in err and "task two" not in err
    for other in ({"items": 5}, {"of": {"model": "b"}}):
        run(["one"], lines, **other)
    assert lm_eval == ["one", "piqa", "two", "one", "one"]
    with pytest.raises(InputError, match="items must be at least 1, got 0"):
        run(["one"], items=0)


def test_averages_and_what_people_see():
    found = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.7},
        "boolq": {"acc": 0.25},
        "wikitext": {"word_perplexity": 12.0},
    }
    means = zero_shot.averages(found, ("piqa", "boolq"))
    assert means == pytest.approx({"acc": 0.375, "acc_norm": 0.475})
    assert zero_shot.averages(found, ("piqa", "wikitext")) == {}
    text = zero_shot.table(found, ())
    assert "acc 50.00 +- 1.00, acc_norm 0.7000" in text and "word_perplexity 12.0000" in text


TASKS = {
    "local_pairs": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_pages": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder with a model, a file of items and two tasks of them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lowbit[eval]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    items = [{"query": f"query {i}:", "choices": [" no", " yes"], "gold": i % 2} for i in range(6)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    for name, text in TASKS.items():
        data = f'dataset_path: json\ndataset_kwargs: {{data_files: "{tmp_path}/items.jsonl"}}\n'
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: train\n{text}")
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def test_local_tasks_of_a_packed_model(local, capsys):
    packed = str(local / "packed")
    quantize = ["quantize", str(local / "model"), "--recipe", "rtn", "--format", "w4a4kv4"]
    assert cli.main([*quantize, "-o", packed]) == 0
    command = ["eval", packed, "--tasks", *TASKS, "--task-path", str(local), "--json"]
    capsys.readouterr()
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["texts"] == [] and set(found["tasks"]) == set(TASKS), err
    assert 0 <= found["tasks"]["local_pairs"]["acc"] <= 1
    assert "acc_norm" in found["tasks"]["local_pairs"]
    assert len((local / "packed/evaluation.jsonl").read_text().splitlines()) == 2
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == found and "task local_pairs: from" in err
    # The word perplexity of one document is this project's own.
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    (local / "items.jsonl").write_text(json.dumps({"query": "some words " * 30}) + "\n")
    manager = zero_shot.task_manager(["local_pages"], local)
    asked = zero_shot.asked_for(["local_pages"], manager)
    theirs = zero_shot.evaluate(model, tokenizer, asked, manager, 2, None, Lines(), {})
    ours = word_perplexity(model, tokenizer, "some words " * 30, window=256)
    assert theirs["local_pages"]["word_perplexity"] == pytest.approx(ours, rel=1e-4)


def test_the_tasks_of_benchmarks(local, capsys, monkeypatch):
    """Every file of benchmarks/tasks, on items as it wants them."""
    tasks = Path(__file__).resolve().parents[1] / "benchmarks/tasks"
    names = [f"{path.stem}_local" for path in tasks.glob("*.yaml")]
    items = {"query": "a query\n", "choices": ["no", "yes"], "gold": 1}
    items |= {"context": "a context", "continuation": "word"}
    (local / "zero_shot").mkdir()
    for name in ("piqa", "arc_easy", "arc_challenge", "openbook_qa", "lambada_openai"):
        (local / f"zero_shot/{name}.jsonl").write_text(json.dumps(items) + "\n")
    monkeypatch.chdir(local)
    command = ["eval", "model", "--tasks", *names, "--task-path", str(tasks), "--json"]
    capsys.readouterr()
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert len(found) == 5 and all(0 <= task["acc"] <= 1 for task in found.values())
