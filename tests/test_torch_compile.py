"""torch.compile: no graph break in a quantized layer, and the bits of the layer as it is."""

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_llama, tiny_tokens
from torch._dynamo.testing import CompileCounterWithBackend

import lowbit
from lowbit.nn import set_decode
from lowbit.nn.kv_cache import PAGE_SIZE, QuantKVCache

BATCH = 2


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def quantized(format: str = "w4a4kv4"):
    """Three heads: head mixing brings a dense online matrix."""
    model = tiny_llama(num_heads=3, num_kv_heads=1, hidden_size=48)
    return lowbit.quantize(
        model, "quarot", format, calibration=tiny_tokens(4, 32), progress=False
    ).requires_grad_(False)


def compiled(module: torch.nn.Module):
    """(the compiled module, what counts its graphs); traced and lowered, not turned into C++."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("format", ["w4a4kv4", "w8a8", "w4a16", "w4a8-aasym"])
def test_linear(format, name):
    linear = quantized(format).model.layers[0].get_submodule(name)
    fast, counter = compiled(linear)
    for rows in (5, 3, 7):
        x = torch.randn(rows, linear.in_features)
        assert_bitwise(fast(x), linear(x))
    assert counter.frame_count <= 2  # one of fixed, one of any number of rows


def inputs_at(model, start: int, columns: int) -> tuple:
    x = torch.randn(BATCH, columns, model.config.hidden_size)
    return x, model.model.rotary_emb(x, torch.arange(start, start + columns)[None])


@pytest.mark.parametrize(
    "format, decode", [("w4a4kv4", None), ("w4a16kv4", None), ("w4a4kv4", "w4a16")]
)
def test_decoder_layer(format, decode):
    """A prompt, then decoding across a page's end; the layer alone keeps an equal cache."""
    model = quantized(format)
    set_decode(model, decode, BATCH)
    layer, kv = model.model.layers[0], model.lowbit_config.format.kv
    fast, counter = compiled(layer)
    caches = [QuantKVCache(model.config, kv) for _ in range(2)]
    length = 0
    for columns in (PAGE_SIZE - 4, *[1] * 8):
        x, angles = inputs_at(model, length, columns)
        got, expected = (
            run(x, position_embeddings=angles, past_key_values=cache)
            for run, cache in zip((fast, layer), caches, strict=True)
        )
        assert_bitwise(got, expected)
        length += columns
    assert_bitwise(*(cache.layers[0].pages.tensors for cache in caches))
    assert counter.frame_count <= 5  # prompt; a token, of any position; a new page, likewise


def test_the_online_matrix_is_a_constant_of_the_graph():
    layer = quantized().model.layers[0]
    fast, counter = compiled(layer.self_attn.o_proj)
    fast(torch.randn(3, layer.self_attn.o_proj.in_features))
    called = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    ours = [name for name in called if name.startswith("lowbit.")]
    assert ours == ["lowbit.hadamard_quant", "lowbit.int_gemm"]
    assert not any("cos" in name for name in called)  # it is made of cosines
