"""Prefill in chunks, over the pages of the chunks before: the prompt's own forward, cut.

QUERY_CHUNK queries share the sums of one softmax in the reference of kv_attention. Where chunks are
whole multiples of it, and so are the pads in front, each token is computed as it is in one forward,
to the bit; elsewhere softmax is over another piece of the keys and differs by fp32 rounding.
"""

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_tokens
from packed import packed_llama
from transformers import StaticCache
from transformers.cache_utils import Cache

from lowbit.nn import QuantKVCache, StaticQuantKVCache
from lowbit.ops.kv_attention import QUERY_CHUNK

WIDTH = 2 * QUERY_CHUNK + 8
BATCHES = {
    "whole": (WIDTH, WIDTH),
    "pads of whole chunks": (WIDTH - QUERY_CHUNK, 8, WIDTH),
    "ragged": (110, 3, WIDTH),
}
CACHES = pytest.mark.parametrize("kind", [QuantKVCache, StaticQuantKVCache])


@pytest.fixture(scope="module")
def model():
    return packed_llama("w4a8kv4")


def left_padded(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, WIDTH]."""
    lengths = torch.tensor(BATCHES[name])
    mask = (torch.arange(WIDTH) >= WIDTH - lengths[:, None]).long()
    return tiny_tokens(len(lengths), WIDTH) * mask, mask


def new_cache(model, kind: type[Cache] = QuantKVCache) -> Cache:
    return kind(model.config, model.lowbit_config.format.kv, max_length=256, page_size=16)


def stored(cache: QuantKVCache) -> list[torch.Tensor]:
    """What the cache holds of each layer and row, in the order of the tokens."""
    return [
        tensor[table[: -(-length // 16)].long()].flatten(0, 1)[:length]
        for layer in cache.layers
        for table, length in zip(cache.table.block_table, cache.seq_lens, strict=True)
        for tensor in layer.pages.tensors
    ]


@torch.no_grad()
def prefill(model, name: str, chunk: int, cache: Cache) -> torch.Tensor:
    """Hidden states of all tokens, computed so many columns at a time."""
    ids, mask = left_padded(name)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    states = []
    for start in range(0, WIDTH, chunk):
        new = slice(start, start + chunk)
        out = model.model(
            ids[:, new],
            attention_mask=mask[:, : new.stop],
            position_ids=positions[:, new],
            past_key_values=cache,
        )
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)[mask.bool()]


@CACHES
@pytest.mark.parametrize("name", ["whole", "pads of whole chunks"])
@pytest.mark.parametrize("chunk", [QUERY_CHUNK, 2 * QUERY_CHUNK])
def test_bits_of_one_forward(model, name, chunk, kind):
    caches = new_cache(model), new_cache(model, kind)
    expected = prefill(model, name, WIDTH, caches[0])
    assert_bitwise(prefill(model, name, chunk, caches[1]), expected)
    assert_bitwise(stored(caches[1]), stored(caches[0]))


@CACHES
@pytest.mark.parametrize(
    ("name", "chunk"), [("whole", 1), ("whole", WIDTH - 1), ("ragged", 7), ("ragged", QUERY_CHUNK)]
)
def test_any_chunk(model, name, chunk, kind):
    cache = new_cache(model, kind)
    expected = prefill(model, name, WIDTH, new_cache(model))
    got = prefill(model, name, chunk, cache)
    # fp32 rounding can move a code by one step
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)
    assert cache.seq_lens == list(BATCHES[name])


@pytest.mark.parametrize(
    ("name", "chunk"), [("whole", QUERY_CHUNK), ("pads of whole chunks", WIDTH), ("ragged", 50)]
)
def test_generate(model, name, chunk):
    """transformers' prefill_chunk_size with its own caches, with ours, and with those it makes."""
    ids, mask = left_padded(name)
    options = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 4}
    expected = model.generate(ids, **options)
    for cache in (
        {},
        {"cache_implementation": "static"},
        {"past_key_values": StaticCache(model.config, 256)},
        {"past_key_values": new_cache(model)},
        {"past_key_values": new_cache(model, StaticQuantKVCache)},
    ):
        got = model.generate(ids, prefill_chunk_size=chunk, **options, **cache)
        assert torch.equal(got, expected)


@CACHES
def test_a_second_turn_in_chunks(model, kind):
    """Only what the cache lacks is computed, and the mask's pads stay where they were."""
    ids, mask = left_padded("ragged")
    turns = (ids[:, :100], mask[:, :100]), (ids, mask)
    options = {"pad_token_id": 0, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    outs = []
    for chunk in (None, 30):
        cache = new_cache(model, kind)
        for ids, mask in turns:
            out = model.generate(
                ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **options
            )
            cache.crop(-3)  # of the answer: the second prompt does not hold it
        outs.append(out)
        assert cache.seq_lens == list(BATCHES["ragged"])
    assert torch.equal(*outs)
