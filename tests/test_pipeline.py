"""quantize(): what it packs is what its recipe says; its errors come before anything is lost."""

from dataclasses import replace

import pytest
import torch
from brief import brief
from helpers import assert_bitwise
from live_bytes import LiveBytes
from models import tiny_llama, tiny_tokenizer, tiny_tokens

import lowbit
from lowbit.evaluate.fake_quant import to_fake
from lowbit.models.source import load_source
from lowbit.nn.attention import QuantAttention
from lowbit.nn.linear import QuantLinear
from lowbit.nn.mlp import QuantMLP
from lowbit.ops import quantize
from lowbit.quantize import sample_windows
from lowbit.recipes import Calibration
from lowbit.rounding import GPTQ

CALIBRATION = tiny_tokens(8, 32, seed=9)
RECIPES = sorted(lowbit.RECIPES)


def quantized(recipe="quarot", format="w4a4kv4", **options):
    model = tiny_llama(**options)
    return lowbit.quantize(model, brief(recipe), format, calibration=CALIBRATION, progress=False)


def module_types(model) -> set[type]:
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_bits_keep_the_function_of_the_model(recipe):
    """Whatever the transforms: at 8 bits the logits stay within a few percent of the float ones."""
    options = {"bias": True, "tied": True, "num_heads": 3, "num_kv_heads": 1, "hidden_size": 48}
    expected = tiny_llama(**options)(tiny_tokens()).logits
    got = quantized(recipe, "w8a8kv8", **options)(tiny_tokens()).logits
    assert ((got - expected).norm() / expected.norm()).item() < 0.05


FORMATS = ["w4a4kv4", "w4a8", "w4a16g32-wasym", "w8a8-aasym", "w16a16kv4", "w4a8g32-wtwolevel"]


@pytest.mark.parametrize("format", FORMATS)
def test_modules_follow_the_format(format):
    model = quantized("quarot", format)
    parsed, types = model.lowbit_config.format, module_types(model)
    assert parsed.name == format
    assert (QuantLinear in types) == (parsed.weight is not None)
    assert (QuantMLP in types) == (parsed.activation is not None)
    assert (QuantAttention in types) == (parsed.kv is not None)
    assert model(tiny_tokens()).logits.isfinite().all()


def test_rtn_weights_are_the_quantize_op_of_the_originals():
    original = tiny_llama().model.layers[1].mlp.down_proj.weight
    packed = quantized("rtn").model.layers[1].mlp.down_proj.packed_weight
    expected = quantize(original, lowbit.IntFormat(4), layout=lowbit.Layout.ROW_MAJOR)
    assert torch.equal(packed.codes, expected.codes) and torch.equal(packed.scale, expected.scale)


def test_same_seed_same_bits():
    first, second, other = (
        lowbit.quantize(
            tiny_llama(), "quarot", "w4a4kv4", calibration=CALIBRATION, seed=seed, progress=False
        ).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_quarot_beats_rtn_on_outliers():
    """The tiny model has two loud residual channels: 4-bit activations without rotation fail."""
    expected = tiny_llama()(tiny_tokens()).logits
    errors = {
        recipe: ((quantized(recipe)(tiny_tokens()).logits - expected).norm() / expected.norm())
        for recipe in ("rtn", "quarot")
    }
    assert errors["quarot"] < 0.8 * errors["rtn"]


def test_gptq_lowers_the_output_error_of_every_linear():
    report = quantized("gptq", "w4a16").lowbit_config.report["rounding"]
    assert len(report) == 2 * 7
    assert all(0 < r["relative_error"] < 0.05 and r["damp"] == 0.01 for r in report.values())


def test_a_hopeless_hessian_is_a_warning_and_in_the_report(capsys, monkeypatch):
    monkeypatch.setattr(GPTQ, "_inverse_factor", lambda self, *_: (None, None))
    report = quantized("gptq", "w4a16").lowbit_config.report["rounding"]
    assert report["1.mlp.down_proj"]["damp"] is None
    assert "warning: block 1, mlp.down_proj: no damping" in capsys.readouterr().err


def test_the_report_says_what_was_done():
    report = quantized(num_heads=3, num_kv_heads=1, hidden_size=48).lowbit_config.report
    assert "heads: hartley of order 3 (x) I_16" in report["transforms"]
    assert report["calibration"] == [8, 32] and report["seed"] == 0


def test_the_model_is_reduced_as_it_is_packed():
    """No float weight of a quantized linear is left, and the packed ones are a quarter of bf16."""
    model = quantized()
    floats = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert floats == ["lm_head"]
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    bf16 = sum(2 * m.in_features * m.out_features for m in linears)
    codes = sum(m.codes.numel() for m in linears)
    assert codes == bf16 / 4


def test_a_stored_model_is_quantized_like_one_in_memory(tmp_path):
    tiny_llama(dtype=torch.bfloat16, tied=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored = lowbit.quantize(str(tmp_path), calibration=CALIBRATION, progress=False).state_dict()
    model, _ = load_source(tmp_path)
    whole = lowbit.quantize(model, calibration=CALIBRATION, progress=False).state_dict()
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], whole[name]) for name in whole)


