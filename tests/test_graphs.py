"""Decoding in graphs: generate() without its doing. CUDA's recorder is replaced by one that runs
the same code on the same tensors, as a graph would; tests/test_gpu.py has the real one."""

import warnings

import pytest
import torch
from models import tiny_config, tiny_model, tiny_tokens
from packed import packed_llama
from transformers import (
    GenerationConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import lowbit
from lowbit.errors import InputError
from lowbit.integrations import attach
from lowbit.nn import StaticQuantKVCache, graphs
from lowbit.nn.graphs import GraphedForward, wants_graphs

NEW = 12


@pytest.fixture
def model(monkeypatch):
    model = attach(packed_llama("w4a8kv4"))
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)
    return model


@pytest.fixture
def recorded(monkeypatch):
    """One entry a recorded forward: how often it was replayed."""
    counts = []

    def record(model, inputs):
        counts.append(0)
        index, table = len(counts) - 1, inputs["past_key_values"].table
        before = table.seen.clone(), table.columns.clone()
        outputs = model(**inputs)
        table.seen.copy_(before[0])
        table.columns.copy_(before[1])
        for tensor in graphs._tensors(outputs):
            tensor.fill_(torch.nan)  # until it is replayed

        def replay():
            counts[index] += 1
            new = graphs._tensors(model(**inputs))
            for tensor, value in zip(graphs._tensors(outputs), new, strict=True):
                tensor.copy_(value)

        return outputs, replay

    monkeypatch.setattr(graphs, "record", record)
    return counts


def generate(model, ids, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None} | options
    return model.generate(ids, pad_token_id=0, **options)


def batch():
    """(ids, mask) of three prompts, pads in front."""
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = mask[1, :1] = 0
    return tiny_tokens(3, 9) * mask, mask


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_tokens_are_those_of_the_growing_cache(model, recorded, options):
    ids, mask = batch()
    if "num_return_sequences" in options:
        options = options | {"do_sample": True}
    torch.manual_seed(0)
    expected = generate(model, ids, attention_mask=mask, disable_compile=True, **options)
    assert not recorded
    torch.manual_seed(0)
    got = generate(model, ids, attention_mask=mask, **options)
    assert torch.equal(got, expected)
    # Not the prompt, nor the first step; transformers' beam search takes no compiled call.
    assert recorded == ([] if "num_beams" in options else [NEW - 2])


def test_one_graph_a_generate(model, recorded):
    for rows in (1, 3, 1):
        ids, mask = (t[:rows] for t in batch())
        generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    assert recorded == [NEW - 2] * 3


def test_what_is_returned_stays(model, recorded):
    """Of all steps, where a graph writes each over the last; and the cache."""
    options = {"output_logits": True, "return_dict_in_generate": True, "output_hidden_states": True}
    expected = generate(model, tiny_tokens(2, 7), disable_compile=True, **options)
    got = generate(model, tiny_tokens(2, 7), **options)
    assert len(got.logits) == NEW
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    steps = zip(got.hidden_states, expected.hidden_states, strict=True)
    assert all(torch.equal(a, b) for step in steps for a, b in zip(*step, strict=True))
    assert isinstance(got.past_key_values, StaticQuantKVCache)
    assert got.past_key_values.seq_lens == expected.past_key_values.seq_lens


def test_a_cache_has_the_room_of_its_own_call(model, recorded):
    lengths = [
        generate(
            model, tiny_tokens(1, columns), max_new_tokens=4, return_dict_in_generate=True
        ).past_key_values.table.max_length
        for columns in (150, 5)
    ]
    assert lengths[0] >= 150 + 3 and lengths[1] < 150


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, SmolLM3Config])
def test_a_mask_for_each_kind_of_layer(kind, monkeypatch, model, recorded):
    """transformers makes a new dict of them for every step."""
    model = lowbit.quantize(tiny_model(tiny_config(kind)), "rtn", "w8a8kv8", progress=False)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)
    ids, mask = batch()
    expected = generate(model, ids, attention_mask=mask, disable_compile=True)
    assert torch.equal(generate(model, ids, attention_mask=mask), expected)
    assert recorded == [NEW - 2]


@torch.no_grad()
def test_a_full_cache_is_an_error(model, recorded):
    cache = StaticQuantKVCache(model.config, model.lowbit_config.format.kv, max_length=6)
    forward, token = GraphedForward(model), tiny_tokens(1, 1)
    for _ in range(6):
        forward(input_ids=token, past_key_values=cache)
    assert recorded == [5]
    with pytest.raises(InputError, match="its capacity is 6 tokens a sequence, got 7"):
        forward(input_ids=token, past_key_values=cache)
    assert cache.seq_lens == [6]


def test_what_cannot_be_recorded_is_said_and_runs(model, monkeypatch):
    def record(model, inputs):
        inputs["past_key_values"].table.open = "half way"
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(graphs, "record", record)
    expected = generate(model, tiny_tokens(1, 5), disable_compile=True)
    with pytest.warns(UserWarning, match="launch by launch.*: operation not permitted$"):
        got = generate(model, tiny_tokens(1, 5))
    assert torch.equal(got, expected)


def test_callers_who_choose_are_left_alone(model, recorded):
    kept = {"max_new_tokens": 4}
    for options in (
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 2},
        {"disable_compile": True},
        {"generation_config": GenerationConfig(use_cache=False, **kept)},
    ):
        assert not wants_graphs(model, options.get("generation_config"), options)
        generate(model, tiny_tokens(1, 5), **options)
    _, mask = batch()
    generate(model, tiny_tokens(3, 9), attention_mask=mask.flip(1))  # pads behind
    assert not recorded
    assert wants_graphs(model, GenerationConfig(**kept), {})
    assert wants_graphs(model, None, {"use_cache": True, "past_key_values": None})


def test_a_sliding_window(monkeypatch, model, recorded):
    """transformers' masks of compiled steps are no others than those of prefill."""
    config = tiny_config(MistralConfig, sliding_window=6)
    windowed = lowbit.quantize(tiny_model(config), "rtn", "w8a8kv8", progress=False)
    monkeypatch.setattr(type(windowed), "_valid_auto_compile_criteria", lambda *args: True)
    ids, mask = batch()
    expected = generate(windowed, ids, attention_mask=mask, disable_compile=True)
    assert torch.equal(generate(windowed, ids, attention_mask=mask), expected)
    assert recorded == [NEW - 2]


def test_models_that_have_none(monkeypatch, model):
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    assert not wants_graphs(model, None, {})
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    without_kv = lowbit.quantize(tiny_model(model.config), "rtn", "w8a8", progress=False)
    assert not wants_graphs(without_kv, None, {})
    experts = tiny_model(tiny_config(MixtralConfig, num_local_experts=4, sliding_window=None))
    experts = lowbit.quantize(experts, "rtn", "w8a8kv8", progress=False)
    assert not wants_graphs(experts, None, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(experts, tiny_tokens(1, 5))
