"""The whole path on a real model, SmolLM2-135M, and real text. Minutes: the slow tier."""

import pytest
import torch
from helpers import assert_bitwise
from models import exact_norms

import lowbit
from lowbit.evaluate.fake_quant import to_fake
from lowbit.evaluate.perplexity import perplexity
from lowbit.evaluate.size import size_of
from lowbit.evaluate.text import manual_text, tokenize
from lowbit.models import adapter_for
from lowbit.models.source import PACKAGED, load_source
from lowbit.quantize import sample_windows
from lowbit.recipes import Calibration
from lowbit.recipes.quarot import ROTATIONS
from lowbit.transforms import rotate

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model")]  # one checkpoint for all
WINDOW = 512


@pytest.fixture(scope="module")
def tokenizer():
    return load_source(PACKAGED)[1]


@pytest.fixture(scope="module")
def text_tokens(tokenizer):
    return tokenize(tokenizer, manual_text("evaluation"))


def quantized(recipe: str, tokenizer, format: str = "w4a4kv4"):
    tokens = tokenize(tokenizer, manual_text("calibration"))
    windows = sample_windows(tokens, Calibration(samples=8, length=WINDOW), seed=0)
    model, _ = load_source(PACKAGED, torch.float32)
    return lowbit.quantize(model, recipe, format, calibration=windows, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """(folder, state dict as it was saved) of QuaRot with GPTQ weights at w4a4kv4."""
    folder = tmp_path_factory.mktemp("real") / "w4a4kv4"
    model = quantized("quarot", tokenizer)
    lowbit.save(model, folder, tokenizer)
    return folder, model.state_dict()


@torch.no_grad()
def test_rotations_leave_fp64_logits_unchanged(text_tokens):
    model = exact_norms(load_source(PACKAGED, torch.float64)[0])
    tokens = text_tokens[None, :64]
    before = model(tokens).logits
    rotate(model, ROTATIONS, adapter_for(model.config), seed=0)
    after = model(tokens).logits
    assert ((after - before).abs().max() / before.abs().max()).item() < 1e-9


def test_saved_and_loaded_bit_for_bit(checkpoint):
    folder, saved = checkpoint
    loaded = lowbit.load(folder).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_linear_weights_take_at_most_0_27_of_bf16(checkpoint):
    size = size_of(lowbit.load(checkpoint[0]))
    assert 0.25 < size.linears / size.linears_bf16 <= 0.27


def test_packed_and_fake_give_the_same_bits(checkpoint, text_tokens):
    model = lowbit.load(checkpoint[0])
    packed = perplexity(model, text_tokens, WINDOW, 2)
    with torch.no_grad():
        logits = model(text_tokens[None, :300]).logits
        fake = to_fake(model)
        assert_bitwise(logits, fake(text_tokens[None, :300]).logits)
    assert perplexity(fake, text_tokens, WINDOW, 2).window_nll == packed.window_nll


def test_quarot_is_usable_where_rtn_is_not(checkpoint, tokenizer, text_tokens):
    full = perplexity(load_source(PACKAGED, torch.float32)[0], text_tokens, WINDOW, 2)
    quarot = perplexity(lowbit.load(checkpoint[0]), text_tokens, WINDOW, 2)
    rtn = perplexity(quantized("rtn", tokenizer), text_tokens, WINDOW, 2)
    assert full.perplexity < quarot.perplexity < 4 * full.perplexity
    assert rtn.perplexity > 20 * full.perplexity


@torch.no_grad()
def test_a_padded_batch_generates_what_its_rows_do_alone(checkpoint, tokenizer):
    model = lowbit.load(checkpoint[0])
    prompts = ["The history of the city begins", "A list is", "In 1969 the first astronauts to"]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
    for row, prompt in zip(together, prompts, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**alone, **options)[0, alone.input_ids.shape[1] :]
        assert torch.equal(row[: len(out)], out)
