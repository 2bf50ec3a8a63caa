"""A model quantized for several ranks: each slice of what they share out is by itself."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_config, tiny_llama, tiny_model, tiny_tokens
from transformers import MixtralConfig, Phi3Config

import lowbit
from lowbit import executor, flattening, training
from lowbit.config import LowbitConfig
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import fake_quantize, to_fake
from lowbit.executor import Executor
from lowbit.formats import IntFormat, Layout, QuantFormat
from lowbit.interop.export import export
from lowbit.models import adapter_for
from lowbit.nn import QuantLinear, fuse, linear, set_decode
from lowbit.nn.slices import slices_of
from lowbit.ops import dequantize, to_layout
from lowbit.recipes import overridden, recipe_named
from lowbit.recipes.quarot import ROTATIONS
from lowbit.rounding import grid
from lowbit.rounding.learned import clipped_through
from lowbit.tensor_parallel import check_ranks
from lowbit.transforms import LearnMap, LearnRotation, OnlineTransform, fit, rotate, scale

CALIBRATION, TOKENS = tiny_tokens(4, 32, seed=9), tiny_tokens()
FORMATS = ("w4a4kv4", "w4a4kv4-aasym", "w8a8", "w4a8kv4g32", "w4a8g32-wtwolevel", "w4a16g32")
SIZES = {"intermediate_size": 128, "bias": True}


def quantized(format="w4a4kv4", recipe="quarot-rtn", ranks=2, *settings: str, **sizes):
    recipe = overridden(recipe_named(recipe), [f"tensor_parallel={ranks}", *settings])
    model = tiny_llama(**SIZES | sizes)
    return lowbit.quantize(model, recipe, format, CALIBRATION, progress=False)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(64, 128, 4, 2), (36, 66, 6, 2), (48, 268, 4, 4)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fp64_logits_stay_as_they_were(sizes, ranks):
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    model = tiny_llama(**dict(zip(names, sizes, strict=True)), bias=True, dtype=torch.float64)
    before = model(TOKENS).logits
    adapter = replace(adapter_for(model.config), ranks=ranks)
    fitted = rotate(model, ROTATIONS, adapter, seed=3)
    assert (model(TOKENS).logits - before).abs().max() < 1e-9 * before.abs().max()
    reach = {name: t.order * t.inner for name, t in fitted.input_transforms.items()}
    widths = {"self_attn.o_proj": sizes[0], "mlp.down_proj": sizes[1]}
    assert reach.keys() == widths.keys()
    assert all(widths[name] // ranks % reach[name] == 0 for name in reach)


def test_what_is_learned_online_is_that_of_a_rank():
    adapter = replace(adapter_for(tiny_llama(**SIZES).config), ranks=2)
    learned = fit((LearnMap("heads"), LearnRotation("mlp_hidden")), adapter, 0).input_transforms
    assert learned == {
        "self_attn.o_proj": OnlineTransform("learned", 2, 16),
        "mlp.down_proj": OnlineTransform("learned", 64),
    }
    spaces = ("value", "attention_input", "mlp_hidden", "query_key")
    assert [adapter.of_rank(space).dim for space in spaces] == [16, 64, 64, 16]


@torch.no_grad()
def test_slices_that_are_not_quantized():
    """Of few rows, lowbit/nn/decode.py: products of the slices, added."""
    model = quantized()
    set_decode(model, "w4a16", TOKENS.numel())
    packed = model(TOKENS).logits
    assert_bitwise(fuse(model)(TOKENS).logits, packed)
    assert_bitwise(to_fake(model)(TOKENS).logits, packed)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_packed_fused_and_fake_give_the_same_bits(format):
    model = quantized(format)
    expected = model(TOKENS).logits
    assert_bitwise(fuse(model)(TOKENS).logits, expected)
    assert_bitwise(to_fake(model)(TOKENS).logits, expected)


# recipe -> what quantizes inputs while it is fitted or learned, settings that make it quick
FITTED = {
    "awq": (scale, "fake_quantize", [f"transforms.{i}.fit.steps=3" for i in range(4)]),
    "omniquant": (executor, "quantized_through", ["rounding.epochs=1"]),
    "flatquant-rtn": (flattening, "clipped_through", ["flattening.epochs=1"]),
    "duarot": (training, "clipped_through", ["training.steps=1", "training.length=32"]),
}


@torch.no_grad()
@pytest.mark.parametrize("recipe", FITTED)
def test_methods_fit_to_what_runs(recipe, monkeypatch):
    module, name, settings = FITTED[recipe]
    quantize, groups = getattr(module, name), set()

    def recorded(x, format, clip):
        groups.add(format.group_size)
        return quantize(x, format, clip)

    monkeypatch.setattr(module, name, recorded)
    model = quantized("w4a4", recipe, 2, *settings, num_layers=1)
    assert groups == {None, 32, 64}
    expected = model(TOKENS).logits
    assert_bitwise(to_fake(model)(TOKENS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_slice_depends_on_no_other(symmetric):
    name = f"w4a4kv4{'' if symmetric else '-aasym'}"
    down = quantized(name).model.layers[0].mlp.down_proj
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    first, _ = slices_of(down.quantize_input(x))
    x[:, 64:] *= 100
    again, second = slices_of(down.quantize_input(x))
    assert_bitwise(again, first)
    assert (second.scale > 10 * first.scale).all()
    assert first.format == IntFormat(4, symmetric) and first.shape == (5, 64)


@torch.no_grad()
def test_what_rounders_and_fits_see_is_what_runs(monkeypatch):
    """The quantizers in front of linears while they are calibrated are those of the packed ones."""
    seen = {}

    def leave(self, block, handles):
        for name in self.adapter.linears:
            (hook,) = block.get_submodule(name)._forward_pre_hooks.values()
            width = block.get_submodule(name).in_features
            x = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
            seen[name] = (x, hook(None, (x,))[0])
        original(self, block, handles)

    original = Executor._leave
    monkeypatch.setattr(Executor, "_leave", leave)
    model = quantized("w4a4", "omniquant", 2, "rounding.epochs=1", num_layers=1)
    for name, (x, expected) in seen.items():
        packed = model.model.layers[0].get_submodule(name)
        got = packed.quantize_input(x)
        torch.testing.assert_close(dequantize(got), expected, rtol=0, atol=0)
        assert got.scale.shape[1] == (2 if name in ("self_attn.o_proj", "mlp.down_proj") else 1)
        format, clip = packed.activation_format, torch.tensor(packed.activation_clip)
        learning = clipped_through(x, format, clip)
        torch.testing.assert_close(learning, grid.fake_quantize(x, format), rtol=0, atol=0)
        slices = [fake_quantize(part, IntFormat(4)) for part in x.chunk(got.scale.shape[1], -1)]
        torch.testing.assert_close(torch.cat(slices, -1), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("layout", [Layout.FRAGMENT, Layout.FRAGMENT_INT4])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 80, "intermediate_size": 96}])
def test_slices_in_a_kernel_layout(layout, sizes, monkeypatch):
    """Padded to whole tiles slice by slice; the bits and what is saved do not tell."""
    model = quantized(**sizes)
    expected, saved = model(TOKENS).logits, model.state_dict()
    monkeypatch.setattr(linear, "laid_out_for_device", lambda w, *_: to_layout(w, layout))
    linear.prepare(model)
    down = model.model.layers[0].mlp.down_proj
    tiles = [len(weight.codes) for weight in down.prepared_weights]
    assert down.layout is layout and tiles == [1 + bool(sizes)] * 2
    assert_bitwise(model(TOKENS).logits, expected)
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, saved[name])
    model.load_state_dict(saved)
    assert down.layout is layout
    assert_bitwise(model(TOKENS).logits, expected)


def test_saved_and_read_by_one_process(tmp_path):
    model = quantized()
    lowbit.save(model, tmp_path / "saved")
    again = lowbit.load(tmp_path / "saved")
    assert again.lowbit_config == model.lowbit_config and again.lowbit_config.tensor_parallel == 2
    assert_bitwise(again(TOKENS).logits, model(TOKENS).logits)
    assert "--set tensor_parallel=2" in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(InputError, match="one scale a token, got a model quantized for 2 ranks"):
        export(quantized("w8a8", "rtn"), tmp_path / "out", "compressed-tensors")


def test_one_rank_is_not_written():
    """So that earlier releases read what they can run."""
    config = LowbitConfig(QuantFormat.parse("w4a4"), "test")
    assert "tensor_parallel" not in config.to_dict()
    two = replace(config, tensor_parallel=2)
    assert LowbitConfig.from_dict(two.to_dict()) == two
    for value in (0, "2", True):
        with pytest.raises(InputError, match="tensor_parallel must be an integer of at least 1"):
            LowbitConfig.from_dict({**two.to_dict(), "tensor_parallel": value})


@pytest.mark.parametrize(
    "ranks, format, sizes, message",
    [
        (3, "w8a8", {}, "num_attention_heads, got 3 for 4"),
        (2, "w8a8", {"num_kv_heads": 1}, "num_key_value_heads, got 2 for 1"),
        (2, "w8a8", {"intermediate_size": 97}, "the inputs of mlp.down_proj, got 2 for 97"),
        (
            4,
            "w4a16g32",
            {"num_kv_heads": 4},
            "the groups of 32 inputs of self_attn.o_proj, got 4 for 2",
        ),
        (
            4,
            "w2a16",
            {"num_kv_heads": 4, "intermediate_size": 136},
            "the bytes of a packed row of mlp.down_proj, got 4 for 34",
        ),
    ],
)
def test_sizes_that_ranks_do_not_divide(ranks, format, sizes, message):
    with pytest.raises(InputError, match=f"^tensor_parallel must divide {message}$"):
        quantized(format, "rtn", ranks, **sizes)


def test_settings_and_architectures_that_cannot_be():
    with pytest.raises(InputError, match="tensor_parallel must be at least 1, got 0"):
        overridden(recipe_named("rtn"), ["tensor_parallel=0"])
    with pytest.raises(InputError, match="expected a int, got 'two'"):
        overridden(recipe_named("rtn"), ["tensor_parallel=two"])
    recipe = overridden(recipe_named("rtn"), ["tensor_parallel=2"])
    message = "where one linear makes what ranks share .* got 2 and qkv_proj, gate_up_proj"
    with pytest.raises(InputError, match=message):
        lowbit.quantize(tiny_model(tiny_config(Phi3Config)), recipe, "w4a4", progress=False)


def test_an_architecture_of_which_too_little_is_known():
    model = tiny_llama()
    adapter = adapter_for(model.config)
    spaces = {name: space for name, space in adapter.spaces.items() if name != "mlp_hidden"}
    adapter = replace(adapter, spaces=spaces, ranks=2)
    assert adapter.row_parallel == ("self_attn.o_proj",)
    with pytest.raises(InputError, match="got 2 and an architecture without mlp_hidden"):
        check_ranks(model, adapter, None, 2)


@torch.no_grad()
def test_experts():
    model, recipe = tiny_model(tiny_config(MixtralConfig)), recipe_named("quarot-rtn")
    recipe = overridden(recipe, ["tensor_parallel=2"])
    model = lowbit.quantize(model, recipe, "w4a4kv4", progress=False)
    sliced = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.slices == 2]
    assert {name.rpartition(".")[2] for name in sliced} == {"o_proj", "down_proj"}
    expected = model(TOKENS).logits
    assert_bitwise(to_fake(model)(TOKENS).logits, expected)
