"""Slices: a linear whose input is quantized slice by slice, each with a scale of its own a token.

    y = sum over slices of int_gemm(slice of x, its columns of W), bias in the first

In a model that ranks may share out (lowbit/tensor_parallel.py) a slice of the input is what one of
them has: what it computes depends on no other rank, and one process computes the very same. A
process with several slices copies the columns of each whenever it runs, but in a kernel layout.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.formats import IntFormat, PackedTensor

PARTS = ("codes", "scale", "zero_point")


def cut(tensor: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    """`count` parts [..., G / count] of scales or codes [..., G]; one number a row is that of all,
    and so is None."""
    if count == 1 or tensor is None or tensor.shape[-1] == 1:
        return (tensor,) * count
    return tuple(part.contiguous() for part in tensor.chunk(count, -1))


def slices_of(x: PackedTensor) -> list[PackedTensor]:
    """x [..., K] with a scale for each group of a row: the groups, each with one scale a row."""
    count = x.format.num_groups(x.shape[-1])
    if count == 1:
        return [x]
    shape = torch.Size((*x.shape[:-1], x.shape[-1] // count))
    parts = zip(*(cut(getattr(x, name), count) for name in PARTS), strict=True)
    per_row = replace(x.format, group_size=None)
    return [PackedTensor(*part, per_row, x.layout, shape) for part in parts]


def quantized_by_slice(
    quantize_rows: Callable[..., PackedTensor], format: IntFormat, *inputs: Tensor
) -> PackedTensor:
    """quantize_rows(*inputs, format), which has one scale a row, for inputs [..., K] each group of
    which is a row of its own."""
    count = format.num_groups(inputs[0].shape[-1])
    if count == 1:
        return quantize_rows(*inputs, format)
    slices = (x.unflatten(-1, (count, -1)).contiguous() for x in inputs)
    rows = quantize_rows(*slices, replace(format, group_size=None))
    parts = (getattr(rows, name) for name in PARTS)
    whole = (part if part is None else part.flatten(-2) for part in parts)
    return PackedTensor(*whole, format, rows.layout, inputs[0].shape)
