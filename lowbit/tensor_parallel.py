"""Tensor parallelism: ranks that share out the heads and the MLP channels of every block.

    column-parallel   q, k, v, gate, up     a rank has the rows of its heads and channels
    row-parallel      o, down               it has their columns; the sum over ranks is all-reduced

What mixes channels in front of a row-parallel linear must not reach from one rank to another. So a
model is quantized for a number of ranks (Recipe.tensor_parallel): rotations that run online there
are block-diagonal, one block a rank, and each rank's slice of the input has a scale of its own a
token (lowbit/nn/slices.py). That takes no exchange of largest values, and errs less than one
scale for all (docs/notes/0014). Any number of processes that divides it runs the model, one
included, and all compute the same.

A rank reads its share of each tensor and no more (`parts_of`), then its modules take the sizes of
that (`become_share`). Embeddings, norms and the head are whole in each.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup
from transformers import PreTrainedModel

from lowbit import parallel
from lowbit.errors import InputError
from lowbit.formats import IntFormat
from lowbit.models import Adapter
from lowbit.nn.attention import QuantAttention
from lowbit.nn.linear import QuantLinear
from lowbit.tensors import Parts

COLUMNS = ("codes", "scale", "zero_point")  # tensors [N, columns] of a row-parallel linear


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
    shared = ("heads", "mlp_hidden")
    unknown = [name for name in shared if adapter.each(name)[0] not in adapter.spaces]
    if unknown:
        raise InputError(
            f"tensor_parallel must be 1 where nobody says what ranks share out, got {ranks} "
            f"and an architecture without {', '.join(unknown)}"
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


def group_of(tensor_parallel: bool | DeviceMesh, device: torch.device) -> ProcessGroup | None:
    """The processes that share a model out: those of a mesh, or all; None: this one alone."""
    if tensor_parallel is False:
        return None
    if isinstance(tensor_parallel, DeviceMesh):
        return tensor_parallel.get_group()
    if not dist.is_initialized():
        parallel.start(device)
    return dist.group.WORLD if dist.is_initialized() else None


def parts_of(model: PreTrainedModel, adapter: Adapter, rank: int, ranks: int) -> Parts:
    """What a rank has of the tensors of a model, whole and swapped. Refuses a number of ranks that
    the model was not quantized for."""
    config, parts = model.lowbit_config, {}
    if config.format.weight is None:
        raise InputError(f"tensor_parallel shares out packed linears, got {config.format}")
    check_ranks(model, adapter, config.format.weight, ranks)
    row_parallel = set(adapter.row_parallel)
    for index, block in enumerate(model.get_submodule(adapter.block_path)):
        for name in adapter.linears:
            linear, path = block.get_submodule(name), f"{adapter.block_path}.{index}.{name}"
            if name in row_parallel:
                _check_local(linear, name, ranks)
            for leaf, tensor in linear.named_parameters(recurse=False):
                if name not in row_parallel:
                    parts[f"{path}.{leaf}"] = (_own(tensor.shape[0], rank, ranks),)
                elif leaf in COLUMNS and tensor.shape[1] > 1:  # a scale a row is that of all
                    parts[f"{path}.{leaf}"] = (slice(None), _own(tensor.shape[1], rank, ranks))
    return parts


def _own(size: int, rank: int, ranks: int) -> slice:
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def _check_local(linear: QuantLinear, name: str, ranks: int):
    """That a rank needs none but its own inputs."""
    together = {}
    if linear.transform is not None:
        together["rotates"] = linear.transform.order * linear.transform.inner
    if linear.activation_format is not None:
        together["quantizes"] = linear.in_features // linear.slices
    local = linear.in_features // ranks
    for does, width in together.items():
        if local % width:
            raise InputError(
                f"{name} {does} {width} inputs together, and {ranks} ranks have {local} each: "
                f"quantize the model with --set tensor_parallel={ranks}"
            )


def become_share(model: PreTrainedModel, adapter: Adapter, group: ProcessGroup):
    """The modules of a model whose tensors are this rank's share, before they are prepared."""
    ranks = group.size()
    row_parallel = set(adapter.row_parallel)
    for block in model.get_submodule(adapter.block_path):
        for name in adapter.linears:
            linear = block.get_submodule(name)
            if name not in row_parallel:
                linear.out_features //= ranks
                continue
            linear.in_features //= ranks
            if linear.activation_format is not None and linear.slices == 1:
                linear.activation_format = replace(linear.activation_format, group_size=None)
            linear.group = group
            if group.rank() > 0:
                linear.bias = None  # of the sum, in which it must be once
        attention = block.get_submodule(adapter.attention)
        if isinstance(attention, QuantAttention):
            attention.num_heads //= ranks
            attention.num_kv_heads //= ranks
    model.lowbit_ranks = ranks


def check_whole(model: PreTrainedModel, what: str):
    """Refuse a rank's share of a model where `what` is done with a whole one."""
    ranks = getattr(model, "lowbit_ranks", 1)
    if ranks > 1:
        raise InputError(f"{what} needs a whole model, got a share of one among {ranks} ranks")
