"""Tokens a second of a model as it is: one prompt read, then new tokens one at a time."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError


@dataclass(frozen=True)
class Speed:
    """prefill, decode: tokens a second, of `prompt` tokens and of `new`; batch 1, greedy."""

    prefill: float
    decode: float
    prompt: int
    new: int
    hardware: str


START = 4  # tokens: more than the steps that differ from all others


@torch.inference_mode()
def speed(model, tokens: Tensor, new: int) -> Speed:
    """Of a transformers causal LM on a prompt int64 [n]; each run once, after one to warm up.

    Decoding is the time of START + new tokens less that of START: prefill is in both, and the
    first steps, of which a GPU runs one as it is and records one (lowbit/nn/graphs.py).
    """
    most = model.config.max_position_embeddings
    room = most - new - START
    if new < 1 or not 1 <= len(tokens) <= room:
        raise InputError(
            f"speed needs at least 1 new token and a prompt of 1 to {room} tokens, the model's "
            f"{most} less {new + START}, got {new} and {len(tokens)}"
        )
    prompt = tokens[None].to(model.device)
    _seconds(model, prompt, START)
    one, few = _seconds(model, prompt, 1), _seconds(model, prompt, START)
    all_of_them = _seconds(model, prompt, START + new)
    cuda = model.device.type == "cuda"
    hardware = torch.cuda.get_device_name(model.device) if cuda else _cpu()
    decode = new / max(all_of_them - few, 1e-9)
    return Speed(len(tokens) / one, decode, len(tokens), new, hardware)


def _seconds(model, prompt: Tensor, new: int) -> float:
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _cpu() -> str:
    return f"CPU, {torch.get_num_threads()} threads"
