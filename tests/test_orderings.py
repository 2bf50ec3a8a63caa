"""Methods in the order of their papers, on real weights and text, by margins of half the measured.

Most on the first blocks of SmolLM2-135M, by what they make of the logits on text that was not
calibrated on; rotations that are learned end to end on all of it, by its perplexity.
"""

from functools import cache

import pytest
import torch

import lowbit
from lowbit.evaluate.perplexity import perplexity
from lowbit.evaluate.text import manual_text, tokenize
from lowbit.formats import QuantFormat
from lowbit.hadamard import hadamard_matrix
from lowbit.models.source import PACKAGED, load_source
from lowbit.quantize import sample_windows
from lowbit.recipes import Calibration, overridden, recipe_named
from lowbit.rounding.grid import on_grid, weight_grid

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("orderings")]
BLOCKS, LENGTH = 4, 256


@cache
def windows(split: str, samples: int) -> torch.Tensor:
    tokens = tokenize(load_source(PACKAGED)[1], manual_text(split))
    return sample_windows(tokens, Calibration(samples, LENGTH), 0)


def first_blocks():
    model, _ = load_source(PACKAGED, torch.float32)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(windows("evaluation", 8), use_cache=False).logits.double()


@cache
def full_precision() -> torch.Tensor:
    return logits(first_blocks())


@cache
def error(name: str, format: str, *settings: str) -> float:
    """Squared error of the logits, relative to their power."""
    recipe, calibration = overridden(recipe_named(name), list(settings)), windows("calibration", 32)
    model = lowbit.quantize(first_blocks(), recipe, format, calibration, progress=False)
    wanted = full_precision()
    return ((logits(model) - wanted).square().sum() / wanted.square().sum()).item()


def test_rotation_beats_none_by_far():
    assert error("quarot-rtn", "w4a4") < 0.5 * error("rtn", "w4a4")


@torch.no_grad()
def test_gains_of_norms_shield_weights_from_loud_channels():
    """Why rotations alone lose to plain rounding where only weights are quantized: the gain in
    front of gate and up makes the residual stream's loud channels quiet, and has to be folded."""
    model, _ = load_source(PACKAGED, torch.float32)
    seen = {}
    for block in model.model.layers:
        block.mlp.gate_proj.register_forward_pre_hook(
            lambda _module, args, block=block: seen.update({block: args[0].flatten(0, 1)})
        )
    model(windows("evaluation", 8)[:2], use_cache=False)
    found = []
    for block, x in seen.items():
        weight, gain = block.mlp.gate_proj.weight, block.post_attention_layernorm.weight
        rotation = hadamard_matrix(len(gain)).to(x) / len(gain) ** 0.5
        folded = weight * gain, x / gain
        ways = (weight, x), folded, tuple(part @ rotation for part in folded)
        found.append([output_error(*way) for way in ways])
    plain, folded, rotated = torch.tensor(found).mean(0).tolist()
    print(f"relative error of gate's output: {plain:.3f}, {folded:.3f}, {rotated:.3f}")
    assert plain < 0.75 * min(folded, rotated)


def output_error(weight, x) -> float:
    """Of x W^T, relative, weights to nearest at 3 bits in groups of 64."""
    format = QuantFormat.parse("w3a16g64").weight
    grid = weight_grid(weight, format, "weight")
    rounded = on_grid(weight, grid.step, grid.zero_point, format)
    return ((x @ (rounded - weight).T).square().sum() / (x @ weight.T).square().sum()).item()


@pytest.mark.parametrize("format", ["w3a16g64-wasym", "w2a16g64-wasym"])
def test_gptq_beats_rtn_and_its_siblings_beat_gptq(format):
    gptq = error("gptq", format)
    assert gptq < 0.6 * error("rtn", format)
    assert error("gptaq", format) < 0.92 * gptq
    assert error("qronos", format) < 0.85 * gptq


def test_qronos_beats_gptq_with_quantized_inputs():
    assert error("quarot-qronos", "w4a4kv4") < 0.95 * error("quarot", "w4a4kv4")


@pytest.mark.parametrize("format", ["w3a16g64-wasym", "w2a16g64-wasym"])
def test_learned_rounding_beats_rtn(format):
    rtn = error("rtn", format)
    assert error("autoround", format, "rounding.steps=20") < 0.6 * rtn
    assert error("omniquant", format, "rounding.epochs=3") < 0.95 * rtn


@pytest.mark.parametrize("rounding, share", [("-rtn", 0.8), ("", 0.95)])
def test_learned_maps_beat_rotations(rounding, share):
    """Sixteen steps a block, with higher rates: the published recipe takes 480, of more tokens."""
    few = ("epochs=1", "batch=2", "learning_rate=0.05", "clip_learning_rate=0.2")
    learned = error(f"flatquant{rounding}", "w4a4kv4", *(f"flattening.{field}" for field in few))
    assert learned < share * error(f"quarot{rounding}", "w4a4kv4")


@pytest.mark.parametrize("name", ["spinquant-rtn", "duarot-rtn"])
def test_learned_rotations_beat_drawn_ones(name):
    """Eight steps: the published recipe takes 100, of 32 times the tokens."""
    training = ("steps=8", "batch=2", f"length={LENGTH}", "weights=none")
    learned = perplexity_unclipped(name, *(f"training.{setting}" for setting in training))
    assert learned < 0.75 * perplexity_unclipped("quarot-rtn")


@cache
def perplexity_unclipped(name: str, *settings: str) -> float:
    """At w4a4kv4, weights rounded to the nearest of their whole ranges."""
    recipe = overridden(recipe_named(name), ["rounding.clip=none", *settings])
    model, tokenizer = load_source(PACKAGED, torch.float32)
    model = lowbit.quantize(model, recipe, "w4a4kv4", windows("calibration", 32), progress=False)
    tokens = tokenize(tokenizer, manual_text("evaluation"))
    return perplexity(model, tokens, 512, 4).perplexity
