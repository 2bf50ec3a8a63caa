"""Block rounders: what is learned is what is packed, its gradients are right, it never hurts."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise
from live_bytes import LiveBytes
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit.errors import InputError
from lowbit.formats import IntFormat
from lowbit.models import adapter_for
from lowbit.ops import dequantize
from lowbit.recipes import overridden
from lowbit.rounding import RTN, AutoRound, OmniQuant, block
from lowbit.rounding.block import BlockProblem, LearnedBlock, batches, descent
from lowbit.rounding.learned import simulate
from lowbit.rounding.rtn import packed_weight
from lowbit.streams import Stream
from lowbit.transforms import Ones, Scale

FORMATS = [
    IntFormat(4),
    IntFormat(2, False),
    IntFormat(3, True, 32),
    IntFormat(2, False, 32),
    IntFormat(6),
    IntFormat(4, True, 32, two_level=True),
]
TWO_BITS = IntFormat(2, False, 32)
LET_SPACES = ("attention_input", "mlp_input", "value_channels", "query_key_channels")
CALIBRATION = tiny_tokens(16, 32, seed=9)
ROUNDERS = [AutoRound(20), OmniQuant(epochs=3, batch=4), OmniQuant(3, 4, learn_scales=True)]
NAMES = ["autoround", "omniquant", "omniquant-let"]


def problem(format=TWO_BITS, **options) -> BlockProblem:
    """The first block of a tiny model, its linears' inputs in full precision."""
    model = tiny_llama(**options)
    adapter = adapter_for(model.config)
    stream = Stream(model, adapter, CALIBRATION)
    stream.hidden = list(stream.hidden[0].split(4))
    inputs, block = stream.hidden.copy(), model.model.layers[0]
    stream.advance(block)
    return BlockProblem(
        block,
        adapter.linears,
        format,
        stream.device,
        tuple(adapter.spaces[name] for name in LET_SPACES),
        lambda hidden, tensors: stream.forward(block, hidden, tensors),
        inputs,
        [stream.hidden],
    )


def rounded(rounder, format=TWO_BITS, seed=0, **options):
    """(problem, packed weights, report) of a tiny block."""
    task = problem(format, **options)
    generator = torch.Generator().manual_seed(seed)
    return task, *rounder.round_block(task, generator, lambda _: None)


def quantized(recipe: str, format: str, *settings: str):
    recipe = overridden(lowbit.RECIPES[recipe], list(settings))
    return lowbit.quantize(tiny_llama(), recipe, format, calibration=CALIBRATION, progress=False)


