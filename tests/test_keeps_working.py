"""What a server relies on: long runs, full caches, cancelled calls, other models, other batches."""

import gc

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_tokens
from packed import packed_llama
from transformers import StoppingCriteria, StoppingCriteriaList

from lowbit.errors import InputError
from lowbit.nn import QuantKVCache, StaticQuantKVCache, fuse

KINDS = {"growing": QuantKVCache, "static": StaticQuantKVCache}
ROWS, PROMPT, NEW = 64, 6, 242  # 248 of the 256 positions


def endless(model):
    """Every row goes on to the end."""
    model.generation_config.eos_token_id = None
    return fuse(model)


@pytest.fixture(scope="module")
def model():
    return endless(packed_llama())


def new_cache(model, kind: str, max_length: int = 256):
    return KINDS[kind](model.config, model.lowbit_config.format.kv, max_length=max_length)


def generate(model, tokens, cache, new: int = NEW, **options):
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **options}
    return model.generate(tokens, past_key_values=cache, disable_compile=True, **options)


def live() -> tuple[int, int]:
    """Tensors that Python holds, and their bytes."""
    gc.collect()
    found = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    tensors = [t for t in found if not t.is_meta]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_tokens_leave_nothing_behind(kind):
    model = endless(packed_llama(num_layers=1))
    cache, tokens = new_cache(model, kind), tiny_tokens(ROWS, PROMPT)
    rounds, held, pages = 100_000 // (ROWS * NEW) + 1, None, None
    for turn in range(rounds):
        found = generate(model, tokens, cache)
        assert found.shape == (ROWS, PROMPT + NEW)
        pages = pages or cache.table.num_pages
        assert cache.table.num_pages == pages
        cache.reset()
        del found
        if turn == 1:  # the first one makes what is kept for good
            held = live()
    assert live() == held


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_raises_before_anything_is_overwritten(model, kind):
    cache, tokens = new_cache(model, kind, max_length=12), tiny_tokens(2, 12)
    model(tokens[:, :10], past_key_values=cache, use_cache=True)
    before = [t.clone() for layer in cache.layers for t in layer.pages.tensors]
    lengths = cache.seq_lens
    with pytest.raises(InputError, match="its capacity is 12 tokens"):
        model(tiny_tokens(2, 3), past_key_values=cache)
    assert cache.seq_lens == lengths
    assert_bitwise([t for layer in cache.layers for t in layer.pages.tensors], before)
    whole = model(tokens, past_key_values=new_cache(model, kind)).logits[:, 10:]
    got = model(tokens[:, 10:], past_key_values=cache).logits
    assert (got - whole).norm() < 1e-5 * whole.norm()


class Cancelled(StoppingCriteria):
    """As a user's Ctrl-C, after some tokens."""

    def __init__(self, after: int):
        self.after = after

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.after:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["between steps", "between layers"])
def test_a_cancelled_call_leaves_the_cache_fit_for_use(model, kind, where):
    tokens = tiny_tokens(2, PROMPT)
    expected = generate(model, tokens, new_cache(model, kind), 20)
    cache, calls = new_cache(model, kind), []

    def stop(*_):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt

    criteria = StoppingCriteriaList([Cancelled(PROMPT + 5)] if where == "between steps" else [])
    handle = model.model.layers[1].register_forward_pre_hook(
        stop if where == "between layers" else lambda *_: None
    )
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens, cache, 20, stopping_criteria=criteria)
    handle.remove()
    if where == "between layers":
        with pytest.raises(InputError, match="did not end: reset"):
            model(tokens, past_key_values=cache)
    cache.reset()
    assert_bitwise(generate(model, tokens, cache, 20), expected)


@torch.no_grad()
def test_two_models_do_not_disturb_each_other(model):
    """Of other formats, sizes and caches, token by token in turns."""
    models = [model, fuse(packed_llama("w8a8kv8", hidden_size=128, num_heads=2, num_kv_heads=1))]
    tokens = tiny_tokens(2, 12)

    def alone(m) -> list[torch.Tensor]:
        cache = new_cache(m, "growing")
        return [m(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(12)]

    expected = [alone(m) for m in models]
    caches = [new_cache(m, "growing") for m in models]
    for i in range(12):
        for m, cache, wanted in zip(models, caches, expected, strict=True):
            got = m(tokens[:, i : i + 1], past_key_values=cache).logits
            assert_bitwise(got, wanted[i])


@torch.no_grad()
@pytest.mark.parametrize("format", ["w4a4kv4", "w4a16kv4g32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_its_bits_in_any_batch(format, kind):
    """What the head reads of prompts and cached tokens, alone and beside others behind pads; and
    the tokens that come of it."""
    model = endless(packed_llama(format))
    lengths, tokens = (9, 4, 7), tiny_tokens(3, 10)
    mask = torch.stack([torch.arange(9) >= 9 - n for n in lengths]).long()

    def hidden(rows: list[int], width: int) -> torch.Tensor:
        cache, columns = new_cache(model, kind), slice(9 - width, 9)
        seen = torch.cat((mask[rows, columns], mask.new_ones(len(rows), 1)), 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)  # as generate() has them
        outputs = [
            model.model(
                tokens[rows, new],
                attention_mask=seen[:, :end],
                position_ids=positions[:, end - size : end],
                past_key_values=cache,
            ).last_hidden_state
            for new, size, end in ((columns, width, width), (slice(9, 10), 1, width + 1))
        ]
        return torch.cat(outputs, 1)

    together = hidden([0, 1, 2], 9)
    for row, length in enumerate(lengths):
        assert_bitwise(hidden([row], length)[0], together[row, 9 - length :])
    ids = tokens[:, :9]
    found = generate(model, ids, new_cache(model, kind), 12, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, 9 - length :], new_cache(model, kind), 12)
        assert_bitwise(alone[0, length:], found[row, 9:])
