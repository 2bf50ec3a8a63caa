"""What a decoding step launches and moves, counted from the ops' contracts: needs no GPU.

    python -m benchmarks.traffic --shapes llama3-8b --format w4a4kv4 --batch 1 64 --context 8192

One decoder layer of the shape, fused as `lowbit.load` fuses it, on the meta device: every op that
is not a view of its input is a launch (attention split over keys is two, and counts as one here),
and its tensors are read or written once. Of the cache kv_append moves the new tokens, attention all
that the rows hold. Beside it the floor, of any implementation: packed weights, the cache read and
the new token written, the hidden state in and out; and what bf16 would move at least, whose ratio
to ours bounds the speed-up where memory is what limits both.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import tensors
from benchmarks.inputs import cache_bytes
from benchmarks.shapes import MODELS, Model, model_named
from benchmarks.whole_models import DTYPE, config_of, packed_on_meta
from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.nn import StaticQuantKVCache, fuse


@dataclass(frozen=True)
class Traffic:
    """Of one layer and one token of each row, in bytes but for `launches`."""

    launches: tuple[str, ...]
    moved: int
    floor: int
    bf16: int


class _Launches(TorchDispatchMode):
    """(name, arguments, results) of what is not a view."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "lowbit" or not func.is_view:
            self.calls.append((func._schema.name.removeprefix("lowbit::"), args, results))
        return results


def traffic(model: Model, format: QuantFormat, batch: int, context: int) -> Traffic:
    """Of a token after `context - 1` others in each of `batch` rows."""
    if format.kv is None:
        raise InputError(f"format must quantize the KV cache, got {format}")
    layer, angles, cache = _layer(model, format, context)
    hidden = torch.empty(batch, 1, model.hidden, dtype=DTYPE, device="meta")
    given = {"position_embeddings": angles, "past_key_values": cache}
    cache.table.allocate(batch, hidden.device)
    cache.layers[0].reserve(cache.table.num_pages, hidden.device)
    cache.table.open = cache.table.step(batch, 1, None, hidden.device)  # a model's first layer's
    layer.self_attn.layer_idx = 1  # another one takes it
    cache.layers.append(cache.layers[0])
    with _Launches() as seen:
        layer(hidden, **given)

    token = cache_bytes(1, model.num_kv_heads, model.head_dim, format.kv.bits)
    pages = {id(t) for t in cache.layers[0].pages.tensors}
    moved = 0
    for name, args, results in seen.calls:
        own = [t for t in tensors((args, results)) if name != "kv_append" or id(t) not in pages]
        moved += _size(own) + (batch * token if name == "kv_append" else 0)
    ends = batch * token + 2 * _size([hidden])
    weights = sum(n * k for n, k in model.linears.values())
    return Traffic(
        launches=tuple(name for name, *_ in seen.calls),
        moved=moved,
        floor=_size(layer.parameters()) + batch * context * token + ends,
        bf16=2 * weights
        + batch * (context + 1) * 4 * model.num_kv_heads * model.head_dim
        + 2 * _size([hidden]),
    )


def _size(values) -> int:
    return sum(t.numel() * t.element_size() for t in values)


def _layer(
    model: Model, format: QuantFormat, context: int
) -> tuple[nn.Module, tuple[Tensor, Tensor], StaticQuantKVCache]:
    """A fused layer on the meta device, angles of one position, and a cache."""
    whole = fuse(packed_on_meta(config_of(model, num_layers=1), format))
    positions = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    angles = whole.model.rotary_emb(torch.empty(1, 1, model.hidden, device="meta"), positions)
    cache = StaticQuantKVCache(whole.config, format.kv, max_length=context)
    return whole.model.layers[0], tuple(t.to(DTYPE) for t in angles), cache


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b"], help=", ".join(MODELS))
    parser.add_argument("--format", nargs="+", default=["w4a4kv4", "w4a8kv4", "w8a8kv8"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192])
    args = parser.parse_args()
    print("| shape | format | batch | context | launches | MB | floor | MB / floor | bf16 / MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        for format in map(QuantFormat.parse, args.format):
            for batch in args.batch:
                for context in args.context:
                    t = traffic(model_named(shape), format, batch, context)
                    print(
                        f"| {shape} | {format} | {batch} | {context} | {len(t.launches)} | "
                        f"{t.moved / 1e6:.1f} | {t.floor / 1e6:.1f} | {t.moved / t.floor:.3f} | "
                        f"{t.bf16 / t.moved:.2f} |"
                    )


if __name__ == "__main__":
    main()