def parts(format: IntFormat) -> tuple:
    """(weight [24, 64], high, low or None, offset), away from where they start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator) * 0.05
    high, low = torch.rand(2, 24, format.num_groups(64), generator=generator) * 0.6 + 0.4
    offset = torch.rand(24, 64, generator=generator) - 0.5
    return weight, high, None if format.symmetric else low, offset


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_starts_as_rtn(format):
    weight, high, low, offset = parts(format)
    low = None if low is None else torch.ones_like(low)
    got = simulate(weight, format, torch.ones_like(high), low, torch.zeros_like(offset))
    packed, _ = RTN().round(weight, format)
    assert_bitwise(packed_weight(got.codes, got.grid, format), packed)
    assert_bitwise(got.values, dequantize(packed))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_simulated_values_are_the_packed_ones(format):
    weight, *learned = parts(format)
    got = simulate(weight, format, *learned)
    assert_bitwise(got.values, dequantize(packed_weight(got.codes, got.grid, format)))
    nearest, _ = RTN().round(weight, format)
    assert (got.values != dequantize(nearest)).float().mean() > 0.5


@pytest.mark.parametrize("format", FORMATS[:4], ids=str)
def test_gradients_pass_straight_through_rounding(format):
    """Against the derivatives of (code - zero_point) * scale, by hand: with b the range's bottom
    and code = clamp(w / scale + V + zero_point), zero_point = -b / scale,

        by V      scale, 0 where clamped
        by scale  code - zero_point - w / scale, and code - zero_point - b / scale where clamped
        by b      0, and 1 where clamped
    """
    weight, high, low, offset = parts(format)
    for leaf in (high, low, offset):
        if leaf is not None:
            leaf.requires_grad_()
    got = simulate(weight, format, high, low, offset)
    factor = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (got.values * factor).sum().backward()

    groups, factor = (
        t.detach().double().unflatten(1, (format.num_groups(64), -1)) for t in (weight, factor)
    )
    scale = got.grid.step.double().unsqueeze(-1)
    code = got.codes.double().view_as(groups)
    if format.symmetric:
        bottom, zero, by_high = 0.0, 0.0, groups.abs().amax(-1) / format.qmax
    else:
        bottom = (groups.amin(-1).clamp(max=0) * low.detach()).unsqueeze(-1)
        zero = got.grid.zero_point.double().unsqueeze(-1)
        by_high = groups.amax(-1).clamp(min=0) / format.qmax
    free = torch.round(groups / scale + offset.detach().view_as(groups)) + zero
    clamped = free.clamp(format.qmin, format.qmax) != free
    assert clamped.any() and not clamped.all()
    by_scale = factor * (code - zero - torch.where(clamped, bottom, groups) / scale)
    expected = {
        "offset": (factor * scale * ~clamped).flatten(1),
        "high": by_scale.sum(-1) * by_high,
    }
    if low is not None:
        by_bottom = (factor * clamped).sum(-1) - by_scale.sum(-1) / format.qmax
        expected["low"] = by_bottom * groups.amin(-1).clamp(max=0)
    for name, leaf in {"high": high, "low": low, "offset": offset}.items():
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_the_loss_has_the_gradient_of_its_differences():
    """By a value of each weight; and pieces add up to the whole batch."""
    task = problem()
    tensors = {}
    for name in task.linears:
        packed, _ = RTN().round(task.block.get_submodule(name).weight, task.format)
        tensors[f"{name}.weight"] = dequantize(packed)
    samples = torch.arange(6)  # a piece and a half
    loss, gradients = descent(task, tensors, samples, 10.0, autocast=False)
    assert loss == pytest.approx(task.all_errors(tensors)[:6].sum().item(), rel=1e-6)
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        place = divmod(gradient.abs().argmax().item(), tensor.shape[1])
        losses = []
        for side in (1, -1):
            moved = tensor.clone()
            moved[place] += side * 1e-2
            losses.append(task.all_errors({**tensors, name: moved})[:6].sum().item())
        slope = (losses[0] - losses[1]) / 2e-2 / 10.0
        assert gradient[place].item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("rounder", ROUNDERS, ids=NAMES)
def test_what_is_packed_was_simulated(rounder, format, monkeypatch):
    """The tensors of the last evaluation, learned scales included, and their error."""
    seen = []
    forward = LearnedBlock.forward
    monkeypatch.setattr(
        LearnedBlock, "forward", lambda self: seen.append(forward(self)) or seen[-1]
    )
    task, packed, report = rounded(rounder, format, num_heads=3, num_kv_heads=1, hidden_size=96)
    assert report["error"] <= report["rtn_error"]
    if report["step"] is None:
        assert format.bits > 3 and not isinstance(rounder, AutoRound)  # too few steps to win
        return
    fused = {name: tensor.detach() for name, tensor in task.block.named_parameters()}
    result = {f"{name}.weight": dequantize(weight) for name, weight in packed.items()}
    learned = {name: tensor.detach() for name, tensor in seen[-1][0].items()}
    for name, tensor in learned.items():
        assert_bitwise(result.get(name, fused[name]), tensor)
    scaled = rounder in ROUNDERS[2:]
    assert len(learned) == len(packed) + (2 if scaled else 0)  # the gains of two norms
    assert task.all_errors(result).sum() / task.power() == pytest.approx(report["error"], rel=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_learned_scales_leave_fp64_logits_unchanged(bias):
    model = tiny_llama(96, 128, 6, 2, bias=bias, dtype=torch.float64)
    adapter = adapter_for(model.config)
    before = model(tiny_tokens()).logits
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        spaces = tuple(adapter.spaces[name] for name in LET_SPACES)
        task = BlockProblem(layer, (), IntFormat(4), before.device, spaces, None, [before], [])
        learned = LearnedBlock(task, [], spaces)
        for scale in learned.scales:
            scale.data.uniform_(0.2, 3.0, generator=generator)
        tensors, _ = learned()
        learned.fuse()
        for name, tensor in tensors.items():
            assert_bitwise(layer.get_parameter(name).detach(), tensor.detach())
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_what_is_trimmed_is_the_largest_of_each_sample():
    task = problem()
    tensors = {name: p.detach() * 1.01 for name, p in task.block.named_parameters()}
    samples = torch.tensor([5, 1])
    output = task.run(task._pick(task.inputs, samples), tensors)
    squares = (output - task._pick(task.targets[0], samples)).square().flatten(1)
    left = squares.sort(1).values[:, : -int(0.01 * squares.shape[1])]
    assert left.shape[1] < squares.shape[1]
    torch.testing.assert_close(task.errors(tensors, samples), squares.sum(1))
    trimmed = replace(task, trimmed=0.01)
    torch.testing.assert_close(trimmed.errors(tensors, samples), left.sum(1))


def test_a_loud_element_is_not_learned_for_once_it_is_trimmed():
    """What no rounding mends is nearly all of the error: trimmed, the rest is learned for."""
    found = {}
    for trimmed in (0.0, 0.01):
        task = problem()
        for piece in task.targets[0]:
            piece[:, 0, :2] += 1e3
        seed = torch.Generator().manual_seed(0)
        rounder = AutoRound(60, 4, trimmed=trimmed)
        packed, _ = rounder.round_block(task, seed, lambda _: None)
        tensors = {f"{name}.weight": dequantize(t) for name, t in packed.items()}
        found[trimmed] = replace(task, trimmed=0.01).all_errors(tensors).sum().item()
    assert found[0.01] < 0.9 * found[0.0]


@pytest.mark.parametrize("rounder", ROUNDERS, ids=NAMES)
def test_same_seed_same_bits(rounder):
    first, second, other = (rounded(rounder, seed=seed)[1] for seed in (0, 0, 1))
    assert_bitwise(list(first.values()), list(second.values()))
    assert not all(torch.equal(first[n].codes, other[n].codes) for n in first)


BETTER = {  # recipe and settings -> share of RTN's error in logits that may be left
    ("autoround", "rounding.steps=100"): 0.75,
    ("autoround-1k-full", "rounding.steps=100"): 0.8,
    ("omniquant", "rounding.epochs=10", "rounding.learning_rate=0.1", "rounding.batch=4"): 0.9,
}


@pytest.mark.parametrize("recipe", BETTER, ids=lambda recipe: recipe[0])
def test_two_bits_come_nearer_than_rounded_to_nearest(recipe):
    tokens, expected = tiny_tokens(), tiny_llama()(tiny_tokens()).logits
    errors = [
        (quantized(name, "w2a16g32-wasym", *settings)(tokens).logits - expected).norm().item()
        for name, *settings in (recipe, ("rtn",))
    ]
    assert errors[0] < BETTER[recipe] * errors[1]


def test_quantized_inputs_are_learned_with():
    """The gradient passes the quantizers of activations, and scales move range out of them."""
    for recipe in ("autoround", "omniquant-let"):
        settings = ["rounding.steps=60"] if recipe == "autoround" else ["rounding.epochs=8"]
        report = quantized(recipe, "w4a4", *settings).lowbit_config.report
        assert report["blocks"].keys() == {"0", "1"}
        for found in report["blocks"].values():
            assert found["error"] < 0.985 * found["rtn_error"]


def test_a_scale_between_q_and_k_is_learned_for_quantized_k():
    """Of one loud channel of K: 4 bits leave the others little of a token's range."""
    errors = {}
    for spaces in (("value_channels",), ("value_channels", "query_key_channels")):
        model, recipe = tiny_llama(), lowbit.RECIPES["omniquant-let"]
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3] *= 12
            layer.self_attn.q_proj.weight[[3, 19]] /= 12  # of both heads that meet it
        recipe = replace(recipe, transforms=tuple(Scale(space, Ones()) for space in spaces))
        recipe = overridden(recipe, ["rounding.epochs=8", "rounding.scale_learning_rate=0.1"])
        lowbit.quantize(model, recipe, "w8a16kv4", CALIBRATION, progress=False)
        errors[spaces] = model.lowbit_config.report["blocks"]["0"]["error"]
    alone, both = errors.values()
    assert both < 0.5 * alone


