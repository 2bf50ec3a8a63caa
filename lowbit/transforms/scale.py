"""Scales: a number for each channel of a space, fitted; lowbit/transforms/channels.py applies it.

It moves range from activations to weights (SmoothQuant, OS+) or precision to the weights that large
activations meet (AWQ). A fit proposes candidates; where there are several, that one is taken whose
quantized readers change the output of Space.judge least, in full-precision activations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbit import parallel
from lowbit.formats import IntFormat, QuantFormat
from lowbit.models.spaces import Space
from lowbit.rounding.grid import fake_quantize, on_grid, weight_grid
from lowbit.streams import Stream, check_finite
from lowbit.transforms.channels import fuse_scale, reader_columns

LEAST = 1e-5  # of a scale, and of what it is computed from


class Channels(NamedTuple):
    """Of a space's channels, fp32 [dim * inner]: largest and mean |x|, largest |w| of a reader."""

    largest: Tensor
    mean: Tensor
    weight: Tensor


@dataclass(frozen=True)
class SmoothQuant:
    """s = max|x|^alpha / max|w|^(1 - alpha): Xiao et al. 2023 (arXiv 2211.10438), equation 4."""

    alpha: float = 0.5
    tokens = 0  # nothing is tried out

    def candidates(self, channels: Channels) -> Iterator[Tensor]:
        largest, weight = channels.largest.clamp(min=LEAST), channels.weight.clamp(min=LEAST)
        yield largest**self.alpha / weight ** (1 - self.alpha)


@dataclass(frozen=True)
class AWQ:
    """s = mean|x|^r, its extremes made reciprocal; the best r of `steps` in [0, 1).

    Lin et al. 2024 (arXiv 2306.00978), section 3.2; normalized as in the authors' code.
    """

    steps: int = 20
    tokens: int = 8192  # of calibration, that candidates are tried out on

    def candidates(self, channels: Channels) -> Iterator[Tensor]:
        for step in range(self.steps):
            scale = channels.mean.clamp(min=LEAST) ** (step / self.steps)
            yield scale / (scale.amax() * scale.amin()).sqrt()


@dataclass(frozen=True)
class OutlierSuppressionPlus:
    """s = max(1, max|x| / t): channels within t stay as they are; the best of `steps` t.

    Wei et al. 2023 (arXiv 2304.09145), section 4.2; t goes from the largest |x| down to 1. The
    shift of the paper needs biases to absorb it, which RMSNorm models lack.
    """

    steps: int = 100
    tokens: int = 512

    def candidates(self, channels: Channels) -> Iterator[Tensor]:
        top = max(channels.largest.max().item(), 1.0)
        for step in range(self.steps):
            threshold = top - (top - 1) * step / self.steps
            yield (channels.largest / threshold).clamp(min=1.0)


@dataclass(frozen=True)
class Ones:
    """s = 1: for a block rounder to learn from there, as OmniQuant does between q and k."""


@dataclass(frozen=True)
class Scale:
    """Scales the channels of `space`, fitted to each block. With no readers there is nothing to
    fit to: there `fit` must be Ones."""

    space: str
    fit: SmoothQuant | AWQ | OutlierSuppressionPlus | Ones

    def fit_and_fuse(
        self, block: nn.Module, space: Space, stream: Stream, format: QuantFormat, clip: float
    ) -> tuple[Tensor, dict]:
        """Fit to full-precision activations entering the block, and fuse: the scale [dim * inner],
        1 where none reach the space, and what was found."""
        channels = None if isinstance(self.fit, Ones) else channels_of(block, space, stream)
        if channels is None:
            return torch.ones(space.dim * space.inner, device=stream.device), {}
        candidates = list(self.fit.candidates(channels))
        report = {}
        if len(candidates) > 1:
            trial = _Trial(block, space, stream, format, clip, self.fit.tokens)
            errors = trial.errors(candidates).nan_to_num(torch.inf)
            best = int(errors.argmin())
            check_finite(f"written by {space.judge}", errors[best])
            report = {"candidate": best, "error": errors[best].item()}
            candidates = [candidates[best]]
        scale = candidates[0].clamp(min=LEAST)
        fuse_scale(block, space, scale)
        return scale, report

    def __str__(self) -> str:
        return f"{self.space}: scaled by {self.fit}"


