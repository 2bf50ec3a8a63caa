"""A whole model on the CUDA kernels, emulated: layers prepare their weights, logits agree."""

import pytest
import torch
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit import cuda
from lowbit.formats import Layout
from lowbit.nn import QuantLinear
from lowbit.nn.swap import set_backend
from lowbit.recipes.quarot import ROTATIONS
from lowbit.rounding import RTN

RECIPE = lowbit.Recipe("test", "rotated, rounded to nearest", "", RTN(), ROTATIONS)
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_heads": 2, "num_kv_heads": 1}
KERNELS = {"quantize", "hadamard_quant", "silu_mul_hadamard_quant", "int_gemm"}
KERNELS |= {"kv_append", "kv_attention"}


def logits_of(model, backend: str | None, tokens: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the last as a prompt, then of the last one, from the cache."""
    set_backend(model, backend)
    prompt = model(tokens[:, :-1], use_cache=True)
    last = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
    return torch.cat((prompt.logits, last.logits), 1)


@pytest.fixture
def ran(monkeypatch) -> set[str]:
    """The CUDA kernels that were called."""
    names, find = set(), cuda.__getattr__

    def recorded(name: str):
        kernel = find(name)
        names.add(name)
        return kernel

    monkeypatch.setattr(cuda, "__getattr__", recorded)
    return names


def agrees(format: str, ran: set[str], layout: Layout, kernels: set[str] = KERNELS):
    device = cuda.LIBRARY.device_type
    model = lowbit.quantize(tiny_llama(**SIZES), RECIPE, format, progress=False).bfloat16()
    model, tokens = model.to(device), tiny_tokens(2, 9).to(device)
    expected = logits_of(model, "reference", tokens).float()
    ran.clear()
    got = logits_of(model, None, tokens).float()
    assert ran == kernels
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {m.prepared_weight.layout for m in linears} == {layout}
    # Attention's sums are in another order. One unit in the last place of 2 % of its outputs, as
    # bf16, changes codes further on, and these logits by 2 to 4 %; unrelated ones are 140 % away.
    assert (got - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
@pytest.mark.emulate(90)
@pytest.mark.parametrize("format", ["w4a4kv4", "w4a8kv4", "w8a8kv8", "w4a8kv4g64-wtwolevel-aasym"])
def test_on_hopper(format, ran):
    agrees(format, ran, Layout.FRAGMENT)


@torch.no_grad()
@pytest.mark.emulate(80)
@pytest.mark.parametrize(
    "format, layout", [("w4a4kv4", Layout.FRAGMENT_INT4), ("w4a8kv4", Layout.FRAGMENT)]
)
def test_on_ampere(format, layout, ran):
    agrees(format, ran, layout)


@torch.no_grad()
@pytest.mark.emulate(90)
@pytest.mark.parametrize("format", ["w4a16g128", "w8a16", "w4a16g32-wasym"])
def test_weights_alone(format, ran):
    agrees(format, ran, Layout.FRAGMENT_FLOAT, {"weight_only_gemm"})