@pytest.mark.parametrize("num_heads", [4, 3])
def test_gradients_pass_online_rotations(num_heads):
    """QuaRot's, Hadamard and Hartley, in front of quantizers."""
    recipe = replace(lowbit.RECIPES["quarot"], rounding=AutoRound(40))
    model = tiny_llama(16 * num_heads, num_heads=num_heads, num_kv_heads=1)
    lowbit.quantize(model, recipe, "w4a4", calibration=CALIBRATION, progress=False)
    for found in model.lowbit_config.report["blocks"].values():
        assert found["error"] < 0.8 * found["rtn_error"]


def test_inputs_in_full_precision_are_those_of_the_first_block():
    """There the two streams are one; after it they part."""
    models = [
        quantized(f"autoround-1k{kind}", "w2a16g32", "rounding.steps=5") for kind in ("", "-full")
    ]
    for index, same in ((0, True), (1, False)):
        codes = [m.model.layers[index].mlp.up_proj.codes for m in models]
        assert torch.equal(*codes) == same


def test_augmented_targets_are_of_the_rounded_inputs(monkeypatch):
    seen = []
    learned = OmniQuant.learned
    monkeypatch.setattr(
        OmniQuant, "learned", lambda self, task: seen.append(task) or learned(self, task)
    )
    quantized("omniquant", "w2a16g32", "rounding.augmented=true", "rounding.epochs=1")
    assert [len(task.targets) for task in seen] == [2, 2]
    assert_bitwise(*seen[0].targets)
    assert not torch.equal(seen[1].targets[0][0], seen[1].targets[1][0])


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("recipe", ["autoround", "omniquant"])
def test_a_loss_that_is_not_finite_ends_learning(recipe, at, monkeypatch, capsys):
    calls = []

    def broken(*args):
        lost, gradients = descent(*args)
        calls.append(lost)
        return (float("nan") if len(calls) > at else lost), gradients

    monkeypatch.setattr(block, "descent", broken)
    model = quantized(recipe, "w2a16g32-wasym")
    assert len(calls) == at + 2  # the second block stops at once
    first, second = model.lowbit_config.report["blocks"].values()
    assert first["stopped"] == at and second["stopped"] == 0 and second["step"] is None
    assert first["error"] <= first["rtn_error"] and second["error"] == second["rtn_error"]
    warnings = capsys.readouterr().err
    assert f"warning: block 0: the loss was not finite in step {at}" in warnings
    assert (
        "warning: block 1: nothing that was learned is better than rounding to nearest" in warnings
    )


