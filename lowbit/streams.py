"""Streams: the calibration activations that enter a block, and what its modules see of them.

Two of them, each kept only for who needs it, both fp32 and in the same batches:

    rounded  from the blocks before as they were rounded: what the block will meet when it runs
    full     from the blocks before in full precision: what it would have met

They lie on the model's device where they take a small part of a GPU's memory, else in that of the
CPU, and go through the block in pieces; the bits are the same. Where several processes calibrate,
each has a share of the windows (lowbit/parallel.py).
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask

from lowbit import parallel
from lowbit.errors import InputError
from lowbit.models import Adapter
from lowbit.models.spaces import window_of

TOKENS_AT_ONCE = 2048  # calibration tokens in one forward of a block
SHARE_OF_GPU = 0.25  # of its memory, that two streams may take


class _StopForward(Exception):
    """Raised by a hook once the input it was waiting for has been seen."""


class Stream:
    """Activations entering the current block, a list of fp32 [batch, length, hidden]: this
    process's of the windows, int64 [samples, length]."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, windows: Tensor):
        parallel.check_windows(len(windows))
        self.adapter = adapter
        embed = model.get_input_embeddings()
        self.windows, self.length = windows.shape
        self.batch = max(1, TOKENS_AT_ONCE // self.length)
        own = windows[parallel.own()].to(model.device)
        self.device = model.device
        self.place = place_for(own.numel() * embed.embedding_dim * 4, self.device)
        entering = (embed(part).float() * adapter.embedding_scale for part in own.split(self.batch))
        self.hidden = [self.put_by(hidden) for hidden in entering]
        positions = torch.arange(windows.shape[1], device=model.device)[None]
        rotary, first = model.get_submodule(adapter.rotary_path), embed(own[:1]).float()
        angles = rotary(first, position_ids=positions)
        self._call = {"position_embeddings": angles, "attention_mask": None}
        self._window_mask = None  # for blocks whose sliding window is shorter than these windows
        if 0 < (getattr(model.config, "sliding_window", None) or 0) < self.length:
            self._window_mask = create_sliding_window_causal_mask(
                config=model.config, inputs_embeds=first, attention_mask=None, past_key_values=None
            )

    def fork(self) -> "Stream":
        """The same activations, to go other ways from here."""
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other

    def head(self, tokens: int) -> "Stream":
        """Of the first windows, at least so many tokens; all where there are fewer. A process may
        have none of them."""
        windows = -(-tokens // self.length)
        left = len(range(min(self.windows, windows))[parallel.own()])
        other = copy.copy(self)
        other.hidden = []
        for piece in self.hidden:
            if left > 0:
                other.hidden.append(piece[:left])
                left -= len(piece)
        return other

    @property
    def tokens(self) -> int:
        """Of all processes."""
        return self.windows * self.length

    def forward(
        self, block: nn.Module, hidden: Tensor, tensors: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The block's output, on the model's device, `tensors` in place of its own of these names.
        `hidden` may lie anywhere."""
        call = self._call
        if self._window_mask is not None and window_of(block.get_submodule(self.adapter.attention)):
            call = {**call, "attention_mask": self._window_mask}
        return functional_call(block, tensors or {}, (hidden.to(self.device),), call)

    def put_by(self, hidden: Tensor) -> Tensor:
        """`hidden` where this stream's activations lie."""
        return hidden.to(self.place)

    def entering(
        self, block: nn.Module, name: str, routes: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[tuple, dict] | None]:
        """(args, kwargs) of the module `name` of the block, batch by batch; forwards end there.

        Of experts only the one that `name` is in runs, on the tokens that routes(), of this stream
        or another, send it; None where a batch has none of them.
        """
        seen = []

        def keep(_module, args, kwargs):
            seen.append((args, kwargs))
            raise _StopForward

        handles = [block.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)]
        expert = self.adapter.expert_of(name)
        if expert is not None:
            given = iter(routes or ())

            def only(_module, args):
                hidden, index, weights = args
                index = next(given, index)
                return hidden, index.where(index == expert, -1), weights

            experts = block.get_submodule(self.adapter.mlp)
            handles.append(experts.register_forward_pre_hook(only))
        try:
            for hidden in self.hidden:
                with contextlib.suppress(_StopForward):
                    self.forward(block, hidden)
                yield seen.pop() if seen else None
        finally:
            for handle in handles:
                handle.remove()

    def inputs(
        self, block: nn.Module, name: str, routes: Sequence[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """What the linear `name` of the block reads, [tokens, K], batch by batch; of an expert's
        there may be no tokens."""
        for call in self.entering(block, name, routes):
            if call is None:
                yield torch.empty(0, block.get_submodule(name).in_features, device=self.device)
            else:
                yield call[0][0].flatten(0, -2)

    def routes(self, block: nn.Module) -> list[Tensor]:
        """The experts that the block's router chooses, int64 [tokens, top_k], batch by batch."""
        return [args[1] for args, _ in self.entering(block, self.adapter.mlp)]

    def expert_tokens(self, block: nn.Module) -> list[int]:
        """How many tokens of all processes the router sends to each of the block's experts."""
        experts = self.adapter.experts
        counts = sum(r.flatten().bincount(minlength=experts) for r in self.routes(block))
        return parallel.sum_(counts).tolist()

    def advance(self, block: nn.Module):
        """From the block's input to its output, in place: never two blocks' activations."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = self.put_by(self.forward(block, hidden))


def place_for(size: int, device: torch.device) -> torch.device:
    """Where a stream of `size` bytes lies, of a model on `device`."""
    if device.type != "cuda":
        return device
    memory = torch.cuda.get_device_properties(device).total_memory
    return device if 2 * size <= SHARE_OF_GPU * memory else torch.device("cpu")


def check_finite(where: str, *statistics: Tensor):
    """Refuse what calibration activations made NaN or inf in any process: all of them raise."""
    finite = all(bool(tensor.isfinite().all()) for tensor in statistics)
    if parallel.total(not finite):
        raise InputError(f"calibration activations must be finite, got NaN or inf {where}")
