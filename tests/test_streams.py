"""Where calibration activations lie, and that those of rounded blocks are what runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit import streams
from lowbit.executor import Executor
from lowbit.rounding import GPTAQ, GPTQ, AutoRound

SETTINGS = {
    "gptaq": [],
    "awq": [],
    "autoround": ["rounding.steps=3"],
    "flatquant": ["flattening.epochs=1"],
}


@pytest.mark.parametrize(("samples", "place"), [(128, "cuda"), (512, "cpu")])
def test_two_streams_take_a_quarter_of_a_gpu_at_most(samples, place, monkeypatch):
    """Of a model of 8192 channels on one of 80 GB: 2 x 8.6 GB, 2 x 34.4 GB."""
    properties = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    size = samples * 2048 * 8192 * 4
    assert streams.place_for(size, torch.device("cuda")).type == place
    assert streams.place_for(size, torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("format", ["w4a8kv4", "w4a16kv4", "w8a8"])
@pytest.mark.parametrize("rounding", [GPTQ(quantized_inputs=True), GPTAQ(), AutoRound(3)], ids=type)
def test_the_rounded_stream_is_what_the_packed_blocks_compute(rounding, format, monkeypatch):
    """But for steps of a code: K and V in full precision would put 4-bit ones 10 % apart."""
    windows, rounded, packed, leave = tiny_tokens(16, 32, seed=9), [], [], Executor._leave

    def seen(self, *args):
        leave(self, *args)
        rounded.append(torch.cat(self.rounded.hidden))

    monkeypatch.setattr(Executor, "_leave", seen)
    recipe = replace(lowbit.RECIPES["quarot"], rounding=rounding)
    model = lowbit.quantize(tiny_llama(), recipe, format, windows, progress=False)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: packed.append(output))
    with torch.no_grad():
        model(windows, use_cache=False)
    assert len(rounded) == len(packed) == 2
    for got, expected in zip(rounded, packed, strict=True):
        assert (got - expected).norm() < 0.04 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", SETTINGS)
def test_the_place_changes_no_bit(recipe, monkeypatch):
    def packed() -> dict[str, torch.Tensor]:
        method = lowbit.recipes.overridden(lowbit.RECIPES[recipe], SETTINGS[recipe])
        model = tiny_llama(hidden_size=128).to("cuda")
        calibration = tiny_tokens(8, 32)
        return lowbit.quantize(model, method, "w4a4kv4", calibration, progress=False).state_dict()

    on_gpu = packed()
    monkeypatch.setattr(streams, "SHARE_OF_GPU", 0)
    for name, tensor in packed().items():
        assert_bitwise(tensor, on_gpu[name])
