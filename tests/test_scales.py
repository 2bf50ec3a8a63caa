"""Scales: the function stays the same, and what they were fitted for gets better."""

import copy

import pytest
import torch
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.models import adapter_for
from lowbit.models.spaces import Space
from lowbit.recipes.quarot import ROTATIONS
from lowbit.streams import Stream
from lowbit.transforms import AWQ, OutlierSuppressionPlus, Scale, SmoothQuant, fit
from lowbit.transforms.channels import fuse_scale, reader_columns
from lowbit.transforms.scale import channels_of

SPACES = ("attention_input", "mlp_input", "value_channels", "mlp_hidden")
FITS = [SmoothQuant(0.7), AWQ(steps=8), OutlierSuppressionPlus(steps=8)]
SHAPES = {"heads alike": (64, 96, 4, 4), "grouped": (96, 128, 6, 2), "one KV head": (48, 80, 3, 1)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", [*SPACES, "query_key_channels"])
def test_a_scale_leaves_fp64_logits_unchanged(space, shape):
    model = tiny_llama(*SHAPES[shape], bias=True, dtype=torch.float64)
    space = adapter_for(model.config).spaces[space]
    before = model(tiny_tokens()).logits
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        scale = torch.rand(space.dim * space.inner, generator=generator, dtype=torch.float64) + 0.2
        fuse_scale(block, space, scale)
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


@pytest.mark.parametrize("space", SPACES)
def test_channels_are_what_the_readers_see(space):
    model = tiny_llama(96, 128, 6, 2)
    block, space = model.model.layers[0], adapter_for(model.config).spaces[space]
    stream = Stream(model, adapter_for(model.config), tiny_tokens(8, 32))
    x = torch.cat(list(stream.inputs(block, space.readers[0])))
    assert x.shape == (8 * 32, space.dim * space.repeat * space.inner)
    channels = channels_of(block, space, stream)
    for i in range(space.dim * space.inner):
        columns = reader_columns(torch.arange(space.dim * space.inner), space) == i
        assert columns.sum() == space.repeat
        assert channels.largest[i] == x[:, columns].abs().max()
        torch.testing.assert_close(channels.mean[i], x[:, columns].abs().mean())
        weights = [block.get_submodule(name).weight[:, columns] for name in space.readers]
        assert channels.weight[i] == max(w.abs().max() for w in weights)


def test_smoothquant_shares_the_range_evenly():
    """alpha 0.5: activations and weights of a channel end with the same largest magnitude."""
    model = tiny_llama()
    adapter = adapter_for(model.config)
    stream = Stream(model, adapter, tiny_tokens(8, 32))
    block, space = model.model.layers[0], adapter.spaces["mlp_input"]
    Scale("mlp_input", SmoothQuant(0.5)).fit_and_fuse(
        block, space, stream, QuantFormat.parse("w8a8"), 1.0
    )
    after = channels_of(block, space, stream)
    torch.testing.assert_close(after.largest, after.weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize("fit", FITS[1:], ids=str)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("format", ["w3a16g32-wasym", "w4a4"])
def test_a_search_is_no_worse_than_the_unscaled_model(space, fit, format):
    model, format = tiny_llama(96, 128, 6, 2), QuantFormat.parse(format)
    adapter = adapter_for(model.config)
    stream = Stream(model, adapter, tiny_tokens(8, 32))
    block = model.model.layers[0]
    before = copy.deepcopy(block)
    _, found = Scale(space, fit).fit_and_fuse(block, adapter.spaces[space], stream, format, 1.0)
    # the first candidate of both is a scale of 1 everywhere
    ones = type(fit)(steps=1, tokens=fit.tokens)
    trivial = list(ones.candidates(channels_of(before, adapter.spaces[space], stream)))
    assert torch.equal(trivial[0], torch.ones_like(trivial[0]))
    assert 0 <= found["candidate"] < 8 and found["error"] > 0
    changed = any(
        not torch.equal(a, b) for a, b in zip(block.parameters(), before.parameters(), strict=True)
    )
    assert changed == (found["candidate"] > 0)


def test_awq_lowers_the_error_of_outlier_channels():
    """The tiny models' two loud residual channels are what AWQ is for."""
    tokens, expected = tiny_tokens(), tiny_llama(seed=3)(tiny_tokens()).logits
    errors = {}
    for recipe in ("rtn", "awq"):
        model = lowbit.quantize(
            tiny_llama(seed=3),
            recipe,
            "w3a16g32-wasym",
            calibration=tiny_tokens(8, 32, seed=9),
            progress=False,
        )
        errors[recipe] = (model(tokens).logits - expected).norm().item()
    assert errors["awq"] < 0.9 * errors["rtn"]


def test_a_scale_behind_an_online_rotation_is_refused():
    adapter = adapter_for(tiny_llama().config)
    with pytest.raises(InputError, match="a scale of mlp_hidden cannot be fused behind the online"):
        fit((*ROTATIONS, Scale("mlp_hidden", AWQ())), adapter, 0)


def test_a_scale_without_readers_cannot_be_fitted():
    adapter = adapter_for(tiny_llama().config)
    with pytest.raises(InputError, match=r"query_key_channels is learned.* must be Ones, got AWQ"):
        fit((Scale("query_key_channels", AWQ()),), adapter, 0)


def test_features_that_turn_together_have_one_scale():
    space = Space(2, inner=6, turned=4)
    assert space.tied(torch.arange(12)).tolist() == [0, 1, 0, 1, 4, 5, 6, 7, 6, 7, 10, 11]


@pytest.mark.parametrize("recipe", ["smoothquant", "awq", "os+", "dartquant"])
def test_activations_that_are_not_finite_are_an_error(recipe):
    """Weights are finite, and so checked; their products with the activations are not."""
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(InputError, match="calibration activations must be finite, got NaN or inf"):
        lowbit.quantize(model, recipe, "w4a16g32", calibration=tiny_tokens(4, 24), progress=False)


def test_the_report_names_the_candidate_of_every_block():
    model = lowbit.quantize(
        tiny_llama(), "awq", "w4a16g32", calibration=tiny_tokens(8, 32), progress=False
    )
    report = model.lowbit_config.report
    assert set(report["scales"]) == {f"{i}.{space}" for i in (0, 1) for space in SPACES}
    assert "attention_input: scaled by AWQ(steps=20, tokens=8192)" in report["transforms"]
