"""Executor: transforms and rounds one block after another, on calibration activations.

For each block: what is fused without data, then scales and maps, fitted to full-precision
activations; then its linears, stage by stage, or all of them at once by a block rounder, on what
the rounder asks for (`streams`, lowbit/streams.py):

    nothing             RTN
    "full"              inputs in full precision, of the block as it was
    "rounded"           inputs from what is rounded already: blocks before, and with true_sequential
                        stages before; GPTQ
    both                the drift between them too: GPTAQ, Qronos. Holds a block twice.
                        Block rounders: inputs as rounded, outputs wanted in full precision
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.finished import FinishedBlock
from lowbit.flattening import Flat
from lowbit.formats import IntFormat, PackedTensor, QuantFormat
from lowbit.learning_attention import QuantizedKV, attend_through
from lowbit.ops import dequantize
from lowbit.reach import unreached_experts
from lowbit.recipes import Recipe
from lowbit.rounding import RTN, BlockRounder, Statistics, quadratic_error, statistics_of
from lowbit.rounding.block import BlockProblem
from lowbit.rounding.grid import WeightGrid
from lowbit.rounding.learned import quantized_through
from lowbit.streams import Stream, check_finite
from lowbit.transforms import FittedTransforms
from lowbit.transforms.channels import fuse_scale

Rounded = dict[str, tuple[PackedTensor, dict]]  # linear -> packed weight, report


def needed_streams(recipe: Recipe, format: QuantFormat) -> set[str]:
    """Which calibration activations a recipe takes."""
    if format.weight is None:
        return set()
    fitted = recipe.scales or recipe.flattening is not None
    return set(recipe.rounding.streams) | ({"full"} if fitted else set())


class Executor:
    """`windows` int64 [samples, length], unused where needed_streams are none.

    seed  of the batches of block rounders
    say   is told warnings; show, how far a block is
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fitted: FittedTransforms,
        recipe: Recipe,
        format: QuantFormat,
        windows: Tensor | None,
        seed: int,
        say: Callable[[str], None],
        show: Callable[[str], None],
    ):
        self.fitted, self.recipe, self.format = fitted, recipe, format
        self.say, self.show = say, show
        self.generator = torch.Generator().manual_seed(seed)
        self.adapter, self.rounder = fitted.adapter, recipe.rounding
        self.activation_clip, self.kv_clip = recipe.clips(format)
        self.device = model.device
        needed = needed_streams(recipe, format)
        stream = Stream(model, self.adapter, windows) if needed else None
        self.full = stream if "full" in needed else None
        self.rounded = stream if "rounded" in needed else None
        if len(needed) == 2:
            self.rounded = stream.fork()
        if needed:
            self._warn_of_few(windows.numel(), model.get_submodule(self.adapter.block_path)[0])

    def _warn_of_few(self, tokens: int, block: nn.Module):
        """Say which linears' Hessians cannot have full rank: damping decides the rest of them."""
        if isinstance(self.rounder, BlockRounder) or not self.rounder.streams:
            return
        everywhere = (n for n in self.adapter.linears if self.adapter.expert_of(n) is None)
        wide = [n for n in everywhere if block.get_submodule(n).in_features > tokens]
        if wide:
            self.say(
                f"warning: {tokens} calibration tokens are fewer than the inputs of "
                f"{', '.join(wide)}: take more samples"
            )

    def run(self, block: nn.Module, index: int) -> FinishedBlock:
        """Round a block in fp32; its linears' weights are released."""
        self.fitted.fuse_block(block, index)
        if self.format.weight is None:
            report = {"rounding": {}, "scales": {}, "block": {}}
            return FinishedBlock({}, {}, {}, Flat(), report, self.generator.get_state())
        handles = self.fitted.hook_online(block, index)
        self.unreached = self._unreached(block, index)
        scales = {
            scale.space: scale.fit_and_fuse(
                block,
                self.adapter.spaces[scale.space],
                self.full,
                self.format,
                self.activation_clip,
            )
            for scale in self.fitted.scales
        }
        self.flat, self.grids, online = self._flatten(block, index)
        handles += online
        original = problem = None
        if isinstance(self.rounder, BlockRounder):
            problem = self._rounding_problem(block, index)
        elif len(self.rounder.streams) == 2:
            original = copy.deepcopy(block)
        elif self.full and "full" not in self.rounder.streams:
            self.full.advance(block)  # while it is in full precision
        handles += self._hook_quantizers(block, index)
        if problem is None:
            rounded, learned = self._round(block, original, index), {}
        else:
            rounded, learned = self._round_block(problem, index)
        self._leave(block, handles)
        return FinishedBlock(
            {name: weight for name, (weight, _) in rounded.items()},
            dict(block.named_parameters()),
            {space: scale for space, (scale, _) in scales.items()},
            self.flat,
            {
                "rounding": {name: report for name, (_, report) in rounded.items()},
                "scales": {space: report for space, (_, report) in scales.items()},
                "block": learned | self.flat.report,
            },
            self.generator.get_state(),
        )

    def replay(self, block: nn.Module, index: int, finished: FinishedBlock):
        """Do to this block and the streams what `run` did, to the same bits, by forwards alone."""
        self.generator.set_state(finished.generator)
        self.fitted.fuse_block(block, index)
        if self.format.weight is None:
            return
        handles = self.fitted.hook_online(block, index)
        for space, scale in finished.scales.items():
            fuse_scale(block, self.adapter.spaces[space], scale)
        self.flat = finished.flat
        handles += self.flat.put_into(block, self.adapter)
        if self.full:
            self.full.advance(block)
        finished.put_into(block)
        handles += self._hook_quantizers(block, index)
        self._leave(block, handles)

    def _leave(self, block: nn.Module, handles: list):
        if self.rounded:
            self.rounded.advance(block)
        for handle in handles:
            handle.remove()
        for name in self.adapter.linears:
            block.get_submodule(name).weight = None

    def _unreached(self, block: nn.Module, index: int) -> frozenset[str]:
        """Linears of experts that no calibration token reaches: lowbit/reach.py."""
        stream = self.rounded or self.full
        if stream is None or not self.adapter.experts:
            return frozenset()
        wants_rank = bool(self.rounder.streams) and not isinstance(self.rounder, BlockRounder)
        linears, warning = unreached_experts(block, self.adapter, stream, wants_rank)
        if warning:
            self.say(f"warning: block {index}: {warning}")
        return linears

    @torch.no_grad()
    def _flatten(self, block: nn.Module, index: int) -> tuple[Flat, dict[str, WeightGrid], list]:
        """What is learned of a block, linear -> grid of its weight where the rounder takes those
        learned, and handles of hooks for what is online; the rest is fused."""
        if self.recipe.flattening is None:
            return Flat(), {}, []
        inputs = list(self.full.hidden)
        targets = [self.full.put_by(self.full.forward(block, hidden)) for hidden in inputs]
        problem = self._problem(
            copy.deepcopy(block), self.adapter.linears, index, self.full, inputs, [targets]
        )
        flat, ranges = self.recipe.flattening.fit(
            problem, self.fitted, self.format, index, self.generator, self.show
        )
        report = flat.report
        if "stopped" in report:
            self.say(
                f"warning: block {index}: the loss was not finite in step {report['stopped']}, "
                "maps and clips learned until then count"
            )
        if report["step"] is None and report["start_error"]:
            self.say(
                f"warning: block {index}: learned maps and clips are no better than those it "
                "began with, which are kept"
            )
        self.show(f"block error {report['error']:.4f}, at first {report['start_error']:.4f}")
        handles = flat.put_into(block, self.adapter)
        if self.rounder.clip != "none":  # it finds its own
            return flat, {}, handles
        grids = {
            name: share_of(block.get_submodule(name).weight).grid
            for name, share_of in zip(self.adapter.linears, ranges, strict=True)
        }
        return flat, grids, handles

    def _rounding_problem(self, block: nn.Module, index: int) -> BlockProblem:
        """What a block rounder gets. Before its quantizers are hooked in: the full stream advances,
        and its activations are the targets."""
        entering = self.rounded or self.full
        inputs, targets = list(entering.hidden), []
        if self.rounder.augmented:
            outputs = (entering.forward(block, hidden) for hidden in inputs)
            targets.append([entering.put_by(output) for output in outputs])
        self.full.advance(block)
        targets.append(list(self.full.hidden))
        linears = tuple(n for n in self.adapter.linears if n not in self.unreached)
        return self._problem(block, linears, index, entering, inputs, targets)

    def _problem(
        self,
        block: nn.Module,
        linears: tuple[str, ...],
        index: int,
        stream: Stream,
        inputs: list[Tensor],
        targets: list[list[Tensor]],
    ) -> BlockProblem:
        """Of pieces of `stream` as they enter the block, and those that should leave it."""
        check_finite(f"in block {index}", *(piece for pieces in targets for piece in pieces))
        return BlockProblem(
            block,
            linears,
            self.format.weight,
            stream.device,
            tuple(self.adapter.spaces[scale.space] for scale in self.fitted.scales),
            lambda hidden, tensors: stream.forward(block, hidden, tensors),
            inputs,
            targets,
        )

    def _round_block(self, problem: BlockProblem, index: int) -> tuple[Rounded, dict]:
        packed, report = self.rounder.round_block(problem, self.generator, self.show)
        self.show(f"block error {report['error']:.4f}, RTN's {report['rtn_error']:.4f}")
        if "stopped" in report:
            self.say(
                f"warning: block {index}: the loss was not finite in step {report['stopped']}, "
                "what was learned until then counts"
            )
        if report["step"] is None and report["rtn_error"]:
            self.say(
                f"warning: block {index}: nothing that was learned is better than rounding to "
                "nearest, rounded to nearest"
            )
        for name, weight in packed.items():
            problem.block.get_submodule(name).weight.copy_(dequantize(weight))
        rounded = {name: (weight, {}) for name, weight in packed.items()}
        for name in self.adapter.linears:
            if name in self.unreached:  # their columns may have been scaled until now
                linear = problem.block.get_submodule(name)
                rounded[name] = self._round_linear(linear, name, None, index)
        return rounded, report

    def _round(self, block: nn.Module, original: nn.Module | None, index: int) -> Rounded:
        stages = self.adapter.stages
        reached = [stage for stage in stages if stage[0] not in self.unreached]
        known = {}
        if self.rounder.streams and not self.rounder.true_sequential:
            known = {stage: self._statistics(block, original, stage[0], index) for stage in reached}
        if original is None and "full" in self.rounder.streams:
            self.full.advance(block)  # while it is in full precision
        results = {}
        for stage in stages:
            statistics = known.pop(stage, None)
            if statistics is None and self.rounder.streams and stage in reached:
                statistics = self._statistics(block, original, stage[0], index)
            for name in stage:
                linear = block.get_submodule(name)
                results[name] = self._round_linear(linear, name, statistics, index)
        if original is not None:
            self.full.advance(original)
        return results

    def _statistics(
        self, block: nn.Module, original: nn.Module | None, name: str, index: int
    ) -> Statistics | None:
        """None where no token reaches the linear."""
        stream = self.rounded if "rounded" in self.rounder.streams else self.full
        routes = full = None
        if original is not None:
            if self.adapter.expert_of(name) is not None:  # of both streams the same tokens
                routes = stream.routes(block)
            full = self.full.inputs(original, name, routes)
        statistics = statistics_of(stream.inputs(block, name, routes), full)
        if statistics is None:
            self.say(
                f"warning: block {index}, {name}: no calibration token reaches it once attention "
                "is rounded, rounded to nearest: take more samples"
            )
        else:
            check_finite(f"entering block {index}", statistics.hessian)
        return statistics

    def _round_linear(
        self, linear: nn.Linear, name: str, statistics: Statistics | None, index: int
    ) -> tuple[PackedTensor, dict]:
        rounder, grid = self.rounder, self.grids.get(name)
        if statistics is None and rounder.streams:
            rounder, grid = RTN(), None
        elif rounder.clip.startswith("output") and name in self.adapter.scores:
            rounder = replace(rounder, clip="none")  # AWQ's choice: what a score costs is not seen
        given = () if grid is None else (grid,)
        packed, report = rounder.round(linear.weight, self.format.weight, statistics, *given)
        if "damp" in report and report["damp"] is None:
            self.say(
                f"warning: block {index}, {name}: no damping made its Hessian positive definite, "
                "rounded to nearest"
            )
        rounded = dequantize(packed)
        if statistics is not None:
            lost = quadratic_error(linear.weight - rounded, statistics.hessian)
            whole = quadratic_error(linear.weight, statistics.hessian)
            report["relative_error"] = lost / whole if whole else 0.0  # all-zero weights
            self.show(f"{name} error {report['relative_error']:.4f}")
        linear.weight.copy_(rounded)
        return packed, report

    def _hook_quantizers(self, block: nn.Module, index: int) -> list:
        """Handles of the hooks that quantize what the linears read, and K and V, where the rounder
        asks."""
        if not self.rounder.quantized_inputs:
            return []
        handles = []
        if self.format.kv is not None:
            rotation = self.fitted.query_key_at(index)
            clip = self.flat.clips.get(self.adapter.attention, self.kv_clip)
            kv = QuantizedKV(self.format.kv, rotation and rotation.apply, clip, self.device)
            handles.append(attend_through(block.get_submodule(self.adapter.attention), kv))
        if self.format.activation is None:
            return handles

        def quantizer(format: IntFormat, clip: float):
            return lambda _module, args: (quantized_through(args[0], format, clip), *args[1:])

        clips = dict.fromkeys(self.adapter.linears, self.activation_clip) | self.flat.clips
        for name in self.adapter.linears:
            linear = block.get_submodule(name)
            format = self.adapter.input_format(name, linear.in_features, self.format.activation)
            handles.append(linear.register_forward_pre_hook(quantizer(format, clips[name])))
        return handles
