"""QuantKVCache: a paged, quantized KV cache that is a transformers Cache.

Lengths in transformers' interface are columns, pads included; tokens, pages and rows are those of
lowbit/nn/page_table.py.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from lowbit.errors import InputError
from lowbit.formats import IntFormat
from lowbit.nn.page_table import PageTable, Step
from lowbit.ops import KVPages

PAGE_SIZE = 64
GROWTH = 1.25  # of a full pool: copies stay linear in the length, slack below a quarter


class QuantLayer(CacheLayerMixin):
    """One layer's pool of pages. Rows, pages and lengths are the cache's: it alone changes them."""

    supports_early_init = False
    is_croppable = True

    def __init__(self, kv: IntFormat, num_kv_heads: int, head_dim: int, table: PageTable):
        super().__init__()
        self.kv, self.num_kv_heads, self.head_dim, self.table = kv, num_kv_heads, head_dim, table
        self.length = 0  # columns this layer has stored
        self.pages: KVPages | None = None

    def reserve(self, num_pages: int, device: torch.device):
        """At least num_pages pages, those in use unchanged."""
        old = self.pages
        if old is None:
            self.pages = self._allocated(num_pages, device)
            self.is_initialized = True
        elif old.num_pages < num_pages:
            self.pages = self._allocated(max(num_pages, int(GROWTH * old.num_pages)), device)
            for tensor, before in zip(self.pages.tensors, old.tensors, strict=True):
                tensor[: old.num_pages] = before

    def _allocated(self, num_pages: int, device: torch.device) -> KVPages:
        shape = (num_pages, self.table.page_size, self.num_kv_heads, self.head_dim)
        return KVPages.allocate(*shape, self.kv.bits, device)

    def copy(self, sources: list[int], targets: list[int]):
        if sources and self.pages is not None:
            self.reserve(self.table.num_pages, self.pages.k_codes.device)
            for tensor in self.pages.tensors:
                tensor[targets] = tensor[sources]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.table.max_length

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in earlier transformers 5 releases."""
        return self.table.max_length

    def reset(self):
        self.length, self.pages, self.is_initialized = 0, None, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor):
        raise NotImplementedError("a QuantKVCache is filled by QuantAttention alone")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise NotImplementedError(
            "a QuantKVCache holds codes that only QuantAttention reads: this model's attention "
            "must be swapped (lowbit.nn.swap), or it needs another cache"
        )


class QuantKVCache(Cache):
    """A KV cache of `kv` codes, one paged pool per layer, of at most max_length tokens a row.

    The sizes come from `config` where they are not given; max_length is max_position_embeddings.
    """

    layer_class, table_class = QuantLayer, PageTable

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        kv: IntFormat | None = None,
        *,
        num_layers: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        max_length: int | None = None,
        page_size: int = PAGE_SIZE,
    ):
        if kv is None:
            raise InputError("QuantKVCache needs kv, the model's lowbit_config.format.kv")
        if config is not None:
            config = config.get_text_config(decoder=True)
            num_layers = num_layers or config.num_hidden_layers
            num_kv_heads = num_kv_heads or config.num_key_value_heads
            head_dim = head_dim or getattr(config, "head_dim", None)
            head_dim = head_dim or config.hidden_size // config.num_attention_heads
            max_length = max_length or config.max_position_embeddings
        if None in (num_layers, num_kv_heads, head_dim, max_length):
            raise InputError(
                "QuantKVCache needs a config, or num_layers, num_kv_heads, head_dim and max_length"
            )
        self.kv = kv
        self.table = self.table_class(max_length, page_size)
        layers = (
            self.layer_class(kv, num_kv_heads, head_dim, self.table) for _ in range(num_layers)
        )
        super().__init__(layers=list(layers))

    def step(
        self,
        layer_idx: int,
        batch: int,
        columns: int,
        mask: Tensor | None,
        device: torch.device,
        num_kv_heads: int | None = None,
    ) -> tuple[Step, KVPages]:
        """Room for `columns` new columns in one layer: where they go, and the pages they go to.

        num_kv_heads  of who asks: a rank has fewer than the model; None: the model's"""
        layer = self._of_heads(layer_idx, num_kv_heads)
        step = self.table.step(layer.length, batch, columns, mask, device)
        layer.reserve(self.table.num_pages, device)
        layer.length += columns
        return step, layer.pages

    def _of_heads(self, layer_idx: int, num_kv_heads: int | None) -> QuantLayer:
        layer = self.layers[layer_idx]
        layer.num_kv_heads = num_kv_heads or layer.num_kv_heads
        return layer

    @property
    def is_whole(self) -> bool:
        """Every layer holds the same columns; false after a forward that was interrupted."""
        return len({layer.length for layer in self.layers}) == 1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.table.max_length

    @property
    def batch_size(self) -> int:
        return len(self.table.counts) or -1

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of each row, pads not counted."""
        return list(self.table.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, pages not in use included."""
        return sum(layer.pages.nbytes for layer in self.layers if layer.pages is not None)

    def reset(self):
        self.table.clear()
        super().reset()

    def crop(self, tokens_to_remove: int):
        """Forget the last -tokens_to_remove columns; a positive number is the length to keep, as
        transformers had it before 5.18."""
        keep = int(tokens_to_remove)
        removed = -keep if keep <= 0 else max(self.table.length - keep, 0)
        copies = self.table.crop(removed)
        for layer in self.layers:
            layer.length = min(layer.length, self.table.length)
            layer.copy(*copies)

    def reorder_cache(self, beam_idx: Tensor):
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int):
        self._select([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor):
        self._select(torch.arange(max(self.batch_size, 0))[indices.cpu()].tolist())

    def _select(self, rows: list[int]):
        if self.batch_size < 0:
            return
        copies = self.table.select(rows)
        for layer in self.layers:
            layer.copy(*copies)
