"""The output head in 8 bits: `-head8` of a format."""

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_config, tiny_llama, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, PhiConfig

import lowbit
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import to_fake
from lowbit.evaluate.perplexity import perplexity
from lowbit.formats import IntFormat
from lowbit.interop.export import export
from lowbit.nn import set_decode
from lowbit.nn.linear import QuantLinear
from lowbit.ops import dequantize
from lowbit.rounding import RTN

FORMAT = "w4a4kv4-head8"


def quantized(format: str = FORMAT, recipe: str = "quarot-rtn", **sizes):
    return lowbit.quantize(tiny_llama(**sizes), recipe, format, progress=False)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(tiny_tokens(2, 12)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", ["rtn", "quarot-rtn"])
def test_head_is_rounded_and_nothing_else(recipe, tied):
    plain, model = quantized("w4a4kv4", recipe, tied=tied), quantized(recipe=recipe, tied=tied)
    weight = plain.lm_head.weight
    rounded, _ = RTN().round(weight, IntFormat(8))
    assert isinstance(model.lm_head, QuantLinear) and model.lm_head.weight_format == IntFormat(8)
    assert_bitwise(model.lm_head.packed_weight.codes, rounded.codes)
    assert_bitwise(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert not model.config.tie_word_embeddings
    hidden = plain.model(tiny_tokens(2, 12)).last_hidden_state
    assert_bitwise(model.model(tiny_tokens(2, 12)).last_hidden_state, hidden)
    torch.testing.assert_close(logits_of(model), hidden @ dequantize(rounded).T)


@pytest.mark.parametrize("format", [FORMAT, "w4a16g32-head4", "w16a16-head8"])
def test_packed_is_fake(format):
    model = quantized(format)
    packed = logits_of(model)
    assert_bitwise(logits_of(to_fake(model)), packed)


def test_save_and_load(tmp_path):
    model = quantized(tied=True)
    model.save_pretrained(tmp_path / "a")
    lowbit.save(model, tmp_path / "b")
    expected = logits_of(model)
    for loaded in (
        lowbit.load(tmp_path / "a"),
        lowbit.load(tmp_path / "b", fused=False),
        AutoModelForCausalLM.from_pretrained(tmp_path / "b"),
    ):
        assert str(loaded.lowbit_config.format) == FORMAT
        assert_bitwise(logits_of(loaded), expected)
        assert loaded.generate(tiny_tokens(1, 5), max_new_tokens=3).shape == (1, 8)
    tokens = tiny_tokens(1, 60)[0]
    assert perplexity(loaded, tokens, 20) == perplexity(model, tokens, 20)


def test_of_a_folder_and_with_a_bias(tmp_path):
    """Of a model read block by block; Phi's head has a bias."""
    source = tiny_model(tiny_config(PhiConfig, num_key_value_heads=4))
    source.save_pretrained(tmp_path)
    stored = lowbit.quantize(str(tmp_path), "rtn", "w8a8-head8", progress=False)
    whole = lowbit.quantize(source, "rtn", "w8a8-head8", progress=False)
    assert whole.lm_head.bias is not None
    assert_bitwise(logits_of(stored), logits_of(whole))


def test_export_says_what_it_cannot(tmp_path):
    with pytest.raises(InputError, match="output head is not quantized, got w4a16g32-head8"):
        export(quantized("w4a16g32-head8", "rtn"), tmp_path / "a", "gptq")
    assert not list(tmp_path.iterdir())


def test_rows_must_fill_bytes():
    with pytest.raises(InputError, match="w8a8-head2: lm_head: a row must fill whole bytes"):
        quantized("w8a8-head2", "rtn", hidden_size=62, num_heads=1, num_kv_heads=1)


def test_decode_is_of_linears_that_quantize_their_input():
    model = quantized()
    set_decode(model, "w4a16", 24)
    assert model.lm_head.decode_rows == 0 and model.model.layers[0].mlp.down_proj.decode_rows == 24
    packed = logits_of(model)
    assert_bitwise(logits_of(to_fake(model)), packed)
