"""A block as the executor leaves it, and as a file holds it until the fit is taken up again.

Activations are not in it: they are made anew by the blocks themselves, one after another, so that a
file is no larger than the block packed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.flattening import Flat
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.ops import dequantize
from lowbit.transforms import Map


@dataclass(frozen=True)
class FinishedBlock:
    """
    packed      linear -> its packed weight, canonical
    parameters  the block's others, fp32, as transforms and the rounder left them
    scales      space -> what its channels were scaled by [dim * inner] before they were rounded
    flat        what was learned in front of its linears
    report      "rounding" by linear, "scales" by space, "block": what was measured
    generator   the state of the executor's random numbers after it
    """

    packed: dict[str, PackedTensor]
    parameters: dict[str, Tensor]
    scales: dict[str, Tensor]
    flat: Flat
    report: dict[str, dict]
    generator: Tensor

    def put_into(self, block: nn.Module):
        """Its parameters into a block that still has float weights: they become what is packed."""
        for name, tensor in self.parameters.items():
            block.get_parameter(name).copy_(tensor)
        for name, weight in self.packed.items():
            block.get_submodule(name).weight.copy_(dequantize(weight))

    def state(self) -> dict:
        """Tensors on the CPU, in dicts."""
        packed = {}
        for name, t in self.packed.items():
            parts = (t.codes, t.scale, t.zero_point, t.channel_scale)
            packed[name] = [list(t.shape), *(p if p is None else p.cpu() for p in parts)]
        return {
            "packed": packed,
            "parameters": {name: t.detach().cpu() for name, t in self.parameters.items()},
            "scales": {name: t.cpu() for name, t in self.scales.items()},
            "flat": self.flat.state(),
            "report": self.report,
            "generator": self.generator,
        }

    @classmethod
    def of_state(
        cls,
        state: dict,
        format: IntFormat | None,
        maps: tuple[Map, ...],
        device: torch.device,
    ) -> "FinishedBlock":
        """Inverse of state(), for weights of this format and maps that began as these; tensors on
        `device`."""
        packed = {}
        for name, (shape, *parts) in state["packed"].items():
            codes, scale, zero, channel = (p if p is None else p.to(device) for p in parts)
            packed[name] = PackedTensor(
                codes, scale, zero, format, Layout.ROW_MAJOR, torch.Size(shape), channel
            )
        on_device = {
            kind: {name: t.to(device) for name, t in state[kind].items()}
            for kind in ("parameters", "scales")
        }
        flat = Flat.of_state(state["flat"], maps, device)
        return cls(
            packed, **on_device, flat=flat, report=state["report"], generator=state["generator"]
        )