def test_what_is_worse_than_rtn_is_not_kept(capsys):
    """At a rate that closes every range at once."""
    model = quantized("omniquant", "w4a16g32", "rounding.learning_rate=50", "rounding.epochs=1")
    nearest = quantized("rtn", "w4a16g32").state_dict()
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, nearest[name])
    assert "block 1: nothing that was learned is better" in capsys.readouterr().err


@pytest.mark.parametrize("rounder", ROUNDERS[:2], ids=NAMES[:2])
def test_the_step_that_is_kept(rounder, monkeypatch):
    """Of AutoRound the least loss for what RTN loses on the same samples; of OmniQuant the last."""
    steps = []

    def spied(task, tensors, samples, unit, autocast):
        lost, gradients = descent(task, tensors, samples, unit, autocast)
        steps.append((lost, samples, tensors["mlp.up_proj.weight"].detach().clone()))
        return lost, gradients

    monkeypatch.setattr(block, "descent", spied)
    task, packed, report = rounded(rounder)
    kept = report["step"]
    assert_bitwise(dequantize(packed["mlp.up_proj"]), steps[kept][2])
    assert all(not torch.equal(steps[kept][2], steps[i][2]) for i in range(kept))
    rtn = {
        f"{name}.weight": dequantize(RTN().round(weight, TWO_BITS)[0])
        for name, weight in ((n, problem().block.get_submodule(n).weight) for n in task.linears)
    }
    errors = task.all_errors(rtn)
    losses = [lost / errors[samples].sum().item() for lost, samples, _ in steps]
    assert kept == (losses.index(min(losses)) if rounder.keeps_best else len(steps) - 1)


