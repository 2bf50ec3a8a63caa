import math

import pytest
import torch
from models import VOCABULARY, tiny_llama

from lowbit.errors import InputError
from lowbit.evaluate.perplexity import (
    LOGITS_CHUNK,
    Perplexity,
    paired_standard_error,
    perplexity,
    windows,
)


def ids(n: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n))


def test_windows_do_not_overlap_and_drop_the_remainder():
    got = windows(torch.arange(35), 10)
    assert torch.equal(got, torch.arange(30).view(3, 10))


@pytest.mark.parametrize(
    "limit, expected", [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (7, range(7)), (9, range(7))]
)
def test_limit_takes_windows_spread_evenly(limit, expected):
    got = windows(torch.arange(70), 10, limit)
    assert got[:, 0].tolist() == [10 * i for i in expected]


@pytest.mark.parametrize("n", [0, 9])
def test_text_shorter_than_one_window(n):
    message = f"text shorter than one window: expected at least 10 tokens, got {n}"
    with pytest.raises(InputError, match=message):
        windows(torch.arange(n), 10)


@pytest.mark.parametrize("window, limit, name", [(1, None, "window"), (10, 0, "limit")])
def test_arguments_out_of_range(window, limit, name):
    with pytest.raises(InputError, match=f"{name} must be at least"):
        windows(torch.arange(100), window, limit)


# A window shorter than a chunk of logits, one that is a whole number of chunks, one past it.
@pytest.mark.parametrize("window", [17, LOGITS_CHUNK + 1, LOGITS_CHUNK + 2])
def test_equals_transformers_own_loss(window):
    model = tiny_llama()
    tokens = ids(3 * window + 5)
    got = perplexity(model, tokens, window)
    expected = [model(row[None], labels=row[None]).loss.item() for row in windows(tokens, window)]
    assert got.window_nll == pytest.approx(expected, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    assert got.tokens == 3 * (window - 1)


@pytest.mark.parametrize("chunk", [1, 64, 80])
def test_windows_in_pieces(chunk):
    model, tokens = tiny_llama(), ids(160)
    expected = perplexity(model, tokens, 80).window_nll
    for capping in (None, 30.0):  # hidden states, or the whole forward
        model.config.final_logit_softcapping = capping
        got = perplexity(model, tokens, 80, prefill_chunk=chunk).window_nll
        assert got == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="prefill_chunk must be at least 1 token, got 0"):
        perplexity(model, tokens, 80, prefill_chunk=0)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, ids(64), 32).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_logits_that_are_more_than_the_head():
    model = tiny_llama()
    plain = perplexity(model, ids(64), 32)
    model.config.final_logit_softcapping = None
    assert perplexity(model, ids(64), 32) == plain
    model.config.final_logit_softcapping = 30.0  # Llama ignores it: the whole forward, same result
    assert perplexity(model, ids(64), 32).window_nll == pytest.approx(plain.window_nll, rel=1e-6)


def test_nan_stays_nan_and_overflow_is_inf():
    model = tiny_llama()
    model.lm_head.weight.data.fill_(math.nan)
    assert math.isnan(perplexity(model, ids(64), 32).perplexity)
    model.lm_head.weight.data.normal_(0, 1e4)
    assert perplexity(model, ids(64), 32).perplexity == math.inf


def test_standard_errors():
    a = Perplexity(math.exp(2.0), [1.0, 2.0, 3.0], 32, 93)
    b = Perplexity(math.exp(2.5), [1.5, 2.5, 3.5], 32, 93)
    assert a.standard_error == pytest.approx(a.perplexity / math.sqrt(3))
    assert paired_standard_error(a, b) == 0.0  # every window differs by the same
    c = Perplexity(math.exp(2.0), [2.0, 2.0, 2.0], 32, 93)
    assert paired_standard_error(a, c) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(Perplexity(1.0, [0.0], 32, 31).standard_error)


def test_paired_results_must_share_windows():
    a = Perplexity(1.0, [0.0, 0.0], 32, 62)
    for b in (Perplexity(1.0, [0.0], 32, 31), Perplexity(1.0, [0.0, 0.0], 16, 30)):
        with pytest.raises(InputError, match="must be on the same windows"):
            paired_standard_error(a, b)


def test_progress_goes_to_stderr(capsys):
    perplexity(tiny_llama(), ids(64), 32, progress="tiny")
    out, err = capsys.readouterr()
    assert out == "" and "tiny" in err and "ppl=" in err
    perplexity(tiny_llama(), ids(64), 32)
    assert capsys.readouterr() == ("", "")
