"""What only a GPU shows of whole layers: decoding is captured, and repeats to the bit."""

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_tokens
from packed import packed_llama

from lowbit.integrations import attach
from lowbit.nn import QuantKVCache, fuse, graphs, set_backend

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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("format", ["w4a4kv4", "w4a16kv4"])
def test_generate_decodes_in_graphs(format, fused, monkeypatch):
    """By itself, to the tokens and logits of the cache that grows."""
    model = attach(packed_llama(format, **SIZES)).to("cuda")
    set_backend(model, None)
    if fused:
        fuse(model)
    recorded, record = [], graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args: recorded.append(1) or record(*args))
    mask = torch.ones(3, 9, dtype=torch.int64, device="cuda")
    mask[0, :4] = mask[1, :1] = 0
    ids = tiny_tokens(3, 9).to("cuda") * mask
    options = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, disable_compile=True, **options)
    for _ in range(2):
        got = model.generate(ids, **options)
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.logits, expected.logits, strict=True):
            assert_bitwise(a, b)
    assert len(recorded) == 2
