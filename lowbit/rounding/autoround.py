"""AutoRound: learn which way each weight is rounded, and how far each range is clipped.

Cheng et al. 2024, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs" (arXiv 2309.05516), section 3:

    code = clamp(round(w / scale + V) + zero_point),   V in [-0.5, 0.5], from 0
    range = [low * min, high * max],                   low, high in [0, 1], from 1

by signed gradient descent, whose learning rate falls to 0 linearly: from 1 / steps, a V that always
goes one way gets to where the weight is rounded that way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from lowbit.formats import IntFormat
from lowbit.rounding.block import (
    BlockProblem,
    BlockRounder,
    LearnedBlock,
    check_count,
    check_rate,
    check_trimmed,
)
from lowbit.rounding.learned import Simulated, simulate


@dataclass(frozen=True)
class AutoRound(BlockRounder):
    """The options of the published tables.

    steps                 of gradient descent for each block
    batch                 samples in a step
    rounded_input         the block learns on what the blocks before it will give it, else on their
                          outputs in full precision (the authors' disable_quanted_input)
    learning_rate         of V; None: 1 / steps
    minmax_learning_rate  of low and high; None: that of V
    autocast              products of a step in bf16, as the authors have them: the same errors in
                          three fifths of the time on a CPU with such units
    trimmed               share of the elements of a sample's output that count for nothing, those
                          furthest off: 0.001 in SignRoundV2 (Cheng et al. 2025, arXiv 2512.04746),
                          of a batch there. A token with massive activations has nearly all of a
                          block's error else, and few samples have few such tokens: see
                          docs/notes/0008
    """

    steps: int = 200
    batch: int = 8
    rounded_input: bool = True
    learning_rate: float | None = None
    minmax_learning_rate: float | None = None
    autocast: bool = True
    trimmed: float = 0.0
    keeps_best = True

    def __post_init__(self):
        for name in ("steps", "batch"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "minmax_learning_rate"):
            if getattr(self, name) is not None:
                check_rate(name, getattr(self, name))
        check_trimmed(self.trimmed)

    @property
    def streams(self) -> tuple[str, ...]:
        return ("rounded", "full") if self.rounded_input else ("full",)

    def learned(self, problem: BlockProblem) -> LearnedBlock:
        weights = (problem.block.get_submodule(name).weight for name in problem.linears)
        return LearnedBlock(problem, [_Rounding(w, problem.format) for w in weights])

    def optimizer(self, learned: LearnedBlock) -> tuple[torch.optim.Optimizer, LinearLR]:
        rate = self.learning_rate or 1 / self.steps
        offsets = [q.offset for q in learned.quantizers]
        ranges = [p for q in learned.quantizers for p in (q.high, q.low) if p is not None]
        optimizer = SignSGD(
            [
                {"params": offsets, "lr": rate},
                {"params": ranges, "lr": self.minmax_learning_rate or rate},
            ]
        )
        return optimizer, LinearLR(optimizer, 1.0, 0.0, self.steps)

    def steps_for(self, samples: int) -> int:
        return self.steps


class SignSGD(torch.optim.SGD):
    """p -= lr * sign(gradient)."""

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sign_()
        super().step()


class _Rounding(nn.Module):
    """V [N, K] and the shares of ranges [N, G] of one linear."""

    def __init__(self, weight: Tensor, format: IntFormat):
        super().__init__()
        self.format = format
        share = weight.new_ones(len(weight), format.num_groups(weight.shape[1]))
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.high = nn.Parameter(share)
        self.low = None if format.symmetric else nn.Parameter(share.clone())

    def forward(self, weight: Tensor) -> Simulated:
        return simulate(weight, self.format, self.high, self.low, self.offset)

    def project(self):
        self.offset.clamp_(-0.5, 0.5)
        for share in (self.high, self.low):
            if share is not None:
                share.clamp_(0, 1)