def channels_of(block: nn.Module, space: Space, stream: Stream) -> Channels | None:
    """Statistics of the space's channels over the whole stream; None where it shows none."""
    first = space.fused_readers[0]  # a router sees all tokens, an expert those it is sent
    weights = [block.get_submodule(name).weight.abs().amax(0) for name in space.fused_readers]
    weight = torch.stack(weights).amax(0)
    largest, total, tokens = torch.zeros_like(weight), torch.zeros_like(weight), 0
    for x in stream.inputs(block, first):
        if len(x):
            x = x.abs()
            largest = torch.maximum(x.amax(0), largest)
            total = total + x.sum(0)
            tokens += len(x)
    largest, total, tokens = parallel.max_(largest), parallel.sum_(total), parallel.total(tokens)
    if not tokens:
        return None
    check_finite(f"read by {first}", total)
    mean = total / tokens
    # A channel that stands in several columns has the largest and the mean of all.
    shape = (space.dim, space.repeat, space.inner)
    return Channels(
        largest.view(shape).amax(1).flatten(),
        mean.view(shape).mean(1).flatten(),
        weight.view(shape).amax(1).flatten(),
    )


class _Trial:
    """What quantizing the readers of a space costs at the output of its judge."""

    def __init__(
        self,
        block: nn.Module,
        space: Space,
        stream: Stream,
        format: QuantFormat,
        clip: float,
        tokens: int,
    ):
        self.space, self.format, self.clip = space, format, clip
        self.judge = block.get_submodule(space.judge)
        self.readers = [block.get_submodule(name) for name in space.fused_readers]
        self.is_quantized = [name in space.readers for name in space.fused_readers]
        # of the inputs, which all readers have alike
        first = space.readers[0]
        width = block.get_submodule(first).in_features
        self.grid = stream.adapter.input_format(first, width, format.activation)
        self.calls = [c for c in stream.head(tokens).entering(block, space.judge) if c is not None]
        self.expected = [self._output(call) for call in self.calls]
        power = sum(y.double().square().sum().item() for y in self.expected)
        self.power = parallel.total(power)

    def _output(self, call: tuple[tuple, dict]) -> Tensor:
        args, kwargs = call
        output = self.judge(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def errors(self, scales: list[Tensor]) -> Tensor:
        """Relative squared error with each of the scales [dim * inner], fp64."""
        lost = torch.tensor([self._lost(scale) for scale in scales], dtype=torch.float64)
        return parallel.sum_(lost) / (self.power or 1.0)

    @torch.no_grad()
    def _lost(self, scale: Tensor) -> float:
        """Squared error on this process's calls."""
        columns = reader_columns(scale.clamp(min=LEAST), self.space)
        kept = [reader.weight.data for reader in self.readers]
        handles = []
        for reader, is_quantized in zip(self.readers, self.is_quantized, strict=True):
            weight = reader.weight * columns
            reader.weight.data = _rounded(weight, self.format.weight) if is_quantized else weight
            handles.append(reader.register_forward_pre_hook(self._hook(columns, is_quantized)))
        lost = 0.0
        for call, expected in zip(self.calls, self.expected, strict=True):
            lost += (self._output(call) - expected).double().square().sum().item()
        for handle in handles:
            handle.remove()
        for reader, weight in zip(self.readers, kept, strict=True):
            reader.weight.data = weight
        return lost

    def _hook(self, columns: Tensor, is_quantized: bool):
        def scaled(_module, args):
            x = args[0] / columns
            if is_quantized and self.grid is not None:
                x = fake_quantize(x, self.grid, self.clip)
            return x, *args[1:]

        return scaled


def _rounded(weight: Tensor, format: IntFormat) -> Tensor:
    grid = weight_grid(weight, format)
    return on_grid(weight, grid.step, grid.zero_point, format)
