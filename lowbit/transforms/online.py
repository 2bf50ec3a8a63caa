"""OnlineTransform: a rotation that stays in the running model, in front of a quantizer.

    y = x (I (x) R (x) I_inner)

with R = H_order / sqrt(order) for kind "hadamard", or the orthogonal discrete Hartley matrix for
kind "hartley", which exists for every order: what spreads outliers over 9 heads, where no Hadamard
matrix exists. Hartley entries are bounded by sqrt(2 / order) (Hartley 1942; Bracewell 1983).
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.hadamard import hadamard_matrix

KINDS = ("hadamard", "hartley")


def hartley_matrix(n: int) -> Tensor:
    """fp64 [n, n], symmetric and orthogonal: (cos + sin)(2 pi j k / n) / sqrt(n)."""
    index = torch.arange(n, dtype=torch.int64)
    angle = (index[:, None] * index % n).double() * (2 * math.pi / n)
    return (angle.cos() + angle.sin()) / math.sqrt(n)


@dataclass(frozen=True)
class OnlineTransform:
    """R of `order` acting on x's last dim viewed as [..., order, inner]; 1 <= order * inner <= K,
    a divisor of K."""

    kind: str
    order: int
    inner: int = 1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"transform kind must be one of {KINDS}, got {self.kind!r}")

    @property
    def matrix(self) -> Tensor | None:
        """R for the ops' `matrix` argument, fp32; None stands for H / sqrt(order)."""
        return None if self.kind == "hadamard" else hartley_matrix(self.order).float()

    def dense(self) -> Tensor:
        """R in fp64 [order, order], for fusing and for the fake-quant path."""
        if self.kind == "hartley":
            return hartley_matrix(self.order)
        return hadamard_matrix(self.order).double() / math.sqrt(self.order)

    def to_dict(self) -> dict:
        return asdict(self)
