"""Prefill in chunks, over the pages of the chunks before: the prompt's own forward, cut.

QUERY_CHUNK queries share the sums of one softmax in the reference of kv_attention. Where chunks are
whole multiples of it, and so are the pads in front, each token is computed as it is in one forward,
to the bit; elsewhere softmax is over another piece of the keys and differs by fp32 rounding.

And prefill_kv: what a piece sees of its own tokens.
"""

import copy

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_llama, tiny_tokens
from packed import packed_llama
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from lowbit.checkpoint import load, save
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import to_fake
from lowbit.nn import QuantKVCache, StaticQuantKVCache, fuse, set_prefill_kv
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
    # fp32 rounding can move a code by one step, which the tokens after it see
    assert (got - expected).norm() < 0.02 * expected.norm()
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


def in_full(format: str = "w16a16kv4", **sizes):
    model = packed_llama(format, **sizes)
    set_prefill_kv(model, "full")
    return model


@torch.no_grad()
def test_one_forward_in_full_is_the_model_without_quantized_kv():
    """But for the rotation of q and k, which is undone in their product."""
    ids, plain = tiny_tokens(2, 80), tiny_llama()
    got, expected = in_full()(ids).logits, plain(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (packed_llama("w16a16kv4")(ids).logits - expected).abs().max() > 0.1


@torch.no_grad()
def test_what_is_stored_of_the_first_layer_is_quantized_as_ever():
    """And of the others what follows from another attention before them."""
    ids = tiny_tokens(2, 40)
    full, quantized = in_full(), packed_llama("w16a16kv4")
    caches = [m(ids).past_key_values.layers for m in (full, quantized)]
    assert_bitwise(*(layers[0].pages.tensors for layers in caches))
    assert not torch.equal(*(layers[1].pages.v_scale for layers in caches))


@torch.no_grad()
def test_decoding_reads_its_token_from_the_page():
    """One column gives the bits of the model as it is by default, over the same cache."""
    ids, models = tiny_tokens(2, 40), (packed_llama("w16a16kv4"), in_full())
    cache = models[0](ids[:, :-1]).past_key_values
    caches = cache, copy.deepcopy(cache)
    outs = [m(ids[:, -1:], past_key_values=c) for m, c in zip(models, caches, strict=True)]
    assert_bitwise(outs[1].logits, outs[0].logits)


@pytest.mark.parametrize("kind", [None, "hadamard", "hartley"])
@pytest.mark.parametrize("format", ["w16a16kv4", "w4a8kv3"])
@torch.no_grad()
def test_packed_and_fake_give_the_same_bits(format, kind):
    """In pieces: each sees itself in full and those before quantized."""
    packed, ids = in_full(format, kind=kind), tiny_tokens(2, 3 * QUERY_CHUNK)
    logits = []
    for model in (packed, to_fake(copy.deepcopy(packed))):
        cache = DynamicCache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(QUERY_CHUNK, 1)]
        logits.append(torch.cat(parts, 1))
    assert_bitwise(logits[1], logits[0])
    set_prefill_kv(packed, "quantized")
    assert not torch.equal(packed(ids).logits, logits[0])


@CACHES
@pytest.mark.parametrize("name", BATCHES)
def test_pads_and_pieces_in_full(name, kind):
    """Rows are as if alone, whatever cache: pads stand for no token."""
    model = in_full()
    _, mask = left_padded(name)
    together = prefill(model, name, 50, new_cache(model, kind))
    ids, _ = left_padded(name)
    for row, states in zip(range(len(ids)), together.split(mask.sum(1).tolist()), strict=True):
        cache, alone = new_cache(model), []
        for start in range(0, WIDTH, 50):
            part = ids[row, start : start + 50][mask[row, start : start + 50].bool()]
            if len(part):
                # a single token, which decodes: beside another, as in the batch
                alone.append(model.model(part[None], past_key_values=cache).last_hidden_state[0])
        torch.testing.assert_close(states, torch.cat(alone), rtol=0, atol=2e-2)


@torch.no_grad()
def test_pads_between_a_rows_tokens():
    """A second turn of a static cache: its pads stand where older tokens of the row are."""
    model = in_full()
    ids, mask = tiny_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, 12:16] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    states = []
    for kind in (QuantKVCache, StaticQuantKVCache):
        cache = new_cache(model, kind)
        for new in (slice(0, 12), slice(12, 20)):
            out = model.model(
                ids[:, new],
                attention_mask=mask[:, : new.stop],
                position_ids=positions[:, new],
                past_key_values=cache,
            )
        states.append(out.last_hidden_state[mask[:, 12:].bool()])
    assert_bitwise(*states)


@torch.no_grad()
def test_fused_layers_in_full():
    model, ids = in_full("w4a4kv4"), tiny_tokens(2, 70)
    expected = model(ids).logits
    assert_bitwise(fuse(model)(ids).logits, expected)


def test_load(tmp_path):
    packed, ids = packed_llama("w4a8kv4"), tiny_tokens(2, 30)
    save(packed, tmp_path / "packed")
    set_prefill_kv(packed, "full")
    with torch.no_grad():
        expected = packed(ids).logits
        assert_bitwise(load(tmp_path / "packed", prefill_kv="full")(ids).logits, expected)
        assert not torch.equal(load(tmp_path / "packed")(ids).logits, expected)
    wrong = "prefill_kv must be one of .'quantized', 'full'., got 'bf16'"
    with pytest.raises(InputError, match=wrong):
        load(tmp_path / "nowhere", prefill_kv="bf16")
    with pytest.raises(InputError, match=wrong):
        set_prefill_kv(packed, "bf16")
    float_kv = packed_llama("w4a8")
    set_prefill_kv(float_kv, "quantized")
    with pytest.raises(InputError, match="prefill_kv must be 'quantized' for a model without"):
        set_prefill_kv(float_kv, "full")
