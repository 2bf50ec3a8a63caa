"""Block rounders: learn how to round the weights of a whole block, by gradient.

    minimize   sum |block(x; Q(W; p)) - y|^2        over p, the parameters of its quantizers

x enters the block, y is what the block made of it in full precision. Of the samples a random batch
at a time; where the format quantizes activations or the KV cache, hooks quantize what the linears
read, K and V, straight through for gradients.

Where several processes calibrate, each has its share of the samples; batches, losses and gradients
are those of all.

Whatever was learned is compared over all samples with rounding to nearest: the better one is kept.

Memory, beyond what calibration holds already: 9 times the block's linear weights in fp32 where
each has a learned offset (offset, its gradient, the best so far; values, their gradient; the rest
for the backward pass of the quantizer), else 7 times; and the activations of one piece of
lowbit/streams.py, whatever the batch. Same seed, same bits on a CPU; on CUDA torch's backward of
attention may add in any order.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lowbit import parallel
from lowbit.errors import InputError
from lowbit.formats import IntFormat, PackedTensor
from lowbit.models.spaces import Space
from lowbit.ops import dequantize
from lowbit.rounding.learned import Simulated
from lowbit.rounding.rtn import RTN, packed_weight
from lowbit.transforms.channels import fuse_scale, scaled_tensors

Tensors = dict[str, Tensor]  # by their names in the block
MOST_TRIMMED = 0.1  # of the elements of an output


@dataclass(frozen=True)
class BlockProblem:
    """A block and what it should do.

    block    in fp32, with the hooks that rotate and quantize what its linears read
    linears  of the block, to be rounded
    format   of their weights
    device   of the block; pieces may lie elsewhere
    spaces   of the block, whose channels were scaled
    run      (hidden, tensors) -> the block's output, `tensors` in place of its own of these names
    inputs   pieces fp32 [samples, length, hidden], all but the last of the same size: of the
             samples of this process
    targets  each the pieces of an output that is wanted
    trimmed  share of the elements of a sample's output, those furthest off, that do not count
    """

    block: nn.Module
    linears: tuple[str, ...]
    format: IntFormat
    device: torch.device
    spaces: tuple[Space, ...]
    run: Callable[[Tensor, Tensors], Tensor]
    inputs: list[Tensor]
    targets: list[list[Tensor]]
    trimmed: float = 0.0

    @cached_property
    def samples(self) -> int:
        """Of all processes."""
        return int(parallel.total(self._own_samples))

    @property
    def _own_samples(self) -> int:
        return sum(len(piece) for piece in self.inputs)

    @property
    def piece(self) -> int:
        """Samples that go through the block at once."""
        return len(self.inputs[0])

    def errors(self, tensors: Tensors, samples: Tensor) -> Tensor:
        """Squared errors [n] of these of this process's samples, int64 [n]."""
        output = self.run(self._pick(self.inputs, samples), tensors)
        wanted = (self._pick(pieces, samples) for pieces in self.targets)
        return sum(self._lost((output - y).square().flatten(1)) for y in wanted)

    @torch.no_grad()
    def all_errors(self, tensors: Tensors) -> Tensor:
        """Squared errors of all samples, fp64 on the CPU."""
        parts = torch.arange(self._own_samples).split(self.piece)
        errors = torch.zeros(self.samples, dtype=torch.float64)
        errors[parallel.own()] = torch.cat([self.errors(tensors, p).double().cpu() for p in parts])
        return parallel.sum_(errors)

    def power(self) -> float:
        """What errors are relative to: the sum of squares of the targets."""
        own = sum(y.square().sum().item() for pieces in self.targets for y in pieces)
        return parallel.total(own)

    def _lost(self, squares: Tensor) -> Tensor:
        """Sums [n] of squares [n, elements], but for the largest."""
        count = int(self.trimmed * squares.shape[1])
        if not count:
            return squares.sum(1)
        largest = squares.detach().topk(count, 1, sorted=False).indices
        return squares.scatter(1, largest, 0.0).sum(1)

    def _pick(self, pieces: list[Tensor], samples: Tensor) -> Tensor:
        places = (divmod(i, self.piece) for i in samples.tolist())
        return torch.stack([pieces[i][j] for i, j in places]).to(self.device)


