"""What is learned online follows from what it costs: measured, kept, measured again, or given."""

import json
import math

import pytest
import torch
from brief import brief
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit.errors import InputError
from lowbit.models import adapter_for
from lowbit.recipes import overridden, recipe_named
from lowbit.transforms import LearnedRotation, LearnRotation, fit
from lowbit.transforms.cost import FACTOR, ROWS, Costs, candidates, costs_on, microseconds
from lowbit.transforms.online import OnlineTransform

DIM = 1536  # 12 x 128
FAST = OnlineTransform("hadamard", DIM)


class Timer:
    """A GPU whose fast transform takes 100 us, and an element of a matrix `slow`, at many rows."""

    def __init__(self, slow: float):
        self.slow, self.calls = slow, 0

    def __call__(self, transform: OnlineTransform, rows: int) -> float:
        self.calls += 1
        if transform.kind != "learned" or rows < max(ROWS):
            return 100.0
        return self.slow * sum(order for order, _ in transform.stages)


def costs(slow: float, folder, machine="a GPU", timer=None) -> Costs:
    return Costs(timer or Timer(slow), machine, folder / "cache" / "costs.json")


def mlp_rotation(given: Costs | None, **options):
    transforms = (LearnRotation("mlp_hidden", **options),)
    return fit(transforms, adapter_for(tiny_llama(64, DIM).config), 0, given).rotations[0]


@pytest.mark.parametrize("dim", [16, 96, DIM, 14336])
def test_candidates_have_that_order_and_most_first(dim):
    found = candidates(dim)
    orders = [[order for order, _ in t.stages] for t in found]
    assert all(math.prod(o) == dim and 1 not in o and max(o) <= 4096 for o in orders)
    learned = [sum(order**2 for order in o) for o in orders]
    assert learned == sorted(learned, reverse=True)
    assert ([dim] in orders) == (dim <= 4096)


@pytest.mark.parametrize(
    "slow, kind",
    [
        (FACTOR * 100 / DIM, "learned rotation of order 1536"),
        (FACTOR * 100 / 770, "learned rotation of order (768 (x) 2)"),
        (FACTOR * 100 / 140, "learned rotation of order (12 (x) 128)"),
        (FACTOR * 100 / 80, "learned rotation of order (48 (x) 32)"),
        (FACTOR * 100 / 79, "hadamard of order 1536"),
    ],
)
def test_the_most_that_costs_nothing_is_learned(slow, kind, tmp_path):
    rotation = mlp_rotation(costs(slow * (1 - 1e-6), tmp_path))
    assert str(rotation) == f"mlp_hidden: {kind}"
    assert isinstance(rotation, LearnedRotation) == ("learned" in kind)


def test_without_cuda_the_published_constant():
    assert costs_on(torch.device("cpu")) is None
    assert mlp_rotation(None).base.left == 12
    assert mlp_rotation(None, largest_online=100).base.left == 24


def test_a_limit_that_is_set_is_not_measured(tmp_path):
    given = costs(1e-9, tmp_path)
    assert mlp_rotation(given, largest_online=2048).base.left == 1
    assert mlp_rotation(given, largest_online=64).base.left == 24
    assert given.timer.calls == 0
    recipe = overridden(recipe_named("duarot"), ["transforms.3.largest_online=64"])
    assert recipe.transforms[3] == LearnRotation("mlp_hidden", largest_online=64)
    for bad in (0, 2.5, True):
        with pytest.raises(InputError, match="largest_online must be at least 1, or None, got"):
            LearnRotation("mlp_hidden", largest_online=bad)


def test_times_are_kept(tmp_path):
    first = costs(FACTOR * 100 / 140 - 1e-6, tmp_path)
    chosen = first.best_learned(DIM, FAST)
    assert first.timer.calls > len(ROWS)
    again = costs(0.0, tmp_path, timer=lambda *_: pytest.fail("measured again"))
    assert again.best_learned(DIM, FAST) == chosen
    assert not list((tmp_path / "cache").glob(".*"))
    other = costs(1e-6, tmp_path, "another GPU")
    assert other.best_learned(DIM, FAST).left == 1
    assert again.best_learned(DIM, FAST) == chosen  # both are there


@pytest.mark.parametrize(
    "damaged", ["", "nonsense", "[1]", '{"a GPU": 3}', '{"a GPU": {NAME: [1.0]}}', "a folder"]
)
def test_a_damaged_file_is_measured_again(damaged, tmp_path):
    given = costs(FACTOR * 100 / 140 - 1e-6, tmp_path)
    given.file.parent.mkdir()
    if damaged == "a folder":  # nor can it be written
        given.file.mkdir()
    else:
        given.file.write_text(damaged.replace("NAME", json.dumps(str(FAST.to_dict()))))
    assert given.best_learned(DIM, FAST).left == 12
    if damaged != "a folder":
        kept = json.loads(given.file.read_text())["a GPU"]
        assert kept[str(FAST.to_dict())] == [100.0] * len(ROWS)


def test_quantize_takes_what_was_measured(tmp_path, monkeypatch):
    given = costs(FACTOR * 100 / 96, tmp_path)
    monkeypatch.setitem(lowbit.quantize.__globals__, "costs_on", lambda device: given)
    model = lowbit.quantize(
        tiny_llama(64, 128),
        overridden(brief("duarot-rtn"), ["training.length=24"]),
        "w4a4kv4",
        tiny_tokens(4, 24),
        progress=False,
    )
    transforms = model.lowbit_config.report["transforms"]
    assert "mlp_hidden: learned rotation of order (64 (x) 2)" in transforms
    assert "query_key: learned rotation of order 16" in transforms


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda")
    assert 0 < microseconds(FAST, 64, device) < 1e5
    given = costs_on(device)
    chosen = given.best_learned(DIM, FAST)
    assert (tmp_path / "lowbit" / "rotation_costs.json").is_file()
    given.timer = lambda *_: pytest.fail("measured again")
    assert given.best_learned(DIM, FAST) == chosen