def test_peak_memory(tmp_path):
    """A stored model: at most its bf16 bytes, one block in fp32 and the calibration activations."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 16}
    model = tiny_llama(dtype=torch.bfloat16, **sizes)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole = sum(p.nbytes for p in model.parameters())
    block = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    windows = tiny_tokens(8, 32)
    activations = 4 * windows.numel() * model.config.hidden_size
    recipe = replace(lowbit.RECIPES["quarot"], rounding=GPTQ(clip="none"))  # seconds
    with LiveBytes() as live:
        lowbit.quantize(str(tmp_path), recipe, calibration=windows, progress=False)
    assert live.peak <= whole + block + activations


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_and_fake_give_the_same_bits(recipe):
    model = quantized(recipe, num_heads=3, num_kv_heads=1, hidden_size=48)
    packed = model(tiny_tokens()).logits
    assert_bitwise(packed, to_fake(model)(tiny_tokens()).logits)


def test_bf16_models_keep_their_dtype():
    model = quantized(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(tiny_tokens()).logits.dtype == torch.bfloat16


def test_sample_windows_are_random_slices():
    tokens = torch.arange(100)
    windows = sample_windows(tokens, Calibration(samples=50, length=8), seed=1)
    assert windows.shape == (50, 8) and (windows.diff(dim=1) == 1).all()
    assert windows[:, 0].unique().numel() > 20
    assert torch.equal(windows, sample_windows(tokens, Calibration(50, 8), seed=1))


def test_a_bad_weight_on_disk_is_found_before_the_work(tmp_path):
    break_weight(tiny_llama(), float("inf")).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    message = "got 1 NaN or inf in model.layers.1.mlp.up_proj.weight"
    with pytest.raises(lowbit.InputError, match=message):
        lowbit.quantize(str(tmp_path), "rtn", progress=False)


def break_weight(model, value):
    model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    return model


BAD = {
    "recipe": (lambda: quantized("quarrot"), "unknown recipe 'quarrot'"),
    "format": (lambda: quantized(format="w4a4kv5x"), "unknown format 'w4a4kv5x'"),
    "group": (lambda: quantized(format="w4a16g64", intermediate_size=96), "group_size must divide"),
    "nan": (
        lambda: lowbit.quantize(break_weight(tiny_llama(), float("nan")), "rtn", progress=False),
        "weights must be finite, got 1 NaN or inf in model.layers.1.mlp.up_proj.weight",
    ),
    "short text": (
        lambda: sample_windows(torch.arange(10), Calibration(2, 64), 0),
        "shorter than one window: expected at least 64 tokens, got 10",
    ),
    "calibration shape": (
        lambda: lowbit.quantize(tiny_llama(), calibration=torch.zeros(8), progress=False),
        r"calibration must be int64 \[samples, length\]",
    ),
    "calibration of nothing": (
        lambda: lowbit.quantize(tiny_llama(), calibration=CALIBRATION[:, :1], progress=False),
        r"1 sample and 2 tokens at least, got torch.int64 \(8, 1\)",
    ),
    "another tokenizer": (
        lambda: lowbit.quantize(tiny_llama(), calibration=CALIBRATION + 128, progress=False),
        r"calibration: token ids must be in 0 \.\. 127, the model's vocabulary, got 1\d\d \.\. 255",
    ),
    "no tokenizer": (
        lambda: lowbit.quantize(tiny_llama(), calibration="some text", progress=False),
        "tokenizer must be given",
    ),
    "quantized": (
        lambda: lowbit.quantize(quantized("rtn"), "rtn", progress=False),
        "model must not be quantized yet, got w4a4kv4",
    ),
    "architecture": (
        lambda: lowbit.models.adapter_for(type("C", (), {"model_type": "mamba"})()),
        "unknown architecture 'mamba'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(lowbit.InputError, match=message):
        call()


def test_a_calibration_too_small_is_a_warning_that_names_the_layers(capsys):
    lowbit.quantize(tiny_llama(), "gptq", "w4a16", calibration=CALIBRATION[:2], progress=False)
    assert (
        "warning: 64 calibration tokens are fewer than the inputs of mlp.down_proj: take more"
        in (capsys.readouterr().err)
    )


def test_nan_in_calibration_activations():
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.fill_(3e38)  # finite, overflows when multiplied
    with pytest.raises(lowbit.InputError, match="calibration activations must be finite"):
        lowbit.quantize(model, "gptq", "w4a16", calibration=CALIBRATION, progress=False)
