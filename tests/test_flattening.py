"""Flattened blocks: the same function, a smaller error, and what is packed is what was learned."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise
from live_bytes import LiveBytes
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import to_fake
from lowbit.executor import Executor
from lowbit.flattening import Flat, Flattening
from lowbit.formats import IntFormat, QuantFormat
from lowbit.models import adapter_for
from lowbit.recipes import overridden, recipe_named
from lowbit.recipes.flatquant import SPACES, TRANSFORMS
from lowbit.rounding import GPTAQ, GPTQ, HQQ, RTN, AutoRound, block, statistics_of
from lowbit.rounding.grid import fake_quantize, weight_grid
from lowbit.rounding.learned import FIRST_LOGIT, Clipping, clipped_through
from lowbit.streams import Stream
from lowbit.transforms import FoldNorms, LearnMap, Rotate, fit
from lowbit.transforms.maps import LearningMap

CALIBRATION = tiny_tokens(16, 32, seed=9)
W4A4KV4 = QuantFormat.parse("w4a4kv4")
QUICK = ("flattening.epochs=4", "flattening.batch=4", "flattening.learning_rate=0.02")
LONGER = ("flattening.epochs=24", "flattening.batch=4", "flattening.learning_rate=0.05")
# (hidden, intermediate, heads, kv heads)
SHAPES = {"grouped": (64, 96, 4, 2), "9 heads": (36, 60, 9, 3), "a prime MLP": (48, 67, 3, 3)}


def quantized(recipe="flatquant-rtn", format="w4a4kv4", *settings, seed=0, **options):
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    recipe = overridden(recipe, list(settings or (QUICK if recipe.flattening else ())))
    model = tiny_llama(**options)
    return lowbit.quantize(
        model, recipe, format, calibration=CALIBRATION, seed=seed, progress=False
    )


@pytest.fixture(scope="module")
def flatquant():
    return quantized()


@pytest.fixture(scope="module")
def longer():
    return quantized("flatquant-rtn", "w4a4kv4", *LONGER, num_layers=1)


def moved(learning: LearningMap, seed: int = 0) -> LearningMap:
    """Parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learning.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return learning


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", [*SPACES, "all"])
def test_maps_leave_fp64_logits_unchanged(space, shape):
    model = tiny_llama(*SHAPES[shape], bias=True, dtype=torch.float64)
    adapter = adapter_for(model.config)
    before = model(tiny_tokens()).logits
    for index, layer in enumerate(model.model.layers):
        for name in SPACES if space == "all" else (space,):
            start = LearnMap(name).fit(adapter.spaces[name])
            learned = moved(LearningMap(start, 100.0, torch.device("cpu")), index).learned()
            assert learned.condition > 1.2
            Flat((learned,)).put_into(layer, adapter)
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_a_map_begins_orthogonal_and_its_factors_are_even():
    adapter = adapter_for(tiny_llama(576, 1536, 9, 3, num_layers=1).config)
    shapes = {name: LearnMap(name).fit(adapter.spaces[name]).base.stages for name in SPACES}
    assert shapes == {
        "attention_input": ((24, 24), (24, 1)),
        "mlp_input": ((24, 24), (24, 1)),
        "mlp_hidden": ((32, 48), (48, 1)),
        "heads": ((9, 64),),
        "value": ((64, 1),),
    }
    for name in SPACES:
        start = LearnMap(name).fit(adapter.spaces[name])
        assert start.condition == pytest.approx(1, abs=1e-9)
        for matrix in start.learned:
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)).double())


def test_the_inverse_needs_no_solve():
    """What is learned with is what is fused, to fp32; and the condition stays in its bound."""
    start = LearnMap("mlp_hidden").fit(adapter_for(tiny_llama().config).spaces["mlp_hidden"])
    learning = moved(LearningMap(start, 4.0, torch.device("cpu")))
    learning.log_scale[0].data *= 100
    learning.project()
    learned = learning.learned()
    for got, expected in zip(learning.matrices(), (learned.learned, learned.inverse), strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)
    for a, b in zip(learned.learned, learned.inverse, strict=True):
        torch.testing.assert_close(a @ b.T, torch.eye(len(a)).double(), rtol=0, atol=1e-12)
        assert torch.linalg.cond(a) < 4.0001
    assert torch.linalg.cond(learned.learned[0]) > 3.99


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clip_in_the_loop_is_that_of_the_quantizer(symmetric):
    """Bits, and the derivative by the clip ratio c, of sum(r y): x clamped at an end of the range
    moves with it; others move with the steps, code - x / step of them, and step ~ c."""
    torch.manual_seed(0)
    format, x, r = IntFormat(4, symmetric), torch.randn(40, 64), torch.randn(40, 64)
    clip = torch.tensor(0.7, requires_grad=True)
    y = clipped_through(x.clone().requires_grad_(), format, clip)
    assert_bitwise(y.detach(), fake_quantize(x, format, clip.item()) + 0.0)  # no -0.0
    (y * r).sum().backward()
    if symmetric:
        step = x.abs().amax(-1, keepdim=True) * 0.7 / 7
        code = (x / step).round().clamp(-8, 7)
        inside = ((x / step).round() == code).float()
        expected = (r * (code - inside * x / step) * step / 0.7).sum()
        torch.testing.assert_close(clip.grad, expected, rtol=1e-4, atol=1e-4)
    assert clip.grad.abs() > 0.1


