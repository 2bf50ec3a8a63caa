"""Flattening a block: its maps, scales and clips learned together, before its weights are rounded.

FlatQuant (Sun et al. 2024, arXiv 2410.09426), section 3; written from the paper. For each block

    minimize   sum |block_q(x) - block(x)|^2        x: activations in full precision

over the maps (lowbit/transforms/maps.py), the scales that the recipe begins with, and clips, each
share a sigmoid: of the range of each weight group, of the inputs of each stage of linears, and of
K and V. Ranges of weights begin where rounding them loses least, all others nearly whole. block_q
quantizes weights, inputs, K and V, straight through for gradients; all at once, unlike what rounds
afterwards, so that a map serves every quantizer behind it. Where the rounder's clip is "none",
weights are rounded on the ranges learned here; else it finds its own behind the maps.

What is learned is compared over all samples with what it began with: the better one is kept.
Memory, beyond what calibration holds already: 15 times the block's linear weights in fp32, a copy
of the block included, and the activations of one piece of lowbit/streams.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.formats import IntFormat, QuantFormat
from lowbit.learning_attention import BEFORE, QuantizedKV, attend_through
from lowbit.models import Adapter
from lowbit.rounding.block import (
    BlockProblem,
    LearnedBlock,
    Tensors,
    batches,
    check_count,
    check_rate,
    check_trimmed,
    learn,
)
from lowbit.rounding.learned import FIRST_LOGIT, Clipping, clipped_through
from lowbit.transforms import FittedTransforms, Map, OnlineTransform
from lowbit.transforms.channels import fuse_scale
from lowbit.transforms.maps import LearningMap
from lowbit.transforms.rotation import apply_stages

LEAST_LR = 1e-3  # what is left of a learning rate at the end, as a share
LEAST_LOGIT = -8.0  # of a clip, which must not reach 0
# Name of the modules that are put in front of a block's stages while it is learned.
INPUT = "lowbit_input"


@dataclass(frozen=True)
class Flat:
    """What was learned of a block, but for the ranges of its weights, which grids are made of.

    maps    of this block
    scales  space -> fp32 [dim * inner]
    clips   linear, or attention for K and V, -> clip ratio, an fp32 number
    report  see Flattening.fit
    """

    maps: tuple[Map, ...] = ()
    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    def put_into(self, block: nn.Module, adapter: Adapter) -> list:
        """Fuse scales and maps into a block, in fp64; handles of hooks for what runs online."""
        for space, scale in self.scales.items():
            fuse_scale(block, adapter.spaces[space], scale)
        maps = FittedTransforms(adapter, False, self.maps)
        maps.fuse_block(block, 0)
        return maps.hook_online(block, 0)

    def online(self, adapter: Adapter) -> dict[str, tuple[Tensor, ...]]:
        """linear -> the factors of the map in front of it, as OnlineMap.assign takes them."""
        return FittedTransforms(adapter, False, self.maps).learned_matrices(0)

    def state(self) -> dict:
        """All but the report, tensors on the CPU, in dicts."""
        return {
            "maps": {m.space: [list(m.learned), list(m.inverse)] for m in self.maps},
            "scales": {space: scale.cpu() for space, scale in self.scales.items()},
            "clips": self.clips,
        }

    @classmethod
    def of_state(cls, state: dict, maps: tuple[Map, ...], device: torch.device) -> "Flat":
        """Inverse of state(), of maps that began as these."""
        learned = [
            replace(m, learned=tuple(forward), inverse=tuple(inverse))
            for m in maps
            if m.space in state["maps"]
            for forward, inverse in (state["maps"][m.space],)
        ]
        scales = {space: scale.to(device) for space, scale in state["scales"].items()}
        return cls(tuple(learned), scales, state["clips"])


@dataclass(frozen=True)
class Flattening:
    """The settings of the publication.

    epochs              over the samples, for each block
    batch               samples in a step
    learning_rate       of maps and scales; like the next one it falls by cosine
    clip_learning_rate  of the logits of clips
    condition           largest condition number of a factor of a map
    trimmed             share of the elements of a sample's output that count for nothing, those
                        furthest off, as of AutoRound; the publication has none
    """

    epochs: int = 15
    batch: int = 4
    learning_rate: float = 5e-3
    clip_learning_rate: float = 5e-2
    condition: float = 100.0
    trimmed: float = 0.0

    def __post_init__(self):
        for name in ("epochs", "batch"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "clip_learning_rate"):
            check_rate(name, getattr(self, name))
        if not 1 <= self.condition <= 1e4:
            raise InputError(f"condition must be in 1..10000, got {self.condition}")
        check_trimmed(self.trimmed)

    def fit(
        self,
        problem: BlockProblem,
        fitted: FittedTransforms,
        format: QuantFormat,
        index: int,
        generator: torch.Generator,
        show: Callable[[str], None],
    ) -> tuple[Flat, list[Clipping]]:
        """What is learned of block `index`, and the shares of its weights' ranges, for each of
        problem.linears. problem.block gains modules and hooks: it must be a copy.

        Report, errors over all samples relative to the power of the targets:

            start_error  of what learning begins with
            error        of what is kept, at most start_error
            step         the step whose parameters are kept, None: those of the start
            stopped      the step whose loss was not finite, where learning ended; else absent
            conditions   space -> condition number of its map
        """
        problem = replace(problem, trimmed=self.trimmed)
        flat = FlatBlock(problem, fitted, format, self.condition)
        flat.install(index)
        start = self._errors(flat)
        total, power = start.sum().item(), problem.power()
        report = dict.fromkeys(("start_error", "error"), total / power if total else 0.0)
        report["step"] = None
        if total:
            begun = {name: p.clone() for name, p in flat.state_dict().items()}
            step, stopped = self._learn(flat, start, generator, show)
            if stopped is not None:
                report["stopped"] = stopped
            lost = self._errors(flat).sum().item()
            if step is not None and lost < total:  # NaN is no better either
                report.update(error=lost / power, step=step)
            else:
                flat.load_state_dict(begun)
        learned = flat.learned(report)
        report["conditions"] = {m.space: m.condition for m in learned.maps}
        return learned, list(flat.quantizers)

    @torch.no_grad()
    def _errors(self, flat: "FlatBlock") -> Tensor:
        return flat.problem.all_errors(flat()[0])

    def _learn(
        self,
        flat: "FlatBlock",
        start: Tensor,
        generator: torch.Generator,
        show: Callable[[str], None],
    ) -> tuple[int | None, int | None]:
        samples = flat.problem.samples
        steps = self.epochs * max(1, samples // self.batch)
        clips = [*flat.quantizers.parameters(), *flat.logits]
        groups = [
            {"params": [*flat.maps.parameters(), *flat.scales], "lr": self.learning_rate},
            {"params": clips, "lr": self.clip_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.5 * (1 + math.cos(math.pi * step / steps)), LEAST_LR)
        )
        return learn(
            flat,
            optimizer,
            schedule,
            batches(samples, self.batch, steps, generator),
            start,
            keeps_best=False,
            show=lambda step, loss: show(f"flatten {step + 1} of {steps}, {loss:.3f} of the start"),
        )


class FlatBlock(LearnedBlock):
    """A block's scales and quantizers of weights, and beside them maps and the other clips."""

    def __init__(
        self, problem: BlockProblem, fitted: FittedTransforms, format: QuantFormat, condition: float
    ):
        weights = [problem.block.get_submodule(name).weight for name in problem.linears]
        super().__init__(problem, [Clipping(w, format.weight) for w in weights], problem.spaces)
        self.fitted, self.format, self.adapter = fitted, format, fitted.adapter
        device = weights[0].device
        self.maps = nn.ModuleList(LearningMap(m, condition, device) for m in fitted.maps)
        # by what holds the module that clips, whose name may have dots
        places = [stage[0] for stage in self.adapter.stages] if format.activation else []
        self.places = places + ([self.adapter.attention] if format.kv else [])
        logits = (torch.tensor(FIRST_LOGIT, device=device) for _ in self.places)
        self.logits = nn.ParameterList(nn.Parameter(logit) for logit in logits)
        tensors = dict(problem.block.named_parameters())
        with torch.no_grad():
            tensors |= self.transformed(tensors)
        for name, clipping in zip(problem.linears, self.quantizers, strict=True):
            clipping.begin(tensors[f"{name}.weight"])

    def install(self, index: int):
        """Put into problem.block what maps and quantizes inputs, K and V, as tensors say."""
        block, adapter = self.problem.block, self.adapter
        for stage in adapter.stages:
            base = next((m.start.base for m in self.maps if stage[0] in self._online(m)), None)
            width = block.get_submodule(stage[0]).in_features
            grid = adapter.input_format(stage[0], width, self.format.activation)
            _install_input(block, stage, _Input(base, grid))
        if self.format.kv is not None:
            rotation = self.fitted.query_key_at(index)
            kv = QuantizedKV(self.format.kv, rotation and rotation.apply)
            attend_through(block.get_submodule(adapter.attention), kv)

    def _online(self, learning: LearningMap) -> tuple[str, ...]:
        """The linears in front of which it runs."""
        space = self.adapter.spaces[learning.start.space]
        return () if space.writers else space.readers

    def transformed(self, tensors: Tensors) -> Tensors:
        changed = super().transformed(tensors)

        for learning in self.maps:
            space = self.adapter.spaces[learning.start.space]
            forward, inverse = learning.matrices()
            for name in (f"{reader}.weight" for reader in space.readers):
                changed[name] = learning.turn(changed.get(name, tensors[name]), inverse)
            for writer in space.writers:
                for name in (f"{writer}.weight", f"{writer}.bias"):
                    if name in tensors:
                        tensor = changed.get(name, tensors[name])
                        turned = learning.turn(space.written(tensor).movedim(0, -1), forward)
                        changed[name] = space.rewritten(tensor, turned.movedim(-1, 0))
            online = self._online(learning)
            for name in (stage[0] for stage in self.adapter.stages if stage[0] in online):
                for i, matrix in enumerate(forward):
                    changed[f"{name}.{INPUT}.matrix_{i}"] = matrix
        for place, logit in zip(self.places, self.logits, strict=True):
            module = BEFORE if place == self.adapter.attention else INPUT
            changed[f"{place}.{module}.clip"] = logit.sigmoid()
        return changed

    @torch.no_grad()
    def project(self):
        super().project()
        for learning in self.maps:
            learning.project()
        for logit in self.logits:
            logit.clamp_(min=LEAST_LOGIT)

    @torch.no_grad()
    def learned(self, report: dict) -> Flat:
        stages = {stage[0]: stage for stage in self.adapter.stages}
        clips = {
            name: logit.sigmoid().item()
            for place, logit in zip(self.places, self.logits, strict=True)
            for name in stages.get(place, (place,))
        }
        scales = zip(self.fitted.scales, self.scales, strict=True)
        return Flat(
            tuple(learning.learned() for learning in self.maps),
            {spec.space: scale.detach() for spec, scale in scales},
            clips,
            report,
        )


