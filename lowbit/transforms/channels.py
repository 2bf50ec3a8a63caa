"""A scale of a space's channels, applied: divided out of x, multiplied into what reads it.

    x W^T = (x / s) (W diag(s))^T           q k^T = (q diag(s)) (k / s)^T

x is divided by dividing what writes it: a norm's gain, or the rows of a linear. In fp64.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowbit.models.spaces import Space


def reader_columns(scale: Tensor, space: Space) -> Tensor:
    """scale [dim * inner] as the columns of a reader have it, [dim * repeat * inner]."""
    parts = scale.view(space.dim, 1, space.inner)
    return parts.expand(-1, space.repeat, -1).flatten()


def scaled_tensors(
    tensors: Mapping[str, Tensor], space: Space, scale: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Of a block's named tensors those that `scale` [dim * inner] changes, as it makes them; what
    is turned in pairs takes the scale of the first of each."""
    scale = space.tied(scale.double())
    columns = reader_columns(scale, space)
    for module in space.scale_writers:
        for name, tensor in _weight_and_bias(tensors, module):
            rows = space.written(tensor).double() / _by_row(scale, tensor)
            yield name, space.rewritten(tensor, rows.to(tensor.dtype))
    for module in space.multiplied:
        for name, tensor in _weight_and_bias(tensors, module):
            yield name, (tensor.double() * _by_row(columns, tensor)).to(tensor.dtype)
    for module in space.fused_readers:
        name = f"{module}.weight"
        yield name, (tensors[name].double() * columns).to(tensors[name].dtype)


def _weight_and_bias(tensors: Mapping[str, Tensor], module: str) -> Iterator[tuple[str, Tensor]]:
    names = (f"{module}.weight", f"{module}.bias")
    return ((name, tensors[name]) for name in names if name in tensors)


def _by_row(scale: Tensor, tensor: Tensor) -> Tensor:
    """scale [N] as a factor of a weight [N, K] or a bias [N]."""
    return scale.view(-1, *(1,) * (tensor.dim() - 1))


@torch.no_grad()
def fuse_scale(block: nn.Module, space: Space, scale: Tensor):
    """Divide the space's channels by `scale` [dim * inner], in place."""
    tensors = dict(block.named_parameters())
    for name, tensor in scaled_tensors(tensors, space, scale):
        tensors[name].copy_(tensor)
