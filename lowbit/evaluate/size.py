"""Bytes of a packed model, next to what bf16 would take."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lowbit.nn.linear import QuantLinear

BF16_BYTES = 2


@dataclass(frozen=True)
class Size:
    """Bytes: of the packed linears alone, of all parameters, and of both if they were bf16."""

    linears: int
    linears_bf16: int
    model: int
    model_bf16: int


def size_of(model: nn.Module) -> Size:
    """The sizes of a model in memory; a tensor that two modules share counts once."""
    linears = linears_bf16 = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            linears += sum(p.nbytes for p in module.parameters())
            biases = 0 if module.bias is None else module.bias.numel()
            weights = module.in_features * module.out_features
            linears_bf16 += BF16_BYTES * (weights + biases)
    packed = {id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters()}
    rest = [p for p in model.parameters() if id(p) not in packed]
    return Size(
        linears=linears,
        linears_bf16=linears_bf16,
        model=linears + sum(p.nbytes for p in rest),
        model_bf16=linears_bf16 + BF16_BYTES * sum(p.numel() for p in rest),
    )


def folder_bytes(path: str | Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
