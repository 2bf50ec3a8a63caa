"""Every architecture as a tiny random model of its own config class, through the whole pipeline."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from brief import brief
from helpers import assert_bitwise
from models import tiny_config, tiny_model, tiny_tokenizer, tiny_tokens
from transformers import (
    AutoConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

import lowbit
from lowbit.distribution import _activations
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import to_fake
from lowbit.formats import IntFormat, QuantFormat
from lowbit.models import ADAPTERS, adapter_for
from lowbit.models.minicpm import MiniCPMConfig
from lowbit.models.source import open_source
from lowbit.nn.static_cache import StaticQuantKVCache
from lowbit.recipes import recipe_named
from lowbit.recipes.quarot import ROTATIONS
from lowbit.streams import Stream
from lowbit.training import Training, _trainable
from lowbit.transforms import FoldNorms, LearnRotation, fit, rotate
from lowbit.transforms.channels import fuse_scale

CONFIGS = {
    "granite": tiny_config(
        GraniteConfig,
        embedding_multiplier=6.0,
        residual_multiplier=0.4,
        attention_multiplier=0.1,
        logits_scaling=3.0,
        attention_bias=True,
    ),
    "minicpm": tiny_config(
        MiniCPMConfig, scale_emb=12, scale_depth=1.4, dim_model_base=16, num_key_value_heads=4
    ),
    "mistral": tiny_config(MistralConfig, sliding_window=12, head_dim=32),
    "phi": tiny_config(
        PhiConfig,
        hidden_size=160,
        num_attention_heads=2,  # of 80 = 20 * 4, as in Phi-2
        num_key_value_heads=1,
        partial_rotary_factor=0.4,
        qk_layernorm=True,
    ),
    "phi3": tiny_config(Phi3Config, partial_rotary_factor=0.5, sliding_window=9),
    "qwen2": tiny_config(
        Qwen2Config,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,  # the first layer sees all
    ),
    "qwen3": tiny_config(Qwen3Config, head_dim=32),
    "smollm3": tiny_config(SmolLM3Config, no_rope_layers=[1, 0]),
}
INT8 = IntFormat(8, symmetric=False)
CALIBRATION = tiny_tokens(8, 32, seed=9)


GUIDE = Path(__file__).resolve().parents[1] / "docs/add_an_architecture.md"


@functools.cache
def followed_guide() -> dict:
    """The names that the guide's code leaves behind; its own check has passed."""
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)), names)
    return names


@pytest.fixture(params=[*CONFIGS, "guide"])
def config(request, monkeypatch):
    """Of each architecture here, and of the one that the guide adds."""
    if request.param != "guide":
        return CONFIGS[request.param]
    monkeypatch.setitem(ADAPTERS, "starcoder2", None)  # forgotten again after the test
    ADAPTERS["starcoder2"] = followed_guide()["starcoder2"]
    return tiny_config(Starcoder2Config)


def quantized(config, recipe, format="w4a4kv4"):
    return lowbit.quantize(tiny_model(config), brief(recipe), format, CALIBRATION, progress=False)


@pytest.mark.parametrize(
    "transforms",
    [ROTATIONS, (FoldNorms(), LearnRotation("residual", local=16), LearnRotation("mlp_hidden"))],
    ids=["quarot", "learned"],
)
@torch.no_grad()
def test_transforms_leave_fp64_logits_unchanged(config, transforms):
    model = tiny_model(config, torch.float64)
    before = model(tiny_tokens()).logits
    rotate(model, transforms, adapter_for(model.config), 0)
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


@torch.no_grad()
def test_scales_leave_fp64_logits_unchanged(config):
    """Of channels of norm outputs and values, and those between q and k, which RoPE turns."""
    model = tiny_model(config, torch.float64)
    adapter, generator = adapter_for(model.config), torch.Generator().manual_seed(0)
    before = model(tiny_tokens()).logits
    for block in model.get_submodule(adapter.block_path):
        for space in adapter.spaces.values():
            if space.scale_writers:
                size = space.dim * space.inner
                scale = torch.rand(size, generator=generator, dtype=torch.float64) + 0.2
                fuse_scale(block, space, scale)
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


# rotations, fused and online; scales of channels; maps; a block learned
@pytest.mark.parametrize("recipe", ["quarot", "awq", "flatquant-rtn", "autoround"])
@torch.no_grad()
def test_packed_and_fake_give_the_same_bits(config, recipe):
    packed = quantized(config, recipe)
    got = packed(tiny_tokens()).logits
    assert_bitwise(got, to_fake(packed)(tiny_tokens()).logits)


