"""Fused decoder layers: the bits of the layers as they were, in nine ops."""

import copy

import pytest
import torch
from helpers import assert_bitwise, assert_same_logits
from models import tiny_config, tiny_llama, tiny_model, tiny_tokens
from packed import DECODING, launches_of, pack_model, packed_llama
from transformers import MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

import lowbit
from lowbit.evaluate.fake_quant import to_fake
from lowbit.nn import fuse, unfuse
from lowbit.nn.fused import FusedBlock, MergedLinear
from lowbit.nn.swap import set_backend

FORMATS = ["w4a4kv4", "w4a8kv4", "w8a8", "w8a8kv8", "w4a8kv4g32-wtwolevel-aasym", "w4a4g32"]
FAMILIES = {"mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@torch.no_grad()
def logits_of(model, tokens=None) -> torch.Tensor:
    """Of a prompt of two, and of a token after it."""
    tokens = tiny_tokens(2, 11) if tokens is None else tokens
    prompt = model(tokens[:, :-1], use_cache=True)
    last = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
    return torch.cat((prompt.logits, last.logits), 1)


def assert_same(model):
    expected = logits_of(model)
    assert fuse(model) is model
    assert all(isinstance(block, FusedBlock) for block in model.model.layers)
    assert_bitwise(logits_of(model), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_bits_in_fp32(format, bias):
    model = packed_llama(format, bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:  # no gain that is folded away here
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    assert_same(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    fields = {"qwen3": {"head_dim": 16}, "mistral": {"sliding_window": None}}.get(family, {})
    assert_same(pack_model(tiny_model(tiny_config(FAMILIES[family], **fields)), "w4a4kv4", None))


def test_what_is_one_linear_already():
    """Phi-3's qkv_proj and gate_up_proj."""
    config = tiny_config(Phi3Config, original_max_position_embeddings=256)
    model = lowbit.quantize(tiny_model(config), "quarot-rtn", "w4a4kv4", progress=False)
    assert_same(model)
    assert not any(isinstance(m, MergedLinear) for m in model.modules())


@pytest.mark.parametrize("recipe", ["flatquant-rtn", "duarot-rtn"])
def test_rotations_in_front_of_every_linear(recipe):
    """A map before q, k and v, and one of two stages before down_proj: the norm runs by itself."""
    short = {"flatquant-rtn": "flattening.epochs=1", "duarot-rtn": "training.steps=1"}
    method = lowbit.recipes.overridden(lowbit.RECIPES[recipe], [short[recipe]])
    calibration = tiny_tokens(8, 32)
    model = lowbit.quantize(tiny_llama(), method, "w4a4kv4", calibration, progress=False)
    assert_same(model)


@torch.no_grad()
def test_ragged_batches():
    """Tokens have the same bits, wherever pads are; pads are nothing's business."""
    plain = packed_llama()
    fused, tokens = fuse(copy.deepcopy(plain)), tiny_tokens(3, 9)
    for mask in (torch.ones(3, 9), torch.ones(3, 9).tril(6), torch.ones(3, 9).tril(6).flip(1)):
        outputs = [model(tokens, attention_mask=mask).logits for model in (plain, fused)]
        assert_bitwise(*(logits[mask.bool()] for logits in outputs))
    prompt = {"attention_mask": torch.ones(3, 9).tril(6).flip(1), "max_new_tokens": 12}
    assert_bitwise(fused.generate(tokens, **prompt), plain.generate(tokens, **prompt))


def test_16_bits():
    """One narrowing less for each norm and linear: nearer to fp32, and as near as that."""
    exact = logits_of(packed_llama())
    model = packed_llama().bfloat16()
    plain, fused = logits_of(model).float(), logits_of(fuse(model)).float()
    assert (fused - exact).norm() < 1.5 * (plain - exact).norm() < 0.5 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("batch, pads", [(1, 0), (3, 0), (3, 2)])
def test_nine_launches_a_layer(batch, pads):
    """Of a layer that decodes, but the first, which finds where the tokens go."""
    model = fuse(packed_llama(num_layers=3))
    tokens = tiny_tokens(batch, 9)
    mask = torch.ones(batch, 9, dtype=torch.int64)
    mask[0, :pads] = 0
    given = {"attention_mask": mask} if pads else {}
    prompt = {name: mask[:, :-1] for name, mask in given.items()}
    cache = model(tokens[:, :-1], use_cache=True, **prompt).past_key_values
    seen = [launches_of(block) for block in model.model.layers[1:]]
    model(tokens[:, -1:], past_key_values=cache, **given)
    for mode in seen:
        assert tuple(mode.names) == DECODING


@pytest.mark.parametrize("format", ["w4a4kv4", "w4a8kv4g32-wtwolevel"])
def test_what_is_saved_does_not_know(format, tmp_path):
    model = packed_llama(format, bias=True)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse(model)
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_bitwise(found[name], tensor)
    lowbit.save(model, tmp_path / "fused")
    lowbit.save(unfuse(model), tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_load_fuses_unless_told_not_to(tmp_path):
    lowbit.save(packed_llama(), tmp_path / "m")
    fused, plain = lowbit.load(tmp_path / "m"), lowbit.load(tmp_path / "m", fused=False)
    assert hasattr(plain.model.layers[0].self_attn, "q_proj")
    assert isinstance(fused.model.layers[0].self_attn.qkv_proj, MergedLinear)
    assert_bitwise(logits_of(fused), logits_of(plain))


def test_unfused_again():
    model = packed_llama(bias=True)
    before, kinds = logits_of(model), [type(m) for m in model.modules()]
    unfuse(fuse(fuse(model)))
    assert [type(m) for m in model.modules()] == kinds
    assert_bitwise(logits_of(model), before)


def test_simulated_after_it_was_fused():
    fake = to_fake(packed_llama())
    assert_bitwise(logits_of(to_fake(fuse(packed_llama()))), logits_of(fake))


@pytest.mark.parametrize("format", ["w4a16g32", "w16a16kv4"])
def test_stays_as_it_is(format):
    """Where inputs are not quantized there is nothing to fuse with."""
    model = packed_llama(format)
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in fuse(model).modules()] == kinds


def test_backends_reach_what_is_merged():
    model = fuse(packed_llama())
    set_backend(model, "reference")
    assert model.model.layers[0].mlp.gate_up_proj.backend == "reference"
    set_backend(unfuse(model), None)
    assert model.model.layers[0].mlp.up_proj.backend is None


def test_a_state_dict_is_not_loaded_into_what_is_merged():
    model = packed_llama()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="before the model is fused"):
        fuse(model).load_state_dict(state)


def test_hidden_states_are_recorded():
    """transformers finds decoder layers by their class."""
    model, tokens = packed_llama(), tiny_tokens(1, 5)
    expected = model(tokens, output_hidden_states=True).hidden_states
    assert_bitwise(fuse(model)(tokens, output_hidden_states=True).hidden_states, expected)


@torch.no_grad()
@pytest.mark.interpret
def test_on_triton():
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_heads": 2, "num_kv_heads": 1}
    model, tokens = fuse(packed_llama(**sizes)), tiny_tokens(2, 9)
    set_backend(model, "reference")
    expected = logits_of(model, tokens)
    set_backend(model, "triton")
    assert_same_logits(logits_of(model, tokens), expected)
