"""Word perplexity: a text's whole log-likelihood over its number of words, as lm-eval measures it.

    perplexity = exp(-sum over all tokens of log p(token | what stands before it) / words)

No token is left out: the first is predicted from the tokenizer's own first token (BOS, else EOS),
and where a window of W tokens ends the next goes on from its last token. The last window reaches
back so far that it is whole. Words are what white space separates.

It does not depend on the tokenizer, so models of different vocabularies can be compared. lm-eval's
task `wikitext` is this for every page of WikiText-2 by itself, its spaces round punctuation taken
out: that figure is what `lowbit eval --tasks wikitext` gives.
"""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from lowbit.errors import InputError
from lowbit.evaluate.perplexity import WINDOW, nll
from lowbit.evaluate.text import check_token_ids


def rolling(tokens: Tensor, first: int, window: int = WINDOW) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs [w], targets [n]), w <= window, the last n inputs each predicting its target."""
    inputs = torch.cat([tokens.new_tensor([first]), tokens[:-1]])
    for start in range(0, len(tokens), window):
        end = min(start + window, len(tokens))
        yield inputs[max(0, end - window) : end], tokens[start:end]


@torch.inference_mode()
def word_perplexity(
    model,
    tokenizer,
    text: str,
    window: int = WINDOW,
    progress: str | None = None,
    prefill_chunk: int | None = None,
) -> float:
    """Of a transformers causal LM on a text taken as one; the last two as of perplexity()."""
    if window < 1:
        raise InputError(f"window must be at least 1 token, got {window}")
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    words = len(re.split(r"\s+", text))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise InputError("word perplexity needs a tokenizer with a BOS or EOS token, got neither")
    check_token_ids(tokens, model.get_input_embeddings().num_embeddings, "text")
    pairs = list(rolling(tokens, first, window))
    total = 0.0
    for inputs, targets in tqdm(pairs, progress, unit="window", disable=progress is None):
        start = len(inputs) - len(targets)
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        total += nll(model, inputs, targets, start, prefill_chunk)
    mean = total / words
    return math.inf if mean > 700 else math.exp(mean)  # exp overflows; nan stays nan
