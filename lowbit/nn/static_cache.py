"""StaticQuantKVCache: a QuantKVCache whose tensors keep their shapes and addresses.

What a forward does depends on no number of the host and on no size that grows, so that a decoding
step is compiled once and can be captured in a CUDA graph. Every row has pages for max_length tokens
from the first forward on, which sets the batch; how many tokens a row holds is a tensor, changed in
place. Pads stand in front of a row's tokens, as generate() has them: a pad has no slot, and its
query, which would come before the first token, sees nothing (lowbit/ops/kv_attention.py).
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lowbit.errors import InputError
from lowbit.formats import IntFormat
from lowbit.nn.kv_cache import PAGE_SIZE, QuantKVCache, QuantLayer
from lowbit.nn.page_table import Step
from lowbit.ops import KVPages

NEW_COLUMNS = -1  # as kv_offset of a mask: of it only the columns of this forward are wanted
NO_SLOT = -1


class StaticTable:
    """Row b's token t lies in page b * pages_per_row + t // page_size, for good.

    seen     int64 [B], tokens that each row holds
    columns  int64 [], pads included
    """

    def __init__(self, max_length: int, page_size: int):
        self.max_length, self.page_size = max_length, page_size
        self.pages_per_row = -(-max_length // page_size)
        self.is_allocated = False
        self.open: Step | None = None  # between the first layer of a forward and the last

    def allocate(self, batch: int, device: torch.device):
        """Tensors for a batch; a second call does nothing."""
        if self.is_allocated:
            if len(self.seen) != batch:
                raise InputError(
                    f"the static KV cache was made for a batch of {len(self.seen)}, got {batch}"
                )
            return
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        pages = torch.arange(batch * self.pages_per_row, dtype=torch.int32, device=device)
        self.block_table = pages.view(batch, self.pages_per_row)
        self.is_allocated = True
        keep_addresses(self.seen, self.columns, self.block_table)

    @property
    def num_pages(self) -> int:
        return self.block_table.numel()

    def step(self, batch: int, columns: int, mask: Tensor | None, device: torch.device) -> Step:
        """The Step of `columns` new columns; mask [B, n >= columns], the last ones are the new."""
        self.allocate(batch, device)
        is_token = _is_token(mask, batch, columns, device)
        self._check_room(is_token)
        index = is_token.cumsum(1) - 1 + self.seen[:, None]  # of a pad: that of the token before
        page = self.block_table.long().gather(1, index.clamp(min=0) // self.page_size)
        slot = page * self.page_size + index % self.page_size
        cached_lens = self.seen.to(torch.int32)
        self.seen.add_(is_token.sum(1))
        self.columns.add_(columns)
        return Step(
            tokens=None,
            slot=torch.where(is_token, slot, NO_SLOT).flatten(),
            block_table=self.block_table,
            seq_lens=self.seen.to(torch.int32),
            query_start=torch.arange(batch + 1, dtype=torch.int32, device=device) * columns,
            cached_lens=cached_lens,
        )

    def _check_room(self, is_token: Tensor):
        """In a compiled or captured forward nothing may ask the device; there the gather of a page
        that does not exist stops it."""
        device = self.seen.device
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or captured or device.type == "meta":
            return
        total = int((self.seen + is_token.sum(1)).max())
        if total > self.max_length:
            raise InputError(
                f"prompt longer than the KV cache: its capacity is {self.max_length} tokens a "
                f"sequence, got {total}"
            )
        if is_token.shape[1] > 1 and bool((is_token[:, 1:] < is_token[:, :-1]).any()):
            raise InputError(
                "a static KV cache takes pads in front of a row's tokens (padding_side='left'), "
                "got an attention_mask with pads behind them"
            )

    def crop(self, removed: int):
        if self.is_allocated:
            self.seen.sub_(removed).clamp_(min=0)
            self.columns.sub_(removed).clamp_(min=0)

    def clear(self):
        self.open = None
        if self.is_allocated:
            self.seen.zero_()
            self.columns.zero_()


class StaticQuantLayer(QuantLayer):
    """A layer's pages, all of them from the first forward on."""

    is_compileable = True

    def get_seq_length(self) -> Tensor | int:
        return self.table.columns if self.table.is_allocated else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, NEW_COLUMNS

    def _allocated(self, num_pages: int, device: torch.device) -> KVPages:
        pages = super()._allocated(num_pages, device)
        keep_addresses(*pages.tensors)
        return pages

    def reset(self):
        """The pages stay: what they hold is not read again."""


class StaticQuantKVCache(QuantKVCache):
    """As QuantKVCache, of at most max_length tokens a row and one batch size.

    For generate(past_key_values=...); reset() makes it fit for the next prompts.
    """

    layer_class, table_class = StaticQuantLayer, StaticTable

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        kv: IntFormat | None = None,
        *,
        max_length: int | None = None,
        page_size: int = PAGE_SIZE,
    ):
        super().__init__(config, kv, max_length=max_length, page_size=page_size)

    def step(
        self,
        layer_idx: int,
        batch: int,
        columns: int,
        mask: Tensor | None,
        device: torch.device,
        num_kv_heads: int | None = None,
    ) -> tuple[Step, KVPages]:
        """The first layer opens a step, the others take it and the last one closes it: nothing of
        a forward is left on the host, where it would be a number that changes."""
        table, layer = self.table, self._of_heads(layer_idx, num_kv_heads)
        if layer_idx == 0:
            table.open = table.step(batch, columns, mask, device)
        step = table.open
        if step is None:
            raise InputError("a static KV cache is filled by whole forwards, the first layer first")
        if step.slot.device != device:
            step = step.to(device)
        table.open = None if layer_idx == len(self.layers) - 1 else step
        layer.reserve(table.num_pages, device)
        return step, layer.pages

    @property
    def is_whole(self) -> bool:
        return self.table.open is None

    @property
    def batch_size(self) -> int:
        return len(self.table.seen) if self.table.is_allocated else -1

    @property
    def seq_lens(self) -> list[int]:
        return self.table.seen.tolist() if self.table.is_allocated else []

    def crop(self, tokens_to_remove: int):
        """As QuantKVCache.crop."""
        keep = int(tokens_to_remove)
        self.table.crop(-keep if keep <= 0 else max(int(self.get_seq_length()) - keep, 0))

    def _select(self, rows: list[int]):
        """Rows change places, copied into place: beam search. Their number stays."""
        if not self.table.is_allocated:
            return
        if len(rows) != self.batch_size:
            raise InputError(
                f"the static KV cache was made for a batch of {self.batch_size}, got {len(rows)}"
            )
        self.table.seen.copy_(self.table.seen[rows])
        for layer in self.layers:
            for tensor in () if layer.pages is None else layer.pages.tensors:
                by_row = tensor.unflatten(0, (len(rows), -1))
                by_row.copy_(by_row[rows])


def keep_addresses(*tensors: Tensor):
    """A compiled forward may change them in place inside a CUDA graph."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def _is_token(mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    """bool [batch, columns] of the new columns."""
    if mask is None:
        return torch.ones(batch, columns, dtype=torch.bool, device=device)
    if mask.shape[0] != batch or mask.shape[1] < columns:
        raise InputError(
            f"attention_mask must have shape [{batch}, n], n at least {columns}, got "
            f"{tuple(mask.shape)}"
        )
    return mask[:, mask.shape[1] - columns :].bool()
