"""PageTable: which pages of a cache the tokens of each row lie in.

Two lengths live side by side. transformers counts columns: the padded length, one for the whole
batch. The cache stores tokens: row b holds the valid ones of its columns, so pads take no memory
and no attention. One table serves all layers: it turns columns into slots once per forward.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lowbit.errors import InputError


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward go, and what they attend to.

    tokens       int64 [T], the valid ones of the B * columns new positions; None: all of them
    slot         int64 [T], page * page_size + offset
    block_table  int32 [B, P]
    seq_lens     int32 [B], tokens of a row, the new ones included
    query_start  int32 [B + 1]
    cached_lens  int32 [B], tokens of a row without the new ones
    """

    tokens: Tensor | None
    slot: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    cached_lens: Tensor

    def to(self, device: torch.device) -> "Step":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Step(**{name: t if t is None else t.to(device) for name, t in moved.items()})


class PageTable:
    """Which pages a row's tokens lie in; a page may be shared, but never the one written next."""

    def __init__(self, max_length: int, page_size: int):
        self.max_length, self.page_size = max_length, page_size
        self.clear()

    def clear(self):
        self.length = 0  # columns, pads included
        self.counts: list[int] = []  # tokens of each row
        self.valid: Tensor | None = None  # bool [B, length]; None: no column holds a pad
        self.block_table = torch.zeros(0, 1, dtype=torch.int32)  # on the CPU
        self.references: list[int] = []  # rows that hold each page
        self.free: list[int] = []  # pages no row holds
        self._step: tuple[int, int, Step] | None = None

    @property
    def num_pages(self) -> int:
        return len(self.references)

    def step(self, start: int, batch: int, columns: int, mask: Tensor | None, device) -> Step:
        """The Step of columns start .. start + columns; the first layer to get there appends them.

        mask [B, start + columns], true where a column holds a token; None: all do.
        """
        end = start + columns
        if self._step is not None and self._step[:2] == (start, end):
            step = self._step[2]
            if step.slot.device != device:  # layers on several devices: once for each stretch
                step = step.to(device)
                self._step = (start, end, step)
            return step
        if end > self.length:
            self._append(batch, end, mask)
        new = None if self.valid is None else self.valid[:, start:end]
        if new is None:
            tokens = None
            position = torch.arange(start, end, device=device).expand(batch, columns)
            seq_lens = torch.full((batch,), end, device=device)
            counts = torch.full((batch,), columns, device=device)
        else:
            tokens = None if bool(new.all()) else new.flatten().nonzero().squeeze(1)
            position = self.valid.cumsum(1)[:, start:end] - 1  # -1 in front of the first token
            seq_lens = self.valid[:, :end].sum(1)
            counts = new.sum(1)
        block_table = self.block_table.to(device)
        page = block_table.long().gather(1, position.clamp(min=0) // self.page_size)
        slot = (page * self.page_size + position % self.page_size).flatten()
        step = Step(
            tokens=tokens,
            slot=slot if tokens is None else slot[tokens],
            block_table=block_table,
            seq_lens=seq_lens.to(torch.int32),
            query_start=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
            cached_lens=(seq_lens - counts).to(torch.int32),
        )
        self._step = (start, end, step)
        return step

    def _append(self, batch: int, end: int, mask: Tensor | None):
        """Room for columns length .. end. Everything is checked before anything changes."""
        counts = self.counts or [0] * batch
        if len(counts) != batch:
            raise InputError(f"the KV cache holds a batch of {len(counts)}, got {batch} rows")
        columns = end - self.length
        valid, added = self.valid, [columns] * batch
        if mask is not None or valid is not None:
            new = self._new_columns(batch, end, mask)
            if valid is not None or not bool(new.all()):
                if valid is None:
                    valid = new.new_ones(batch, self.length)
                valid, added = torch.cat((valid, new), 1), new.sum(1).tolist()
        totals = [count + more for count, more in zip(counts, added, strict=True)]
        if max(totals) > self.max_length:
            row = totals.index(max(totals))
            got = f"{counts[row]} cached and {added[row]} new" if counts[row] else added[row]
            raise InputError(
                f"prompt longer than the KV cache: its capacity is {self.max_length} tokens a "
                f"sequence, got {got}"
            )
        if not self.counts:
            self.block_table = torch.zeros(batch, 1, dtype=torch.int32)
        for row, (old, total) in enumerate(zip(counts, totals, strict=True)):
            for column in range(self._pages(old), self._pages(total)):
                self._put(row, column, self._allocate())
        self.counts, self.valid, self.length, self._step = totals, valid, end, None

    def _new_columns(self, batch: int, end: int, mask: Tensor | None) -> Tensor:
        """mask's columns length .. end, after a check that the others are as they were stored."""
        shape = None if mask is None else tuple(mask.shape)
        if shape != (batch, end):
            raise InputError(
                f"attention_mask must have shape {(batch, end)}, the {self.length} cached columns "
                f"and the {end - self.length} new ones, got {shape}"
            )
        mask = mask.bool()
        stored = mask[:, : self.length]
        if not bool(stored.all() if self.valid is None else torch.equal(stored, self.valid)):
            raise InputError(
                "attention_mask must keep the cached tokens as they were when they were stored"
            )
        return mask[:, self.length :]

    def crop(self, columns: int) -> tuple[list[int], list[int]]:
        """Forget the last `columns` columns; returns what _share does."""
        columns = min(columns, self.length)
        if self.valid is None:
            removed = [columns] * len(self.counts)
        else:
            self.valid, dropped = self.valid.split((self.length - columns, columns), 1)
            removed = dropped.sum(1).tolist()
        self.length -= columns
        self.counts = [count - less for count, less in zip(self.counts, removed, strict=True)]
        return self._share()

    def select(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Row i becomes what row rows[i] was; returns what _share does."""
        self.block_table = self.block_table[rows]
        self.counts = [self.counts[row] for row in rows]
        if self.valid is not None:
            self.valid = self.valid[rows]
        return self._share()

    def _share(self) -> tuple[list[int], list[int]]:
        """Count references anew, and give each row its own copy of a shared page that is not full.

        Returns the pages to copy and the pages to copy them to.
        """
        self._step = None
        self.references = [0] * self.num_pages
        for row, count in enumerate(self.counts):
            for page in self.block_table[row, : self._pages(count)].tolist():
                self.references[page] += 1
        self.free = [page for page, rows in enumerate(self.references) if not rows]
        sources, targets = [], []
        for row, count in enumerate(self.counts):
            column = count // self.page_size
            if count % self.page_size == 0:
                continue
            page = int(self.block_table[row, column])
            if self.references[page] > 1:
                self.references[page] -= 1
                sources.append(page)
                targets.append(self._allocate())
                self._put(row, column, targets[-1])
        return sources, targets

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _allocate(self) -> int:
        if not self.free:
            self.free.append(self.num_pages)
            self.references.append(0)
        page = self.free.pop()
        self.references[page] = 1
        return page

    def _put(self, row: int, column: int, page: int):
        missing = column + 1 - self.block_table.shape[1]
        if missing > 0:
            self.block_table = torch.nn.functional.pad(self.block_table, (0, missing))
        self.block_table[row, column] = page
