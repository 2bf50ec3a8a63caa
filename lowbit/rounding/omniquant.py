"""OmniQuant: learn how far each range is clipped and, on request, how channels are scaled.

Shao et al. 2024, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models"
(arXiv 2308.13137):

    learnable weight clipping             range = [sigmoid(low) * min, sigmoid(high) * max]
    learnable equivalent transformation   (x / s) (W diag(s))^T, lowbit/transforms/channels.py

(sections 3.2 and 3.3), both by AdamW without weight decay. The scales are those of the recipe's
Scale transforms, learned further; that between q and k serves quantized K. Left out: shifts, which
need biases that RMSNorm models lack.
"""

from dataclasses import dataclass

import torch

from lowbit.errors import InputError
from lowbit.rounding.block import (
    BlockProblem,
    BlockRounder,
    LearnedBlock,
    check_count,
    check_rate,
)
from lowbit.rounding.learned import Clipping


@dataclass(frozen=True)
class OmniQuant(BlockRounder):
    """The options of the publication.

    epochs               over the samples, for each block
    batch                samples in a step
    learning_rate        of the clipping
    learn_scales         learn the recipe's scales further
    scale_learning_rate  of those
    augmented            a second target: what the block in full precision makes of the inputs that
                         the block will have (the authors' aug_loss, for 2 bits)
    """

    epochs: int = 20
    batch: int = 1
    learning_rate: float = 1e-2
    learn_scales: bool = False
    scale_learning_rate: float = 5e-3
    augmented: bool = False
    keeps_best = False

    def __post_init__(self):
        for name in ("epochs", "batch"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "scale_learning_rate"):
            check_rate(name, getattr(self, name))

    def learned(self, problem: BlockProblem) -> LearnedBlock:
        if self.learn_scales and not problem.spaces:
            raise InputError("learn_scales needs a recipe that scales, got one without Scale")
        weights = (problem.block.get_submodule(name).weight for name in problem.linears)
        spaces = problem.spaces if self.learn_scales else ()
        return LearnedBlock(problem, [Clipping(w, problem.format) for w in weights], spaces)

    def optimizer(self, learned: LearnedBlock) -> tuple[torch.optim.Optimizer, None]:
        groups = [{"params": list(learned.quantizers.parameters()), "lr": self.learning_rate}]
        if len(learned.scales):
            groups.append({"params": list(learned.scales), "lr": self.scale_learning_rate})
        return torch.optim.AdamW(groups, weight_decay=0.0), None

    def steps_for(self, samples: int) -> int:
        return self.epochs * max(1, samples // self.batch)
