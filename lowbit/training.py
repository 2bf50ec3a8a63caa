"""Learning rotations end to end: next-token loss of the fake-quantized model, weights frozen.

SpinQuant (Liu et al. 2024, arXiv 2405.16406, section 3), and DuaRot's parameters with it. Written
from the papers. A copy of the model, in fp32, has its norms folded and its fixed rotations fused;
learned ones multiply its weights in every forward, so that their gradient is that of the loss.
Quantizers are straight-through where they round; the gradient follows the ranges they take, so that
what makes rows flatter is learned too. Memory: a copy of the model in fp32 beside the model, which
is whole, unlike in the executor; activations of TOKENS_AT_ONCE tokens between blocks; one block's
own and its rotated weights, for a block runs again in the backward pass. Several processes share
the sequences of a batch.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from lowbit import parallel
from lowbit.errors import InputError
from lowbit.formats import IntFormat, QuantFormat
from lowbit.learning_attention import QuantizedKV, attend_through
from lowbit.progress import Progress
from lowbit.rounding.grid import check_clip, clipped_share
from lowbit.rounding.learned import clipped_through, simulate
from lowbit.transforms import FittedTransforms, Rotation
from lowbit.transforms.cayley import CayleySGD
from lowbit.transforms.learned import LearnedRotation, Learner

SAVE_EVERY = 10  # steps; as often ranges of weights are searched for anew
TOKENS_AT_ONCE = 2048  # of one forward: weights are turned anew in each
STATE = "training"  # the name it is saved under


@dataclass(frozen=True)
class Training:
    """steps x batch sequences of `length` tokens, each step a step of CayleySGD; lr to 0 by cosine.

    weights   how ranges of weights that are quantized in the loop too are clipped, one of
              lowbit/rounding/grid.py: for weights that will be rounded to nearest, and then in the
              same way. None, full precision, is better for GPTQ's; where a format quantizes weights
              alone it is as "weight", or there would be nothing to learn from
    autocast  products in bf16, as published: several times as fast on tensor cores, and on CPUs
              that have such units
    """

    steps: int = 100
    batch: int = 8
    length: int = 2048
    lr: float = 1.5
    weights: str | None = None
    autocast: bool = True

    def __post_init__(self):
        if self.weights is not None:
            check_clip(self.weights)
            if self.weights.startswith("output"):
                raise InputError(f"weights: no clip by output in the loop, got {self.weights!r}")

    @property
    def samples(self) -> int:
        return self.steps * self.batch

    def clip_of_weights(self, format: QuantFormat) -> str | None:
        """In the loop; None: they are in full precision there."""
        if format.weight is None:
            return None
        alone = format.activation is None and format.kv is None
        return self.weights or ("weight" if alone else None)

    def learn(self, model, fitted, format, clips, windows, seed, progress, saved):
        """learn_rotations: nothing in it is random, once there are windows and transforms."""
        return learn_rotations(model, fitted, self, format, clips, windows, saved, progress)

    def lr_at(self, step: int) -> float:
        return self.lr * max(0.5 * (1 + math.cos(math.pi * step / self.steps)), 1e-4)


def learn_rotations(
    model: PreTrainedModel,
    fitted: FittedTransforms,
    training: Training,
    format: QuantFormat,
    clips: tuple[float, float],
    windows: Tensor,
    saved: Progress,
    progress: bool = True,
) -> tuple[FittedTransforms, dict]:
    """The transforms with their learned rotations learned, and a report; `model` stays as it is.

    windows  int64 [samples, length], taken in turn
    saved    where the state lies every SAVE_EVERY steps; where there is one, learning goes on from
             it, to the same bits
    """
    learned = list(fitted.learned.values())
    twin, learners = _trainable(model, fitted, learned, training, format, clips)
    parameters = [p for learner in learners for p in learner.parameters()]
    optimizer = CayleySGD(parameters, lr=training.lr)
    losses = _take_up(saved.load(STATE), parameters, optimizer)
    steps = range(len(losses), training.steps)
    at_once = max(1, TOKENS_AT_ONCE // windows.shape[1])
    with torch.enable_grad(), tqdm(steps, "learn", disable=not progress) as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = training.lr_at(step)
            optimizer.zero_grad()
            if step % SAVE_EVERY == 0:
                _forget_ranges(twin)
            total = 0.0
            taken = torch.arange(step * training.batch, (step + 1) * training.batch)
            own = taken[parallel.own()] % len(windows)
            for part in own.split(at_once) if len(own) else ():
                rows = windows[part].to(model.device)
                with torch.autocast(rows.device.type, torch.bfloat16, training.autocast):
                    loss = twin(rows, labels=rows, use_cache=False).loss
                loss = loss * len(rows) / training.batch
                loss.backward()
                total += loss.item()
            total = parallel.total(total)
            for parameter in parameters:
                parallel.gradient(parameter)
            if not math.isfinite(total):
                raise InputError(
                    f"the loss must be finite, got {total} at step {step}: lower training.lr"
                )
            optimizer.step()
            losses.append(total)
            if len(losses) % SAVE_EVERY == 0 or len(losses) == training.steps:
                saved.save(
                    STATE, {"losses": losses, "parameters": [p.detach() for p in parameters]}
                )
            bar.set_postfix(loss=f"{total:.4f}")
    by_space = {
        r.space: r.replaced(learner.matrices())
        for r, learner in zip(learned, learners, strict=True)
    }
    tail = losses[-max(1, len(losses) // 10) :]
    report = {"first_loss": losses[0], "last_loss": sum(tail) / len(tail), "losses": losses}
    return fitted.with_learned(by_space), report


def _take_up(state: dict | None, parameters: list[nn.Parameter], optimizer: CayleySGD) -> list:
    """The losses so far, of a state that was saved or of none, which is put back."""
    if state is None:
        return []
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.steps = len(state["losses"])
    return state["losses"]


def _trainable(
    model: PreTrainedModel,
    fitted: FittedTransforms,
    learned: list[LearnedRotation],
    training: Training,
    format: QuantFormat,
    clips: tuple[float, float],
) -> tuple[PreTrainedModel, list]:
    adapter = fitted.adapter
    twin = copy.deepcopy(model).float().requires_grad_(False)
    fixed = tuple(r for r in fitted.rotations if isinstance(r, Rotation))
    fixed = FittedTransforms(adapter, fitted.fold_norms, fixed)
    fixed.fuse_ends(twin)
    blocks = twin.get_submodule(adapter.block_path)
    learners = [r.learner(len(blocks), model.device) for r in learned]
    turns = {r.space: learner for r, learner in zip(learned, learners, strict=True)}
    activation_clip, kv_clip = clips
    for index, block in enumerate(blocks):
        fixed.fuse_block(block, index)
        for name in adapter.linears:
            reads = [s for s in turns if name in adapter.spaces[s].readers]
            plain = block.get_submodule(name)
            grid = adapter.input_format(name, plain.in_features, format.activation)
            linear = _LearningLinear(
                plain,
                reads=[turns[s] for s in reads],
                writes=[
                    (turns[s], adapter.spaces[s])
                    for s in turns
                    if name in adapter.spaces[s].writers
                ],
                index=index,
                online=[turns[s] for s in reads if not adapter.spaces[s].writers],
                activation=(grid, activation_clip),
                weight=(format.weight, training.clip_of_weights(format)),
            )
            block.set_submodule(name, linear)
        for space, learner in turns.items():
            for name in adapter.spaces[space].float_readers:
                block.get_submodule(name).register_forward_pre_hook(_turn_back(learner))
        fixed.hook_online(block, index)
        if format.kv is not None:
            learner, rotation = turns.get("query_key"), fixed.query_key_at(index)
            turn = rotation and rotation.apply
            if learner is not None:
                turn = partial(learner.turn, index=index)
            kv = QuantizedKV(format.kv, turn, kv_clip, model.device)
            attend_through(block.get_submodule(adapter.attention), kv)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for space, learner in turns.items():
        ends = adapter.spaces[space]
        if ends.embedding:
            twin.get_submodule(ends.embedding).register_forward_hook(_turn_output(learner))
        if ends.head:
            twin.get_submodule(ends.head).register_forward_pre_hook(_turn_back(learner))
    return twin, learners


def _quantized(x: Tensor, format: IntFormat | None, clip: float) -> Tensor:
    return x if format is None else clipped_through(x.float(), format, x.new_full((), clip))


class _LearningLinear(nn.Module):
    """A linear whose weight is turned by the learners of the spaces it reads and writes.

    share  [N, G] of the whole ranges of the turned weight, to which they are clipped; None: unknown
    """

    def __init__(self, linear: nn.Linear, reads, writes, index: int, online, activation, weight):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # in a tuple: they belong to the optimizer, not to this module
        self.learners = (tuple(reads), tuple(writes), tuple(online))
        self.index = index
        self.activation, self.weight_quantizer = activation, weight
        self.share: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        reads, writes, online = self.learners
        for learner in reads:
            weight = learner.turn(weight, self.index)
        for learner, space in writes:
            turned = learner.turn(space.written(weight).T, self.index).T
            weight = space.rewritten(weight, turned)
            if bias is not None:
                turned = learner.turn(space.written(bias)[None], self.index)[0]
                bias = space.rewritten(bias, turned)
        format, clip = self.weight_quantizer
        if clip is not None:
            with torch.autocast(x.device.type, enabled=False):  # as they will be rounded: in fp32
                weight = self._rounded(weight.float(), format, clip)
        for learner in online:
            x = learner.turn(x, self.index)
        return F.linear(_quantized(x, *self.activation), weight, bias)

    def _rounded(self, weight: Tensor, format: IntFormat, clip: str) -> Tensor:
        if self.share is None:
            self.share = clipped_share(weight.detach(), format, clip)
        low = None if format.symmetric else self.share
        return simulate(weight, format, self.share, low).values


def _forget_ranges(twin: nn.Module):
    for module in twin.modules():
        if isinstance(module, _LearningLinear):
            module.share = None


def _turn_output(learner: Learner):
    return lambda _module, _args, output: learner.turn(output, 0)


def _turn_back(learner: Learner):
    return lambda _module, args: (args[0] @ learner.matrices()[0][0].T, *args[1:])