class _Input(nn.Module):
    """What a stage of linears reads: x through the map in front of them, and quantized."""

    def __init__(self, base: OnlineTransform | None, format: IntFormat | None):
        super().__init__()
        self.base, self.format = base, format
        self.clip = nn.Parameter(torch.ones(()), requires_grad=False)
        for i, (order, _) in enumerate(base.stages if base else ()):
            matrix = nn.Parameter(torch.eye(order), requires_grad=False)
            self.register_parameter(f"matrix_{i}", matrix)
        self.shared = None

    def forward(self, x: Tensor) -> Tensor:
        if self.base is not None:
            matrices = [getattr(self, f"matrix_{i}") for i in range(len(self.base.stages))]
            x = apply_stages(x, self.base, matrices)
        return x if self.format is None else clipped_through(x, self.format, self.clip)


def _install_input(block: nn.Module, stage: tuple[str, ...], module: _Input):
    """Held by the first linear of the stage, computed once for all, which run in this order."""

    def compute(_module, args):
        module.shared = module(args[0])
        return module.shared, *args[1:]

    def share(_module, args):
        return module.shared, *args[1:]

    first, *others = (block.get_submodule(name) for name in stage)
    first.add_module(INPUT, module)
    first.register_forward_pre_hook(compute)
    for linear in others:
        linear.register_forward_pre_hook(share)
