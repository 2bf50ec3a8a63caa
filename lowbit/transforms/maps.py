"""Maps: any invertible matrix on a space of a block, learned by lowbit/flattening.py.

    x -> x P        W -> W P^-T

FlatQuant (Sun et al. 2024, arXiv 2410.09426), section 3.1. Where P runs online it is A (x) B with
factors as even as can be, which is two small products. P begins orthogonal, at a Hadamard matrix or
where there is none at a Hartley matrix, and is learned as

    P = P_0 C(X) diag(exp(s)) C(Y)        P^-T = P_0 C(X) diag(exp(-s)) C(Y)

of each factor, C(X) the Cayley transform: no inverse is ever solved for, and the condition number
is at most what the range of s allows.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.hadamard import exists
from lowbit.models.spaces import Space
from lowbit.transforms.cayley import cayley
from lowbit.transforms.learned import LARGEST_ONLINE
from lowbit.transforms.online import OnlineTransform, hartley_matrix
from lowbit.transforms.rotation import Rotation, apply_stages


@dataclass(frozen=True)
class Map(Rotation):
    """x -> x P of one block, P invertible: `learned` are its factors.

    inverse  fp64 P^-T of each stage of base
    """

    inverse: tuple[Tensor, ...] = ()

    def fuse_reader(self, linear: nn.Linear):
        replace(self, learned=self.inverse)._fuse_rows(linear.weight)

    @property
    def condition(self) -> float:
        """The condition number of P."""
        return math.prod(torch.linalg.cond(matrix).item() for matrix in self.learned)

    def __str__(self) -> str:
        return f"{self.space}: learned map of order {_factors(self.base)}, one a block"


@dataclass(frozen=True)
class LearnMap:
    """Map `space` by a matrix that is learned for each block."""

    space: str

    def fit(self, space: Space) -> Map:
        """What learning begins with."""
        if space.embedding or not space.readers:
            raise InputError(
                f"a map of {self.space} cannot be learned for each block: it joins blocks, or "
                "queries and keys, which the cache rotates alike; take Rotate"
            )
        fused_or_heads = space.writers or space.inner > 1
        left = 1 if fused_or_heads else _even_factor(space.dim, self.space)
        base = OnlineTransform("learned", space.dim, space.inner, left)
        start = tuple(_start(order) for order, _ in base.stages)
        return Map(self.space, base, None, start, start)


def _factors(base: OnlineTransform) -> str:
    kind = f"{base.left} (x) {base.order // base.left}" if base.left > 1 else f"{base.order}"
    return kind if base.inner == 1 else f"{kind} (x) I_{base.inner}"


def _even_factor(dim: int, name: str) -> int:
    """The largest divisor of dim up to its root."""
    left = next(n for n in range(math.isqrt(dim), 0, -1) if dim % n == 0)
    if dim // left > LARGEST_ONLINE:
        raise InputError(
            f"{name} of {dim} features has no two factors up to {LARGEST_ONLINE}: its map cannot "
            "be learned, take Rotate"
        )
    return left


def _start(order: int) -> Tensor:
    if not exists(order):
        return hartley_matrix(order)
    return OnlineTransform("hadamard", order).dense()


class LearningMap(nn.Module):
    """A Map while it is learned, fp32. condition: the largest condition number of a factor."""

    def __init__(self, start: Map, condition: float, device: torch.device):
        super().__init__()
        self.start, self.limit = start, math.log(condition) / 2
        self.first = [matrix.to(device) for matrix in start.learned]
        orders = [len(matrix) for matrix in start.learned]

        def zeros(*dims: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(dims, device=device))

        self.left = nn.ParameterList(zeros(n, n) for n in orders)  # X
        self.log_scale = nn.ParameterList(zeros(n) for n in orders)  # s
        self.right = nn.ParameterList(zeros(n, n) for n in orders)  # Y

    def matrices(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
        """(P, P^-T) of each stage."""
        forward, inverse = [], []
        parts = zip(self.first, self.left, self.log_scale, self.right, strict=True)
        for first, left, log_scale, right in parts:
            before, after = first.to(dtype) @ cayley(left.to(dtype)), cayley(right.to(dtype))
            forward.append(before * log_scale.to(dtype).exp() @ after)
            inverse.append(before * (-log_scale.to(dtype)).exp() @ after)
        return forward, inverse

    def turn(self, x: Tensor, matrices: list[Tensor]) -> Tensor:
        """x [..., K] through the stages; differentiable in both."""
        return apply_stages(x, self.start.base, matrices)

    @torch.no_grad()
    def project(self):
        """Back into the bound of the condition number, after a step."""
        for log_scale in self.log_scale:
            log_scale.clamp_(-self.limit, self.limit)

    @torch.no_grad()
    def learned(self) -> Map:
        """What was learned, as the running model holds it: P in fp32, and in fp64 its inverse."""
        forward = [m.float().double().cpu() for m in self.matrices(torch.float64)[0]]
        inverse = tuple(torch.linalg.inv(m).mT.contiguous() for m in forward)
        return replace(self.start, learned=tuple(forward), inverse=inverse)
