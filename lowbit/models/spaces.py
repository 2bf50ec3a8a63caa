"""What an architecture adapter says: which tensors write and read each space.

Activations are row vectors. A map x -> x R on a space is undone in the tensors around it:

    reader     y = x W^T        becomes  W R^-T      (columns of W carry the space)
    writer     x = u W^T + b    becomes  R^T W, b R  (rows of W carry the space)
    embedding  x = E[token]     becomes  E R

Names of tensors are names of modules; inside a block they are relative to the block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.formats import IntFormat


@dataclass(frozen=True)
class Norm:
    """A norm, RMSNorm or LayerNorm, that folds into the linears that read it."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """A place where an invertible map can act on `dim` of the features [..., dim, inner].

    With no writers the map cannot be fused in front of the readers: it stays in the model,
    online. A space with neither (q and k after RoPE) has maps that cancel by themselves.

    scale_writers  modules after which each feature may be divided by a number of its own, and no
                   more: a norm's gain, or a linear whose output goes through nothing that mixes
                   features or bends them
    float_readers  modules with a weight that read it too and stay in full precision, as a router
                   does: what is fused reaches them, what runs online for the readers does not
    repeat         a reader's columns, and what is multiplied, hold each run of `inner` features so
                   many times in a row (of a KV head, for all the query heads that share it); only
                   for scales
    multiplied     modules whose features meet those of the space in products, run by run: what a
                   scale divides here, it multiplies there (q, where the space is k's)
    turned         the first features of a run that are turned in pairs, i with i + turned / 2, as
                   RoPE does: a pair has one scale, that of its first
    judge          the module whose output says what a scale is worth: it holds all readers; "" is
                   the block
    rows           (first, last + 1) of what a writer computes that is in the space, of linears that
                   compute more: q, k and v in one; None: all of it
    """

    dim: int
    inner: int = 1
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    embedding: str | None = None  # outside the blocks
    head: str | None = None  # outside the blocks
    scale_writers: tuple[str, ...] = ()
    repeat: int = 1
    multiplied: tuple[str, ...] = ()
    turned: int = 0
    judge: str | None = None
    rows: tuple[int, int] | None = None
    float_readers: tuple[str, ...] = ()

    @property
    def fused_readers(self) -> tuple[str, ...]:
        """All that must change where what writes the space does."""
        return self.float_readers + self.readers

    def tied(self, scale: Tensor) -> Tensor:
        """scale [dim * inner] with one number for both features of a turned pair."""
        if not self.turned:
            return scale
        pair, _, rest = scale.view(self.dim, self.inner).split(
            (self.turned // 2, self.turned // 2, self.inner - self.turned), 1
        )
        return torch.cat((pair, pair, rest), 1).flatten()

    def written(self, tensor: Tensor) -> Tensor:
        """A view of the rows in the space, of a writer's weight [N, K], bias or output [N, ...]."""
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    def rewritten(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """`tensor` with these rows in place of written(tensor); differentiable in both."""
        if self.rows is None:
            return rows
        first, end = self.rows
        return torch.cat((tensor[:first], rows, tensor[end:]))


def head_spaces(
    num_heads: int, num_kv_heads: int, head_dim: int, value: str, output: str
) -> dict[str, Space]:
    """The spaces of heads between the linears `value` and `output` of an attention."""
    return {
        "value": Space(head_dim, writers=(value,), readers=(output,)),
        "heads": Space(num_heads, inner=head_dim, readers=(output,)),
        "query_key": Space(head_dim),
        "value_channels": Space(
            num_kv_heads,
            inner=head_dim,
            readers=(output,),
            scale_writers=(value,),
            repeat=num_heads // num_kv_heads,
            judge=output,
        ),
    }


@dataclass(frozen=True)
class AttentionParts:
    """What an attention is made of, by names within it.

    projections  of q, k and v; a single one makes all three, in this order
    output       the linear that reads the heads
    norms        of q and of k of each head before RoPE, where a model has them
    """

    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    norms: tuple[str, str] = ("q_norm", "k_norm")


LLAMA_ATTENTION = AttentionParts()


def window_of(attention: nn.Module) -> int:
    """How many tokens a query of transformers' attention sees, its own included; 0: all of them.

    Where layers differ each says its own; else the config says it for all of them.
    """
    of_all = getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", of_all) or 0


@dataclass(frozen=True)
class MLPParts:
    """What a gated MLP, output(act(gate) * up), is made of, by names within it.

    projections  of gate and up; a single one makes both, in this order
    """

    projections: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"


LLAMA_MLP = MLPParts()


SPACES = (
    "residual",
    "value",
    "heads",
    "mlp_hidden",
    "query_key",
    "attention_input",
    "mlp_input",
    "value_channels",
    "query_key_channels",
)


@dataclass(frozen=True)
class Adapter:
    """One architecture, described; it holds no code of any method.

    stages  linears of a block in the order they run, grouped by the input they share
    embedding_scale  what embeddings are multiplied by before the first block
    plain   a block is x + attention(norm(x)), then x + mlp(norm(x)), of RMSNorms: it can be fused
    layer_norms  norms are LayerNorms, which take the mean of their input out
    spaces  those of these that it has
            residual: the stream between blocks
            value: one KV head's values, shared by all heads
            heads: the attention output across heads, for each feature of a head
            mlp_hidden: the input of the last MLP linear; of experts mlp_hidden.0 and on
            query_key: q and k of one head, after RoPE
            attention_input, mlp_input: what a norm writes, channels that only a scale can reach;
            without mlp_input attention_input is the MLP's too
            value_channels: all values of a block, channel by channel
            query_key_channels: all keys of a block, and the queries that meet them
    scores  linears that make attention's scores: where clipping weights costs most
    attention_parts, mlp_parts  for lowbit.nn, which takes their place; None for an MLP without a
            gate, which stays: its linears quantize what they read
    experts  how many MLPs `mlp` holds, numbered, each for the tokens that a router sends it; 0: it
            is an MLP itself
    stored_names  (part of a tensor's name in published checkpoints, what the model has there)
    ranks   that may share out heads and MLP channels: what runs online stays inside the slice of
            each (lowbit/tensor_parallel.py)
    """

    base_path: str
    block_path: str
    rotary_path: str
    attention: str
    mlp: str
    stages: tuple[tuple[str, ...], ...]
    norms: tuple[Norm, ...]
    final_norm: Norm
    spaces: dict[str, Space]
    scores: tuple[str, ...] = ()
    attention_parts: AttentionParts = LLAMA_ATTENTION
    mlp_parts: MLPParts | None = LLAMA_MLP
    layer_norms: bool = False
    plain: bool = False
    embedding_scale: float = 1.0
    experts: int = 0
    stored_names: tuple[tuple[str, str], ...] = ()
    ranks: int = 1

    def __post_init__(self):
        unknown = sorted({name.partition(".")[0] for name in self.spaces} - set(SPACES))
        if unknown:
            raise InputError(f"spaces must be some of {', '.join(SPACES)}, got {unknown}")

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage)

    @property
    def head(self) -> str:
        """The output head."""
        return self.final_norm.readers[0]

    @property
    def mlps(self) -> tuple[str, ...]:
        """The MLPs of a block."""
        return tuple(f"{self.mlp}.{e}" for e in range(self.experts)) or (self.mlp,)

    def name_of(self, stored_name: str) -> str:
        """What a tensor of a published checkpoint is called in the model."""
        for there, here in self.stored_names:
            stored_name = stored_name.replace(there, here)
        return stored_name

    def expert_of(self, name: str) -> int | None:
        """The number of the expert that a module of a block is part of; None: of none."""
        within = name.removeprefix(f"{self.mlp}.")
        return int(within.split(".")[0]) if self.experts and within != name else None

    def each(self, space: str) -> tuple[str, ...]:
        """What a recipe means by one of SPACES: that one, or one for each expert."""
        return tuple(s for s in self.spaces if s.partition(".")[0] == space) or (space,)

    @property
    def row_parallel(self) -> tuple[str, ...]:
        """The linears that read what ranks share out: heads, or channels of an MLP."""
        shared = [s for s in (*self.each("heads"), *self.each("mlp_hidden")) if s in self.spaces]
        return tuple(name for space in shared for name in self.spaces[space].readers)

    def of_rank(self, space: str) -> Space:
        """A space as a map sees it: one that runs online on what ranks share out is that of one of
        them, and maps all their slices alike."""
        whole = self.spaces[space]
        if whole.writers or not whole.readers or not set(whole.readers) <= set(self.row_parallel):
            return whole
        return replace(whole, dim=whole.dim // self.ranks)

    def input_format(self, linear: str, width: int, format: IntFormat | None) -> IntFormat | None:
        """The grid of the input of a linear, of `width` features: of what ranks share out the slice
        of each has a scale of its own, so that it depends on no other."""
        if format is None or self.ranks == 1 or linear not in self.row_parallel:
            return format
        return replace(format, group_size=width // self.ranks)
