"""Fitting rotations to the distribution of activations alone: no loss, no backward of the model.

DartQuant (Yuan et al. 2025, arXiv 2511.04063), sections 4.1 and 4.2; written from the paper.
Activations in a space, each row brought to a root mean square of 1, are wanted flat, so that a grid
of few levels wastes none on outliers. The Whip loss pulls small numbers away from 0, and as a
rotation keeps a row's length, large ones give way:

    minimize mean over rows and channels of exp(-|x R|),   R = Q of the QR decomposition of Z

over Z by Adam. What is fitted: the residual stream as the linears that read it see it, without the
gains of norms; values as their linear writes them.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowbit import parallel
from lowbit.models import Adapter
from lowbit.models.spaces import Space
from lowbit.streams import Stream, check_finite
from lowbit.transforms import FittedTransforms
from lowbit.transforms.learned import LearnedRotation


@dataclass(frozen=True)
class Distribution:
    """rows: activations of each block that a rotation is fitted to, chosen at random; samples of
    `length` tokens run through the model in full precision to get them."""

    steps: int = 200
    lr: float = 0.01
    rows: int = 1024
    samples: int = 32
    length: int = 512

    def learn(self, model, fitted, format, clips, windows, seed, progress, saved):
        """fit_rotations, whatever the format and its clips; saved by the caller once it is done."""
        return fit_rotations(model, fitted, self, windows, seed, progress)


def fit_rotations(
    model: PreTrainedModel,
    fitted: FittedTransforms,
    spec: Distribution,
    windows: Tensor,
    seed: int,
    progress: bool = True,
) -> tuple[FittedTransforms, dict]:
    """The transforms with their learned rotations fitted, and a report; `model` stays as it is.

    windows  int64 [samples, length]
    """
    wanted = list(fitted.learned.values())
    found = _activations(model, fitted, wanted, spec.rows, windows, seed)
    report, by_space = {}, {}
    for rotation in wanted:
        parts = found[rotation.space]
        if not rotation.spec.per_block:
            parts = [torch.cat(parts)]
        losses, matrices = [], []
        for index, x in enumerate(tqdm(parts, f"fit {rotation.space}", disable=not progress)):
            matrix, first, last = whip(x, rotation.at(index).learned[0].to(x), spec)
            matrices.append(matrix)
            losses.append((first, last))
        by_space[rotation.space] = rotation.replaced([torch.stack(matrices)])
        first, last = (sum(part) / len(losses) for part in zip(*losses, strict=True))
        report[rotation.space] = {"first_loss": first, "last_loss": last}
    return fitted.with_learned(by_space), report


def whip(x: Tensor, start: Tensor, spec: Distribution) -> tuple[Tensor, float, float]:
    """(R [n, n], loss at `start`, loss at R) for activations x [rows, n]."""
    x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    z = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([z], lr=spec.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.steps)

    def loss_at(matrix: Tensor) -> Tensor:
        return (-(x @ matrix).abs()).exp().mean()

    with torch.enable_grad():
        for _ in range(spec.steps):
            optimizer.zero_grad()
            loss_at(_orthogonal(z)).backward()
            optimizer.step()
            schedule.step()
    matrix = _orthogonal(z).detach()
    return matrix, loss_at(start).item(), loss_at(matrix).item()


def _orthogonal(z: Tensor) -> Tensor:
    """Q of z = Q R with a positive diagonal of R: z itself where z is orthogonal."""
    q, r = torch.linalg.qr(z)
    return q * r.diagonal().sign()


def _activations(
    model: PreTrainedModel,
    fitted: FittedTransforms,
    wanted: list[LearnedRotation],
    rows: int,
    windows: Tensor,
    seed: int,
) -> dict[str, list[Tensor]]:
    """space -> rows [n, dim] of each block, in full precision, norms folded."""
    adapter = fitted.adapter
    twin = copy.deepcopy(model).float().requires_grad_(False)
    folded = FittedTransforms(adapter, fitted.fold_norms, ())
    folded.fuse_ends(twin)
    stream = Stream(twin, adapter, windows)
    generator = torch.Generator().manual_seed(seed)
    found = {rotation.space: [] for rotation in wanted}
    for index, block in enumerate(twin.get_submodule(adapter.block_path)):
        folded.fuse_block(block, index)
        for rotation in wanted:
            space = adapter.spaces[rotation.space]
            places = _places(adapter, space)
            x = torch.stack([_in_space(block, name, space, stream) for name in places])
            check_finite(f"in {rotation.space} of block {index}", x)
            found[rotation.space].append(_chosen(x, stream.windows, rows, generator))
        stream.advance(block)
    return found


def _chosen(x: Tensor, windows: int, rows: int, generator: torch.Generator) -> Tensor:
    """Random rows [n, dim] of x [places, windows, rows, dim], of which a process has its windows:
    all come to the same."""
    shape = (len(x), windows, x.shape[2])
    chosen = torch.randperm(math.prod(shape), generator=generator)[:rows]
    place, window, row = (part.to(x.device) for part in torch.unravel_index(chosen, shape))
    mine, window = parallel.among_own(window)
    found = x.new_zeros(len(chosen), x.shape[-1])
    found[mine] = x[place[mine], window, row[mine]]
    return parallel.sum_(found)


def _places(adapter: Adapter, space: Space) -> list[str]:
    """Modules that show what the space holds: where it joins blocks, one that reads each norm; else
    what writes it."""
    if not space.embedding:
        return list(space.writers)
    return [norm.readers[0] for norm in adapter.norms]


def _in_space(block: nn.Module, name: str, space: Space, stream: Stream) -> Tensor:
    """[windows, rows, dim]: what the module `name` reads or, in a space inside the block, writes;
    of this process's windows."""
    parts = list(stream.inputs(block, name))
    if not space.embedding:
        linear = block.get_submodule(name)
        parts = [space.written(linear(x).T).T for x in parts]
    x = torch.cat(parts).unflatten(-1, (-1, space.dim))  # [tokens, heads, dim]
    return x.unflatten(0, (-1, stream.length)).flatten(1, 2)
