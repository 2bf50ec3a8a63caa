"""A whole model on Triton's kernels alone: none of its ops falls to the reference, logits agree."""

import pytest
import torch
from helpers import assert_same_logits
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit.evaluate.text import manual_text, tokenize
from lowbit.models.source import PACKAGED, load_source
from lowbit.nn.swap import set_backend
from lowbit.ops import dispatch
from lowbit.recipes.quarot import ROTATIONS
from lowbit.rounding import RTN

pytestmark = pytest.mark.interpret
BLOCKS = 6
RECIPE = lowbit.Recipe("test", "rotated, rounded to nearest", "", RTN(), ROTATIONS)


@pytest.fixture
def quantized(monkeypatch):
    """lowbit.quantize on the reference: interpreted, its ops take minutes."""

    def run(model, format: str):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "interpreted", lambda: False)
            return lowbit.quantize(model, RECIPE, format, progress=False)

    return run


def logits_of(model, backend: str, tokens: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the last as a prompt, then of the last one, from the cache."""
    set_backend(model, backend)
    prompt = model(tokens[:, :-1], use_cache=True)
    last = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
    return torch.cat((prompt.logits, last.logits), 1)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("format", ["w4a4kv4", "w4a8kv4", "w8a8", "w4a16g128"])
def test_tiny_model(quantized, format):
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_heads": 2, "num_kv_heads": 1}
    model, tokens = quantized(tiny_llama(**sizes), format), tiny_tokens(2, 9)
    expected = logits_of(model, "reference", tokens)
    assert_same_logits(logits_of(model, "triton", tokens), expected)


@pytest.mark.slow
@torch.no_grad()
def test_real_model(quantized):
    """Its first blocks: interpreted, each takes ten seconds, and all launch the same kernels."""
    model, tokenizer = load_source(PACKAGED, torch.float32)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    tokens = tokenize(tokenizer, manual_text("evaluation"))[None, :8]
    full = model(tokens).logits
    model = quantized(model, "w4a4kv4")
    set_backend(model, "reference")
    expected = model(tokens).logits
    set_backend(model, "triton")
    assert difference(model(tokens).logits, expected) < 1e-4 * difference(expected, full)