@pytest.mark.parametrize("format", ["w3a16g32", "w3a16g32-wasym", "w2a8g32-wtwolevel", "w4a4"])
def test_ranges_begin_at_those_of_least_weight_error(format):
    format = QuantFormat.parse(format).weight
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) ** 3
    weight[3] = 0
    clipping = Clipping(weight, format)
    whole = (clipping(weight).values - weight).square().sum()
    clipping.begin(weight)
    share, searched = clipping.high.sigmoid(), weight_grid(weight, format, "weight").step
    exact = searched / weight_grid(weight, format).step
    assert share.isfinite().all() and share.max() <= torch.tensor(FIRST_LOGIT).sigmoid()
    shrunk = exact < 0.98
    assert shrunk.sum() > 20
    torch.testing.assert_close(share[shrunk], exact[shrunk])
    assert (clipping(weight).values - weight).square().sum() < whole


@pytest.mark.parametrize("trimmed", [0.0, 0.01])
def test_the_error_in_the_report_is_that_of_the_packed_block(trimmed):
    """Maps, scales and every clip in the loop were those that run; no code path is shared."""
    clips = "flattening.clip_learning_rate=0.2"  # far from where they start
    changes = (*QUICK, clips, f"flattening.trimmed={trimmed}")
    model = quantized("flatquant-rtn", "w4a4kv4", *changes, num_layers=1, bias=True)
    float_model = tiny_llama(num_layers=1, bias=True)
    found = model.lowbit_config.report["blocks"]["0"]
    float_stream = Stream(float_model, adapter_for(float_model.config), CALIBRATION)
    (x,) = float_stream.hidden
    expected = float_stream.forward(float_model.model.layers[0], x)
    got = float_stream.forward(model.model.layers[0], x)
    squares = (got - expected).square().flatten(1).sort(1).values  # of a sample
    counted = squares[:, : squares.shape[1] - int(trimmed * squares.shape[1])]
    error = (counted.sum() / expected.square().sum()).item()
    assert error == pytest.approx(found["error"], rel=0.03)
    assert found["step"] is not None


def test_a_block_comes_much_nearer_than_at_the_start_and_than_quarots(longer):
    for found in longer.lowbit_config.report["blocks"].values():
        assert found["error"] < 0.7 * found["start_error"]
        assert max(found["conditions"].values()) < 1e4
    tokens, expected = tiny_tokens(), tiny_llama(num_layers=1)(tiny_tokens()).logits
    models = {"flat": longer, "quarot": quantized("quarot-rtn", num_layers=1)}
    errors = {name: (model(tokens).logits - expected).norm() for name, model in models.items()}
    assert errors["flat"] < 0.85 * errors["quarot"]


@pytest.mark.parametrize("recipe", ["flatquant", "flatquant-gptaq"])
def test_column_rounders_take_the_learned_grids(recipe, flatquant):
    model = quantized(recipe)
    scales = [m.model.layers[0].mlp.down_proj.scale for m in (model, flatquant)]
    codes = [m.model.layers[0].mlp.down_proj.codes for m in (model, flatquant)]
    assert_bitwise(*scales)
    assert not torch.equal(*codes)
    assert model.lowbit_config.report["rounding"]["0.mlp.down_proj"]["damp"] == 0.01


@pytest.mark.parametrize("recipe", ["flatquant-rtn", "flatquant"])
def test_a_rounder_that_clips_finds_grids_of_its_own_behind_the_same_maps(recipe, flatquant):
    model = quantized(recipe, "w4a4kv4", *QUICK, "rounding.clip=weight")
    kept, own = (m.model.layers[0].mlp.down_proj for m in (flatquant, model))
    for name in ("matrix_0", "matrix_1"):
        assert_bitwise(*(getattr(x.rotation, name) for x in (kept, own)))
    assert (own.scale != kept.scale).float().mean() > 0.9


