"""Perplexity over non-overlapping windows, the protocol of the GPTQ tables.

The tokens of a whole text are cut into windows of W; the remainder is dropped. Every window is one
forward without history, and predicts its own tokens 1 .. W-1:

    nll[i]     = mean over t of -log p(token[t+1] | token[0..t])     of window i
    perplexity = exp(mean over i of nll[i])

With prefill_chunk a window is computed so many tokens at a time, over the cache of those before.
Its level depends on which windows are taken: compare only results on the same ones, and read
differences against paired_standard_error.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache

from lowbit.errors import InputError
from lowbit.evaluate.text import check_token_ids

WINDOW = 2048
LOGITS_CHUNK = 256  # tokens whose logits exist at once: 256 x 128k fp32 are 131 MB

# Configurations under which logits are more than lm_head(hidden): take the whole forward there.
LOGIT_MAPS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Perplexity:
    """`window_nll` in nats per token; `tokens` counts the predicted ones."""

    perplexity: float
    window_nll: list[float]
    window: int
    tokens: int

    @property
    def standard_error(self) -> float:
        """Of the perplexity, over windows (to first order); nan with one window."""
        return self.perplexity * _standard_error(self.window_nll)


def windows(token_ids: Tensor, window: int = WINDOW, limit: int | None = None) -> Tensor:
    """[n, window]: all windows of the text, or `limit` of them spread evenly over it."""
    if window < 2:
        raise InputError(f"window must be at least 2 tokens, got {window}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 window, got {limit}")
    n = len(token_ids) // window
    if n == 0:
        raise InputError(
            f"text shorter than one window: expected at least {window} tokens, got {len(token_ids)}"
        )
    every = torch.as_tensor(token_ids)[: n * window].view(n, window)
    if limit is None or limit >= n:
        return every
    return every[torch.tensor([i * n // limit for i in range(limit)])]


@torch.inference_mode()
def perplexity(
    model,
    token_ids: Tensor,
    window: int = WINDOW,
    limit: int | None = None,
    progress: str | None = None,
    prefill_chunk: int | None = None,
) -> Perplexity:
    """Perplexity of a transformers causal LM; `progress` labels a bar on stderr (None: no bar)."""
    rows = windows(token_ids, window, limit)
    check_token_ids(rows, model.get_input_embeddings().num_embeddings, "token_ids")
    rows = rows.to(model.device)
    found = []
    with tqdm(rows, desc=progress, unit="window", disable=progress is None) as bar:
        for row in bar:
            total = nll(model, row, row[1:], prefill_chunk=prefill_chunk)
            found.append(total / (len(row) - 1))
            bar.set_postfix(ppl=f"{_exp_mean(found):.3f}")
    return Perplexity(_exp_mean(found), found, window, len(rows) * (window - 1))


def paired_standard_error(a: Perplexity, b: Perplexity) -> float:
    """Of log(a.perplexity / b.perplexity), from the differences window by window."""
    if len(a.window_nll) != len(b.window_nll) or a.window != b.window:
        raise InputError(
            "paired results must be on the same windows, got "
            f"{len(a.window_nll)} of {a.window} and {len(b.window_nll)} of {b.window}"
        )
    return _standard_error([x - y for x, y in zip(a.window_nll, b.window_nll, strict=True)])


def nll(
    model, tokens: Tensor, targets: Tensor, start: int = 0, prefill_chunk: int | None = None
) -> float:
    """Sum of -log p(targets[i] | tokens[: start + i + 1]) over all i; one forward of tokens [n], or
    one for each prefill_chunk of them."""
    check_prefill_chunk(prefill_chunk)
    if any(getattr(model.config, name, None) is not None for name in LOGIT_MAPS):
        run, output, head = model, "logits", torch.nn.Identity()
    else:
        run, output, head = model.base_model, "last_hidden_state", model.get_output_embeddings()
    cache = {"use_cache": False}
    if prefill_chunk is not None:
        cache = {"past_key_values": DynamicCache(config=model.config)}
    pieces = tokens[None].split(prefill_chunk or len(tokens), 1)
    found = [run(piece, **cache)[output][0] for piece in pieces]
    logits = found[0] if len(found) == 1 else torch.cat(found)
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    logits = logits[start : start + len(targets)]
    chunks = zip(logits.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
    for chunk, target in chunks:
        loss = F.cross_entropy(head(chunk).float(), target, reduction="none")
        total += loss.double().sum()  # fp64: the sum does not depend on the chunk size
    return total.item()


def check_prefill_chunk(prefill_chunk: int | None):
    if prefill_chunk is not None and prefill_chunk < 1:
        raise InputError(f"prefill_chunk must be at least 1 token, got {prefill_chunk}")


def _exp_mean(nlls: list[float]) -> float:
    mean = math.fsum(nlls) / len(nlls)
    return math.inf if mean > 700 else math.exp(mean)  # exp overflows; nan stays nan


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