@pytest.mark.parametrize("recipe", ["quarot", "awq", "smoothquant", "flatquant-rtn"])
@torch.no_grad()
def test_eight_bits_keep_the_function(config, recipe):
    expected = tiny_model(config)(tiny_tokens()).logits
    got = quantized(config, recipe, "w8a8kv8")(tiny_tokens()).logits
    assert (got - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_calibration_activations_are_those_of_the_model(config):
    model, tokens = tiny_model(config), tiny_tokens()
    adapter, entering = adapter_for(model.config), []
    blocks = model.get_submodule(adapter.block_path)
    for block in blocks:
        block.register_forward_pre_hook(lambda _block, args: entering.append(args[0]))
    model(tokens, use_cache=False)
    expected, entering = list(entering), []
    stream = Stream(model, adapter, tokens)
    for block, hidden in zip(blocks, expected, strict=True):
        assert_bitwise(stream.hidden[0], hidden)
        stream.advance(block)


def test_learning_end_to_end_begins_at_the_model_itself(config):
    """All that SpinQuant learns is in the twin that learns it, and turns nothing but insides."""
    model, transforms = tiny_model(config), recipe_named("spinquant").transforms
    fitted = fit(transforms, adapter_for(model.config), 0)
    format, learned = QuantFormat.parse("w16a16"), list(fitted.learned.values())
    twin, _ = _trainable(model, fitted, learned, Training(), format, (1.0, 1.0))
    expected, got = model(tiny_tokens()).logits, twin(tiny_tokens()).logits
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_values_that_rotations_are_fitted_to_are_those_of_the_cache(config):
    model, transforms = tiny_model(config), recipe_named("dartquant").transforms
    fitted = fit(transforms, adapter_for(model.config), 0)
    learned, tokens = list(fitted.learned.values()), tiny_tokens(2, 8)
    found = _activations(model, fitted, learned, 10_000, tokens, 0)["value"]
    cache = model(tokens, use_cache=True).past_key_values
    for layer, values in zip(cache.layers, found, strict=True):
        expected = layer.values.flatten(0, 2)
        assert values.shape == expected.shape
        torch.testing.assert_close(values.sum(0), expected.sum(0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_ragged_batch_generates_what_its_rows_do_alone(config):
    model = quantized(config, "quarot")
    rows = [tiny_tokens(1, length, seed=length) for length in (5, 12, 9)]
    width = max(row.shape[1] for row in rows)
    batch = torch.cat([torch.nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)[:, width:]
    for row, new in zip(rows, together, strict=True):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(new, alone[0, row.shape[1] :])


@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(config, tmp_path):
    tiny_model(config).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    model = quantized(config, "quarot")
    stored, _ = open_source(str(tmp_path / "source"))
    again = lowbit.quantize(stored, brief("quarot"), "w4a4kv4", CALIBRATION, progress=False)
    lowbit.save(again, tmp_path / "packed")
    loaded = lowbit.load(tmp_path / "packed")
    assert_bitwise(loaded(tiny_tokens()).logits, model(tiny_tokens()).logits)


def test_an_architecture_without_an_adapter_is_named_with_the_file_to_add():
    where = r"lowbit/models/gpt2\.py, see docs/add_an_architecture\.md"
    for architectures, name in ((None, "GPT2Config"), (["GPT2LMHeadModel"], "GPT2LMHeadModel")):
        config = tiny_config(GPT2Config, architectures=architectures)
        with pytest.raises(InputError, match=rf"'gpt2' \({name}\): expected one of .*{where}"):
            lowbit.quantize(tiny_model(config), "rtn", "w4a16", progress=False)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
@torch.no_grad()
def test_a_sliding_window(name):
    """Of all layers or of one: in one forward, in pieces, in a cache of fixed size, beside pads."""
    packed, tokens = quantized(CONFIGS[name], "rtn", "w8a8kv8"), tiny_tokens(2, 30)
    whole = packed(tokens).logits
    pads = torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.cat((pads, torch.ones_like(tokens)), 1)
    padded = {"input_ids": torch.cat((pads, tokens), 1), "attention_mask": mask}
    for options in (
        {},
        {"past_key_values": StaticQuantKVCache(packed.config, INT8, max_length=30)},
    ):
        step = packed(tokens[:, :20], **options)
        again = packed(tokens[:, 20:29], past_key_values=step.past_key_values)
        last = packed(tokens[:, 29:], past_key_values=step.past_key_values)
        pieces = torch.cat([step.logits, again.logits, last.logits], 1)
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    got = packed(**padded, position_ids=positions).logits
    torch.testing.assert_close(got[:, 5:], whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="packed sequences"):
        packed(tokens, position_ids=torch.arange(30)[None] % 8, use_cache=False)
    # beside pads its mask is transformers' own
    fake = to_fake(packed)(**padded, position_ids=positions).logits
    torch.testing.assert_close(fake[:, 5:], got[:, 5:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_minicpm_is_a_llama_whose_factors_are_in_its_weights():
    config = CONFIGS["minicpm"]
    model = tiny_model(config, torch.float64)
    fields = ("vocab_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    same = {name: getattr(config, name) for name in fields}
    llama = tiny_model(tiny_config(LlamaConfig, **same), torch.float64)
    llama.load_state_dict(model.state_dict())
    llama.model.embed_tokens.weight.mul_(12)
    llama.lm_head.weight = torch.nn.Parameter(model.lm_head.weight / (64 / 16))
    for layer in llama.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(1.4 / 2**0.5)
    expected, got = llama(tiny_tokens()).logits, model(tiny_tokens()).logits
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()


def test_minicpm_from_the_fields_of_its_repository(tmp_path):
    """config.json names code of the repository, which is not run: the classes here serve."""
    fields = CONFIGS["minicpm"].to_dict()
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        del fields[name]
    names = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
    fields |= {"model_type": "minicpm", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MiniCPMConfig
    assert config.residual_multiplier == 1.4 / 2**0.5 and config.logits_scaling == 4
    assert config.attention_multiplier == 0.25 and config.embedding_multiplier == 12
    with pytest.raises(InputError, match="MiniCPM must be without experts, got num_experts=8"):
        adapter_for(MiniCPMConfig(num_experts=8))