def test_batches_hold_every_sample_once():
    got = list(batches(10, 3, 7, torch.Generator().manual_seed(0)))
    assert len(got) == 7 and all(len(batch) == 3 for batch in got)
    for epoch in (got[:3], got[3:6]):
        assert torch.cat(epoch).unique().numel() == 9
    assert not torch.equal(torch.cat(got[:3]), torch.cat(got[3:6]))
    assert [len(b) for b in batches(3, 8, 2, torch.Generator())] == [3, 3]


def test_signed_steps_decay_to_nothing():
    """A gradient of one sign moves V from 0 to the end of its range over all steps."""
    task = problem()
    rounder = AutoRound(steps=50)
    learned = rounder.learned(task)
    optimizer, schedule = rounder.optimizer(learned)
    for _ in range(50):
        for parameter in learned.parameters():
            parameter.grad = torch.full_like(parameter, 1e-20)
        optimizer.step()
        schedule.step()
    for quantizer in learned.quantizers:
        torch.testing.assert_close(quantizer.offset, torch.full_like(quantizer.offset, -0.51))
        torch.testing.assert_close(quantizer.low, torch.full_like(quantizer.low, 0.49))
    assert optimizer.param_groups[0]["lr"] < 1e-9


def test_memory():
    """What lowbit/rounding/block.py says: copies of the block's linear weights, and a piece."""
    task = problem(hidden_size=256, intermediate_size=512)
    linears = sum(4 * task.block.get_submodule(name).weight.numel() for name in task.linears)
    with LiveBytes() as live:
        AutoRound(4).round_block(task, torch.Generator(), lambda _: None)
    piece = 4 * task.inputs[0].numel()
    assert 8 * linears < live.peak <= 9 * linears + 30 * piece


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AutoRound(steps=0), "steps must be at least 1, got 0"),
        (lambda: AutoRound(batch=0), "batch must be at least 1, got 0"),
        (lambda: AutoRound(learning_rate=-0.1), "learning_rate must be a positive float, got -0.1"),
        (lambda: AutoRound(minmax_learning_rate="x"), "minmax_learning_rate must be .* got 'x'"),
        (lambda: AutoRound(trimmed=0.2), "trimmed must be in 0..0.1, got 0.2"),
        (lambda: OmniQuant(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: OmniQuant(scale_learning_rate=0.0), "scale_learning_rate must be .* got 0.0"),
        (
            lambda: quantized("omniquant", "w4a16", "rounding.learn_scales=true"),
            "learn_scales needs a recipe that scales, got one without Scale",
        ),
    ],
)
def test_options_that_do_not_exist(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_nan_in_calibration_activations():
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.fill_(3e38)
    with pytest.raises(InputError, match="calibration activations must be finite"):
        lowbit.quantize(model, "autoround", "w4a16", calibration=CALIBRATION, progress=False)