class LearnedBlock(nn.Module):
    """What is learned of a block: a quantizer for each linear, a scale for each space.

    A quantizer is a module, weight [N, K] -> Simulated. The scales, fp32 [dim * inner], start at 1:
    from what the recipe's transforms made of the block.
    """

    LEAST_SCALE = 1e-2

    def __init__(
        self, problem: BlockProblem, quantizers: list[nn.Module], spaces: tuple[Space, ...] = ()
    ):
        super().__init__()
        self.problem, self.spaces = problem, spaces
        self.quantizers = nn.ModuleList(quantizers)
        self.scales = nn.ParameterList(
            torch.ones(space.dim * space.inner, device=problem.device) for space in spaces
        )

    def forward(self) -> tuple[Tensors, dict[str, Simulated]]:
        """The tensors that take the place of the block's, and linear -> what it is packed from."""
        tensors = dict(self.problem.block.named_parameters())
        changed = self.transformed(tensors)
        simulated = {}
        for name, quantizer in zip(self.problem.linears, self.quantizers, strict=True):
            weight = f"{name}.weight"
            simulated[name] = quantizer(changed.get(weight, tensors[weight]))
            changed[weight] = simulated[name].values
        return changed, simulated

    def transformed(self, tensors: Tensors) -> Tensors:
        """Of the block's tensors those that change before anything is quantized."""
        changed = {}
        for space, scale in zip(self.spaces, self.scales, strict=True):
            changed.update(scaled_tensors({**tensors, **changed}, space, scale))
        return changed

    @torch.no_grad()
    def project(self):
        """Parameters back to where they are allowed, after a step."""
        for scale in self.scales:
            scale.clamp_(min=self.LEAST_SCALE)
        for quantizer in self.quantizers:
            quantizer.project()

    def fuse(self):
        """The scales into the block itself, in place."""
        for space, scale in zip(self.spaces, self.scales, strict=True):
            fuse_scale(self.problem.block, space, scale.detach())


class BlockRounder:
    """Base of the frozen dataclasses that are methods; what differs is below, `batch` is a field.

    augmented   the block in full precision, on the inputs it will have, is a second target
    keeps_best  the parameters of the step of least loss; else those of the last one. A batch's
                loss is taken in units of what rounding to nearest loses on the same samples, so
                that a batch of easy samples is no better for it
    autocast    products of a step in bf16; what is kept is compared in fp32
    trimmed     BlockProblem's, of all errors here
    """

    streams: tuple[str, ...] = ("rounded", "full")
    true_sequential = False
    quantized_inputs = True
    augmented = False
    keeps_best: ClassVar[bool]
    autocast = False
    trimmed = 0.0
    batch: int

    def learned(self, problem: BlockProblem) -> LearnedBlock:
        raise NotImplementedError

    def optimizer(self, learned: LearnedBlock) -> tuple[Optimizer, LRScheduler | None]:
        raise NotImplementedError

    def steps_for(self, samples: int) -> int:
        raise NotImplementedError

    def round_block(
        self, problem: BlockProblem, generator: torch.Generator, show: Callable[[str], None]
    ) -> tuple[dict[str, PackedTensor], dict]:
        """linear -> packed weight, and a report; learned scales are fused into problem.block.

        Report, errors over all samples relative to the power of the targets:

            rtn_error   of rounding to nearest
            error       of what is kept, at most rtn_error
            step        the step whose parameters are kept, None: those of rounding to nearest
            stopped     the step whose loss was not finite, where learning ended; else absent

        `show` is told how it goes.
        """
        problem = replace(problem, trimmed=self.trimmed)
        weights = {name: problem.block.get_submodule(name).weight for name in problem.linears}
        nearest = {name: RTN().round(w, problem.format)[0] for name, w in weights.items()}
        rtn = problem.all_errors({f"{n}.weight": dequantize(t) for n, t in nearest.items()})
        total = rtn.sum().item()
        report = dict.fromkeys(("rtn_error", "error"), total / problem.power() if total else 0.0)
        report["step"] = None
        if total == 0:
            return nearest, report

        learned = self.learned(problem)
        count = self.steps_for(problem.samples)
        step, stopped = learn(
            learned,
            *self.optimizer(learned),
            batches(problem.samples, self.batch, count, generator),
            rtn,
            self.keeps_best,
            lambda step, loss: show(f"step {step + 1} of {count}, loss {loss:.3f} of RTN's"),
            self.autocast,
        )
        if stopped is not None:
            report["stopped"] = stopped
        if step is None:
            return nearest, report
        with torch.no_grad():
            tensors, simulated = learned()
        lost = problem.all_errors(tensors).sum().item()
        if not lost <= total:  # NaN is no better either
            return nearest, report
        learned.fuse()
        report.update(error=report["rtn_error"] * lost / total, step=step)
        return {
            name: packed_weight(s.codes, s.grid, problem.format) for name, s in simulated.items()
        }, report


