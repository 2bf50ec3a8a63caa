"""Tensor parallelism: ranks that share out the heads and the MLP channels of every block.

    column-parallel   q, k, v, gate, up     a rank has the rows of its heads and channels
    row-parallel      o, down               it has their columns; the sum over ranks is all-reduced

What mixes channels in front of a row-parallel linear must not reach from one rank to another. So a
model is quantized for a number of ranks (Recipe.tensor_parallel): rotations that run online there
are block-diagonal, one block a rank, and each rank's slice of the input has a scale of its own a
token (lowbit/nn/slices.py). That takes no exchange of largest values, and is finer besides. Any
number of processes that divides it runs the model, one included, and all compute the same.
"""

from transformers import PreTrainedModel

from lowbit.errors import InputError
from lowbit.formats import IntFormat
from lowbit.models import Adapter


def check_ranks(model: PreTrainedModel, adapter: Adapter, weight: IntFormat | None, ranks: int):
    """Refuse a number of ranks that cannot share the model out; `weight` is the format of its
    packed linears, which are cut between groups and whole bytes."""
    if ranks == 1:
        return
    projections = [adapter.attention_parts.projections]
    projections += [adapter.mlp_parts.projections] if adapter.mlp_parts else []
    one = [names[0] for names in projections if len(names) == 1]
    if one:
        raise InputError(
            f"tensor_parallel must be 1 where one linear makes what ranks share out by its parts, "
            f"got {ranks} and {', '.join(one)}"
        )
    names = ("num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(model.config, name) for name in names}
    block = model.get_submodule(adapter.block_path)[0]
    for name in adapter.row_parallel:
        K = block.get_submodule(name).in_features
        sizes[f"the inputs of {name}"] = K
        if weight is not None and weight.group_size is not None:
            sizes[f"the groups of {weight.group_size} inputs of {name}"] = weight.num_groups(K)
        if weight is not None:
            sizes[f"the bytes of a packed row of {name}"] = K * weight.storage_bits // 8
    check_divides(sizes, ranks)


def check_divides(sizes: dict[str, int], ranks: int):
    """`ranks` must divide all sizes; they are named."""
    for what, size in sizes.items():
        if size % ranks:
            raise InputError(f"tensor_parallel must divide {what}, got {ranks} for {size}")
