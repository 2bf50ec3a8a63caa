"""Rotations that are learned: where each begins, what is learned of it, what comes of it."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.hadamard import exists
from lowbit.models.spaces import Space
from lowbit.transforms.cayley import nearest_orthogonal
from lowbit.transforms.cost import Costs
from lowbit.transforms.online import OnlineTransform
from lowbit.transforms.rotation import Rotate, Rotation

# Up to here a dense product of activations costs a GPU no more than a fast Hadamard transform
# (DuaRot, equation 11, on an A100). For where it is not measured (lowbit/transforms/cost.py).
LARGEST_ONLINE = 512


@dataclass(frozen=True)
class LearnRotation:
    """Rotate `space` by an orthogonal matrix that lowbit/training.py or distribution.py learns.

    per_block  each block has one of its own, where the space does not join blocks
    local      DuaRot: R = R_global R_local, R_local block-diagonal in blocks of this size, or of
               what it has in common with the space's

    largest_online  the largest order of a dense matrix that runs online; None: see below

    What is fused is one matrix, and begins at what Rotate(space, random_signs=True) gives, R_local
    at the identity. What must run online is dense up to largest_online, and else A (x) B of two
    factors that are; it begins at Hadamard matrices. With None it is what costs no more than a fast
    Hadamard transform where costs are given, nothing learned where all costs more, as DuaRot has
    it; without costs the limit is LARGEST_ONLINE.
    """

    space: str
    per_block: bool = False
    local: int | None = None
    largest_online: int | None = None

    def __post_init__(self):
        largest = self.largest_online
        if largest is not None and (type(largest) is not int or largest < 1):
            raise InputError(f"largest_online must be at least 1, or None, got {largest!r}")

    def fit(
        self, space: Space, generator: torch.Generator, costs: Costs | None = None
    ) -> "LearnedRotation | Rotation":
        if self.per_block and space.embedding:
            raise InputError(f"{self.space} joins all blocks: its rotation cannot be per_block")
        if len(space.readers) > 1 and not space.writers or space.inner != 1:
            raise InputError(f"a rotation of {self.space} cannot be learned: take Rotate")
        if self.local is not None and not space.writers:
            raise InputError(f"local is for rotations that are fused, unlike those of {self.space}")
        base = OnlineTransform("learned", space.dim)
        if not space.writers:
            fast = Rotate(self.space).fit(space, generator)
            base = self._online(space.dim, fast.base, costs)
            if base is None:
                return fast
        start = tuple(
            _start(order, replace(space, dim=order), self.space, bool(space.writers), generator)
            for order, _ in base.stages
        )
        return LearnedRotation(self, (Rotation(self.space, base, None, start),))

    def _online(
        self, dim: int, fast: OnlineTransform, costs: Costs | None
    ) -> OnlineTransform | None:
        if costs is not None and self.largest_online is None:
            return costs.best_learned(dim, fast)
        left = _left_factor(dim, self.space, self.largest_online or LARGEST_ONLINE)
        return OnlineTransform("learned", dim, left=left)


def _start(
    order: int, space: Space, name: str, random_signs: bool, generator: torch.Generator
) -> Tensor:
    start = Rotate(name, random_signs).fit(space, generator)
    return start.apply(torch.eye(order, dtype=torch.float64))


def _left_factor(dim: int, name: str, largest: int) -> int:
    """The order of A in A (x) B, both at most `largest`, B a power of two as large as can be;
    1: there is no A."""
    if dim <= largest:
        return 1
    right = 1 << (largest.bit_length() - 1)
    while right > 1:
        left = dim // right
        if dim % right == 0 and left <= largest and exists(left):
            return left
        right //= 2
    raise InputError(
        f"{name} of {dim} features has no two Hadamard orders up to {largest} as factors: "
        "its rotation cannot be learned, take Rotate"
    )


@dataclass(frozen=True)
class LearnedRotation:
    """rotations: one for all blocks, or one for each."""

    spec: LearnRotation
    rotations: tuple[Rotation, ...]

    @property
    def space(self) -> str:
        return self.spec.space

    @property
    def base(self) -> OnlineTransform:
        return self.rotations[0].base

    def at(self, index: int) -> Rotation:
        """That of one block."""
        return self.rotations[index % len(self.rotations)]

    def learner(self, num_blocks: int, device: torch.device) -> "Learner":
        count = num_blocks if self.spec.per_block else 1
        start = [torch.stack([m] * count).to(device) for m in self.rotations[0].learned]
        local = self.spec.local and math.gcd(self.spec.local, self.base.order)
        return Learner(self.base, start, local)

    def replaced(self, matrices: list[Tensor]) -> "LearnedRotation":
        """With what was learned, [1 or blocks, n, n] of each stage; made orthogonal to fp64."""
        return self.restored([nearest_orthogonal(m.detach().double().cpu()) for m in matrices])

    def matrices(self) -> list[Tensor]:
        """fp64 [1 or blocks, n, n] of each stage."""
        learned = (r.learned for r in self.rotations)
        return [torch.stack(each) for each in zip(*learned, strict=True)]

    def restored(self, matrices: list[Tensor]) -> "LearnedRotation":
        """With the matrices of another of the same spec, bit for bit."""
        each = zip(*(stage.unbind() for stage in matrices), strict=True)
        rotations = tuple(replace(self.rotations[0], learned=learned) for learned in each)
        return replace(self, rotations=rotations)

    def __str__(self) -> str:
        left = self.base.left
        kind = f"({left} (x) {self.base.order // left})" if left > 1 else f"{self.base.order}"
        local = "" if self.spec.local is None else f" times blocks of {self.spec.local}"
        each = ", one a block" if self.spec.per_block else ""
        return f"{self.space}: learned rotation of order {kind}{local}{each}"


class Learner(nn.Module):
    """Orthogonal matrices [count, n, n] of each stage as they are learned, fp32."""

    def __init__(self, base: OnlineTransform, start: list[Tensor], local: int | None):
        super().__init__()
        self.base = base
        self.whole = nn.ParameterList([nn.Parameter(m.float()) for m in start])
        self.local = None
        if local is not None:
            count, n, _ = start[0].shape
            eye = torch.eye(local, device=start[0].device)
            self.local = nn.Parameter(eye.expand(count, n // local, -1, -1).clone())

    def matrices(self) -> list[Tensor]:
        if self.local is None:
            return list(self.whole)
        size = self.local.shape[-1]
        blocks = self.whole[0].unflatten(-1, (-1, size)).transpose(1, 2) @ self.local
        return [blocks.transpose(1, 2).flatten(-2)]

    def turn(self, x: Tensor, index: int) -> Tensor:
        """x [..., K] times I (x) R of one block, differentiable in both."""
        for (order, inner), stage in zip(self.base.stages, self.matrices(), strict=True):
            matrix = stage[index % len(stage)]
            parts = x.unflatten(-1, (-1, order, inner)).transpose(-1, -2)
            x = (parts @ matrix).transpose(-1, -2).flatten(-3)
        return x
