"""What only a GPU shows of a whole layer: a decode step can be captured, and repeats to the bit."""

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_tokens
from packed import packed_llama

from lowbit.nn import QuantKVCache, set_backend

pytestmark = pytest.mark.gpu
BATCH, PROMPT = 2, 24
SIZES = {"hidden_size": 256, "intermediate_size": 384, "dtype": torch.bfloat16}


def decode_step(format: str, backend: str | None, device: str):
    """(hidden states [BATCH, 1, hidden], a function of none that runs all blocks on them).

    Every run of it is the same step: token PROMPT of each sequence, written to the same slots.
    """
    model = packed_llama(format, **SIZES).to(device)
    set_backend(model, backend)
    cache = QuantKVCache(model.config, model.lowbit_config.format.kv)
    model(tiny_tokens(BATCH, PROMPT).to(device), past_key_values=cache)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, 1, SIZES["hidden_size"], generator=generator)
    hidden = hidden.to(device, SIZES["dtype"])
    positions = torch.full((BATCH, 1), PROMPT, device=device)
    angles = model.model.rotary_emb(hidden, positions)

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.length = PROMPT
        x = hidden
        for block in model.model.layers:
            x = block(x, position_embeddings=angles, past_key_values=cache)
        return x

    return hidden, step


@pytest.mark.parametrize("backend", ["triton", None])  # None: CUDA kernels where there are
@pytest.mark.parametrize("format", ["w4a4kv4", "w4a8kv4", "w8a8kv8", "w4a16kv4"])
@torch.inference_mode()
def test_decode_step_in_a_cuda_graph(format, backend):
    hidden, step = decode_step(format, backend, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and settles where the tokens go
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(2):
        hidden.neg_()  # other numbers in the same memory
        graph.replay()
        got = out.clone()
        assert_bitwise(got, step())
        graph.replay()
        assert_bitwise(out, got)