@torch.enable_grad()
def learn(
    learned: LearnedBlock,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    steps: Iterator[Tensor],
    first: Tensor,
    keeps_best: bool,
    show: Callable[[int, float], None],
    autocast: bool = False,
) -> tuple[int | None, int | None]:
    """Train in place; (the step whose parameters are left, the step that was not finite).

    steps  the samples of each
    first  errors fp64 [samples] that losses are in units of, on the same samples
    show   is told step and loss
    """
    problem, parameters = learned.problem, list(learned.parameters())
    kept = [p.detach().clone() for p in parameters]
    kept_step, stopped, least, unit = None, None, math.inf, first.mean().item()
    for step, samples in enumerate(steps):
        tensors = learned()[0]
        lost, gradients = descent(problem, tensors, samples, unit * len(samples), autocast)
        loss = (lost / first[samples].sum()).item()
        if not math.isfinite(loss):
            stopped = step
            break
        show(step, loss)
        if loss < least or not keeps_best:
            least, kept_step = loss, step
            for copy, p in zip(kept, parameters, strict=True):
                copy.copy_(p.detach())
        optimizer.zero_grad()
        torch.autograd.backward(list(tensors.values()), gradients)
        del tensors, gradients  # before the next ones are made
        optimizer.step()
        if schedule is not None:
            schedule.step()
        learned.project()
    with torch.no_grad():
        for copy, p in zip(kept, parameters, strict=True):
            p.copy_(copy)
    return kept_step, stopped


def descent(
    problem: BlockProblem, tensors: Tensors, samples: Tensor, unit: float, autocast: bool
) -> tuple[float, list[Tensor]]:
    """Squared error of these samples, and the gradients of error / unit by each of `tensors`.

    Piece by piece, so that a batch takes no more activations than a piece; how the tensors depend
    on parameters is gone back through once, by the caller.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    total = 0.0
    _, own = parallel.among_own(samples)
    for part in own.split(problem.piece) if len(own) else ():
        with torch.autocast(problem.device.type, torch.bfloat16, autocast):
            error = problem.errors(leaves, part).sum()
        (error / unit).backward()
        total += error.item()
    for leaf in leaves.values():
        if leaf.grad is None:  # of an expert that none of these tokens reaches
            leaf.grad = torch.zeros_like(leaf)
    return parallel.total(total), [parallel.gradient(leaf) for leaf in leaves.values()]


def batches(count: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of the numbers 0 .. count - 1: in random order, then in another one."""
    batch = min(batch, count)
    order: tuple[Tensor, ...] = ()
    for _ in range(steps):
        if not order:
            whole = count - count % batch
            order = torch.randperm(count, generator=generator)[:whole].split(batch)
        yield order[0]
        order = order[1:]


def check_count(name: str, value: int):
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")


def check_rate(name: str, value: float):
    if not isinstance(value, float) or not value > 0:
        raise InputError(f"{name} must be a positive float, got {value!r}")


def check_trimmed(value: float):
    if not 0 <= value <= MOST_TRIMMED:
        raise InputError(f"trimmed must be in 0..{MOST_TRIMMED}, got {value}")