@pytest.mark.parametrize("rounder", [RTN("weight"), GPTQ(static_groups=False, act_order=False)])
@pytest.mark.parametrize("format", [IntFormat(4), IntFormat(3, False, 32)], ids=str)
def test_a_given_grid_is_used_as_it_is(rounder, format):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(200, 64)
    ranges = Clipping(weight, format)
    ranges.high.data.fill_(0.8)
    grid = ranges(weight).grid
    packed, _ = rounder.round(weight, format, statistics_of([x]), grid)
    assert_bitwise(packed.scale, grid.scale)
    assert not torch.equal(grid.scale, weight_grid(weight, format).scale)


SIZES = [  # (hidden, intermediate, heads, kv heads): groups of 32, an odd number of heads
    {"hidden_size": 64, "num_kv_heads": 1},
    {"hidden_size": 96, "intermediate_size": 160, "num_heads": 3, "num_kv_heads": 1},
]
FORMATS = ["w4a8kv4g32", "w4a4kv4-aasym", "w3a16g32-wasym", "w4a4", "w4a8g32-wtwolevel"]


@pytest.mark.parametrize(
    "format, sizes", [(format, SIZES[i % 2]) for i, format in enumerate([*FORMATS, "w16a16kv4"])]
)
def test_packed_and_fake_give_the_same_bits(format, sizes, tmp_path):
    """And a checkpoint is the model, clips of single layers and maps included."""
    settings = ("flattening.epochs=1", "flattening.clip_learning_rate=0.5")
    model = quantized("flatquant", format, *settings, bias=True, **sizes)
    config = model.lowbit_config
    quantizes = (config.format.activation, config.format.kv)
    count = 2 * (7 * (quantizes[0] is not None) + (quantizes[1] is not None))
    assert len(config.clips) == (count if config.format.weight else 0)
    lowbit.save(model, tmp_path / "a")
    again = lowbit.load(tmp_path / "a")
    assert again.lowbit_config == config
    got = model(tiny_tokens()).logits
    assert_bitwise(again(tiny_tokens()).logits, got)
    assert_bitwise(to_fake(model)(tiny_tokens()).logits, got)


