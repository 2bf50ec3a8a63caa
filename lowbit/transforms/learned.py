"""Rotations that are learned: where each begins, what is learned of it, what comes of it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.models.spaces import Space
from lowbit.transforms.cayley import nearest_orthogonal
from lowbit.transforms.rotation import Rotate, Rotation


@dataclass(frozen=True)
class LearnRotation:
    """Rotate `space` by an orthogonal matrix that lowbit/training.py learns.

    per_block  each block has one of its own, where the space does not join blocks
    local      DuaRot: R = R_global R_local, R_local block-diagonal in blocks of this size

    It begins at what Rotate(space, random_signs=True) gives, R_local at the identity.
    """

    space: str
    per_block: bool = False
    local: int | None = None

    def fit(self, space: Space, generator: torch.Generator) -> "LearnedRotation":
        if not space.writers or space.inner != 1:
            raise InputError(
                f"a learned rotation must be fused, which those of {self.space} cannot be"
            )
        if self.per_block and space.embedding:
            raise InputError(f"{self.space} joins all blocks: its rotation cannot be per_block")
        if self.local is not None and space.dim % self.local:
            raise InputError(f"local must divide {space.dim}, got {self.local}")
        start = Rotate(self.space, random_signs=True).fit(space, generator)
        start = replace(
            start,
            base=replace(start.base, order=space.dim),
            learned=start.apply(torch.eye(space.dim, dtype=torch.float64)),
        )
        return LearnedRotation(self, (start,))


@dataclass(frozen=True)
class LearnedRotation:
    """rotations: one for all blocks, or one for each."""

    spec: LearnRotation
    rotations: tuple[Rotation, ...]

    @property
    def space(self) -> str:
        return self.spec.space

    @property
    def base(self):
        return self.rotations[0].base

    def at(self, index: int) -> Rotation:
        """That of one block."""
        return self.rotations[index % len(self.rotations)]

    def learner(self, num_blocks: int, device: torch.device) -> "Learner":
        count = num_blocks if self.spec.per_block else 1
        start = torch.stack([self.at(i).learned for i in range(count)])
        return Learner(start.to(device), self.spec.local)

    def replaced(self, matrices: Tensor) -> "LearnedRotation":
        """With what was learned, [1 or blocks, n, n]; made orthogonal to fp64."""
        start = self.rotations[0]
        matrices = nearest_orthogonal(matrices.detach().double().cpu())
        return replace(self, rotations=tuple(replace(start, learned=m) for m in matrices))

    def __str__(self) -> str:
        local = "" if self.spec.local is None else f" times blocks of {self.spec.local}"
        each = ", one a block" if self.spec.per_block else ""
        return f"{self.space}: learned rotation of order {self.base.order}{local}{each}"


class Learner(nn.Module):
    """Orthogonal matrices [count, n, n] as they are learned, fp32."""

    def __init__(self, start: Tensor, local: int | None):
        super().__init__()
        count, n, _ = start.shape
        self.whole = nn.Parameter(start.float())
        self.local = None
        if local is not None:
            eye = torch.eye(local, device=start.device)
            self.local = nn.Parameter(eye.expand(count, n // local, -1, -1).clone())

    def matrices(self) -> Tensor:
        if self.local is None:
            return self.whole
        size = self.local.shape[-1]
        blocks = self.whole.unflatten(-1, (-1, size)).transpose(1, 2) @ self.local
        return blocks.transpose(1, 2).flatten(-2)