def test_clips_are_of_each_stage_and_block(flatquant):
    clips = flatquant.lowbit_config.clips
    at = [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert clips[f"{at[0]}.q_proj"] == clips[f"{at[0]}.v_proj"] != clips[f"{at[1]}.q_proj"]
    attention = flatquant.model.layers[1].self_attn
    assert attention.clip == clips[at[1]] != flatquant.lowbit_config.kv_clip
    assert attention.q_proj.activation_clip == clips[f"{at[1]}.q_proj"]
    assert len(set(clips.values())) == 2 * 5
    assert all(torch.tensor(clip).item() == clip for clip in clips.values())  # fp32 numbers


def edited(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    for name in [name for name, value in changes.items() if value is None]:
        del config["quantization_config"][name]
    file.write_text(json.dumps(config))
    return folder


def test_checkpoints_of_the_version_before_clips(tmp_path):
    model = quantized("quarot-rtn")
    lowbit.save(model, tmp_path / "a")
    old = lowbit.load(edited(tmp_path / "a", version=2, clips=None))
    assert_bitwise(old(tiny_tokens()).logits, model(tiny_tokens()).logits)


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "clips, message",
    [
        ({DOWN: 1.5}, r"clips must be numbers in \(0, 1\] by module, got .*1.5"),
        ({DOWN: 0.0}, r"clips must be numbers in \(0, 1\] by module, got .*0.0"),
        ({DOWN: "wide"}, r"clips must be numbers in \(0, 1\] by module, got .*'wide'"),
        ([0.9], r"clips must be numbers in \(0, 1\] by module, got \[0.9\]"),
        ({"model.layers.7.mlp": 0.9}, "clips must name modules .* got .*layers.7.mlp"),
        ({"model.layers.0.self_attn.q_proj": 0.8}, "of the attention that share an input must"),
    ],
)
def test_clips_of_a_checkpoint_that_cannot_be(tmp_path, clips, message):
    lowbit.save(quantized("quarot-rtn"), tmp_path / "a")
    with pytest.raises(InputError, match=message):
        lowbit.load(edited(tmp_path / "a", clips=clips))


def test_same_seed_same_bits(flatquant):
    same, other = quantized(), quantized(seed=1)
    first, second = (list(m.state_dict().values()) for m in (flatquant, same))
    assert_bitwise(second, first)
    assert same.lowbit_config == flatquant.lowbit_config
    assert other.lowbit_config.clips != flatquant.lowbit_config.clips


@pytest.mark.parametrize("at", [0, 3])
def test_a_loss_that_is_not_finite_ends_learning(at, monkeypatch, capsys):
    calls, descent = [], block.descent

    def broken(*args):
        lost, gradients = descent(*args)
        calls.append(lost)
        return (float("nan") if len(calls) > at else lost), gradients

    monkeypatch.setattr(block, "descent", broken)
    first, second = quantized().lowbit_config.report["blocks"].values()
    assert first["stopped"] == at and second["stopped"] == 0 and second["step"] is None
    assert first["error"] <= first["start_error"] and second["error"] == second["start_error"]
    warnings = capsys.readouterr().err
    assert f"warning: block 0: the loss was not finite in step {at}" in warnings
    assert "warning: block 1: learned maps and clips are no better" in warnings


def test_what_is_worse_than_the_start_is_not_kept(capsys):
    """At rates that close every range at once; the start is every map's and clip's."""
    rates = ("flattening.learning_rate=1e-9", "flattening.clip_learning_rate=300.0")
    model = quantized("flatquant-rtn", "w4a4kv4", "flattening.epochs=1", *rates)
    for found in model.lowbit_config.report["blocks"].values():
        assert found["step"] is None and found["error"] == found["start_error"]
        assert max(found["conditions"].values()) == pytest.approx(1)
    assert set(model.lowbit_config.clips.values()) == {torch.tensor(4.0).sigmoid().item()}
    assert "block 1: learned maps and clips are no better" in capsys.readouterr().err


def test_flatquant_has_the_settings_of_the_paper():
    assert recipe_named("flatquant").flattening == Flattening(15, 4, 5e-3, 5e-2)
    roundings = [recipe_named(f"flatquant{kind}").rounding for kind in ("", "-rtn", "-gptaq")]
    assert roundings == [GPTQ(clip="none"), RTN(), GPTAQ(clip="none")]
    assert {t.fit.alpha for t in recipe_named("flatquant").scales} == {0.3}
    assert not any(isinstance(t, FoldNorms) for t in TRANSFORMS)


def test_memory():
    """What lowbit/flattening.py says."""
    model = tiny_llama(512, 1024, num_layers=1)
    adapter = adapter_for(model.config)
    recipe = overridden(recipe_named("flatquant"), ["flattening.epochs=1"])
    executor = Executor(
        model, fit(recipe.transforms, adapter, 0), recipe, W4A4KV4, tiny_tokens(4), 0, print, str
    )
    layer = model.model.layers[0]
    linears = sum(4 * layer.get_submodule(name).weight.numel() for name in adapter.linears)
    with LiveBytes() as live:
        executor._flatten(layer, 0)
    assert 12 * linears < live.peak <= 15 * linears


ADAPTER = adapter_for(tiny_llama().config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Flattening(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Flattening(batch=0), "batch must be at least 1, got 0"),
        (lambda: Flattening(learning_rate=0.0), "learning_rate must be a positive float, got 0.0"),
        (lambda: Flattening(condition=0.5), "condition must be in 1..10000, got 0.5"),
        (lambda: fit((LearnMap("residual"),), ADAPTER, 0), "a map of residual cannot be learned"),
        (lambda: fit((LearnMap("query_key"),), ADAPTER, 0), "a map of query_key cannot be learned"),
        (
            lambda: fit((Rotate("heads"), LearnMap("heads")), ADAPTER, 0),
            "a map of heads would run online in front of self_attn.o_proj, where something else",
        ),
        (
            lambda: fit((LearnMap("heads"), LearnMap("value_channels")), ADAPTER, 0),
            "a map of value_channels would run online in front of self_attn.o_proj",
        ),
        (
            lambda: fit(
                (LearnMap("mlp_hidden"),),
                adapter_for(tiny_llama(intermediate_size=521).config),
                0,
            ),
            "mlp_hidden of 521 features has no two factors up to 512",
        ),
        (
            lambda: replace(recipe_named("flatquant"), flattening=None),
            "recipe flatquant has a LearnMap: flattening must be given",
        ),
        (lambda: Flattening(trimmed=0.5), "trimmed must be in 0..0.1, got 0.5"),
        (
            lambda: replace(recipe_named("flatquant"), rounding=HQQ()),
            "rounding must be RTN, GPTQ, GPTAQ or Qronos, got HQQ",
        ),
        (
            lambda: replace(recipe_named("flatquant"), rounding=AutoRound(10)),
            "rounding must be RTN, GPTQ, GPTAQ or Qronos, got AutoRound",
        ),
    ],
)
def test_options_that_do_not_exist(make, message):
    with pytest.raises(InputError, match=message):
        make()
