"""Fused decoder layers: nine ops, and nothing of torch's between them.

    rmsnorm_quant               of the residual stream
    int_gemm                    q, k and v from one weight
    kv_append
    kv_attention_quant          with the rotation of o_proj's input
    int_gemm                    o_proj, plus the residual
    rmsnorm_quant
    int_gemm                    gate and up from one weight
    silu_mul_hadamard_quant     with the rotation of down_proj's input
    int_gemm                    down_proj, plus the residual

In fp32 on the reference backend the bits are those of the layer as it was. In 16 bits they are not:
what a norm and a linear make is narrowed once less. Where KV is not quantized, attention is
transformers' own with its norm, and the MLP is fused. Where a linear sums over slices of its input
or over ranks (lowbit/tensor_parallel.py), the residual is added afterwards.

Where few rows are not quantized (lowbit/nn/decode.py) the norms are torch's, attention, the gated
product, its rotation and that of o_proj's input run one by one: twelve launches, of which the
GEMMs are four and add the residuals too.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from lowbit.formats import PackedTensor
from lowbit.models import adapter_for
from lowbit.nn.attention import QuantAttention
from lowbit.nn.linear import QuantLinear
from lowbit.nn.mlp import QuantMLP
from lowbit.ops import rmsnorm_quant

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
TENSORS = ("codes", "scale", "zero_point", "channel_scale", "bias")  # a row of each an output


class MergedLinear(QuantLinear):
    """Linears that read one quantized input, as one; outputs side by side in their order.

    The state dict has the tensors of the parts under the parts' names, beside this module's own:
    what is saved does not say whether a model was fused. It is loaded before a model is.
    """

    def __init__(self, parts: dict[str, QuantLinear]):
        first = next(iter(parts.values()))
        super().__init__(
            first.in_features,
            sum(part.out_features for part in parts.values()),
            first.weight_format,
            first.activation_format,
            bias=first.bias is not None,
            activation_clip=first.activation_clip,
            transform=first.transform,
            dtype=first.dtype,
            device=first.codes.device,
        )
        self.sizes = {name: part.out_features for name, part in parts.items()}
        self.rotation, self.backend = first.rotation, first.backend
        self.decode_rows = first.decode_rows
        weights = [part.packed_weight for part in parts.values()]
        joined = {
            name: torch.cat([getattr(w, name) for w in weights])
            for name in TENSORS[:-1]
            if getattr(weights[0], name) is not None
        }
        shape = torch.Size((self.out_features, self.in_features))
        self.assign(replace(weights[0], **joined, shape=shape))
        if first.bias is not None:
            self.bias.data = torch.cat([part.bias for part in parts.values()])
        self.train(first.training)

    def split(self) -> dict[str, QuantLinear]:
        """The parts again."""
        weight, parts, start = self.packed_weight, {}, 0
        for name, size in self.sizes.items():
            rows = slice(start, start + size)
            own = {n: t[rows] for n in TENSORS[:-1] if (t := getattr(weight, n)) is not None}
            part = QuantLinear.from_packed(
                replace(weight, **own, shape=torch.Size((size, self.in_features))),
                None if self.bias is None else self.bias[rows],
                self.activation_format,
                self.activation_clip,
                self.transform,
                self.dtype,
            )
            part.rotation, part.backend = self.rotation, self.backend
            part.decode_rows = self.decode_rows
            part.prepare()
            parts[name] = part.train(self.training)
            start += size
        return parts

    def state_dict(self, *, destination=None, prefix="", keep_vars=False):
        destination = {} if destination is None else destination
        parent = prefix[: prefix[:-1].rfind(".") + 1]
        for name, part in self.split().items():
            state = part.state_dict(prefix=f"{parent}{name}.", keep_vars=keep_vars)
            destination.update(state)
        return destination

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        errors.append(f"{prefix[:-1]} is merged: load the state dict before the model is fused")


class FusedBlock:
    """What a fused decoder layer is besides its own class, whose modules it keeps."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values=None,
        **kwargs,
    ) -> Tensor:
        attention, mlp, (before, between) = self.lowbit_parts()
        x, place = hidden_states, None
        kwargs.update(position_embeddings=position_embeddings, past_key_values=past_key_values)
        if isinstance(attention, QuantAttention):
            place = attention.place(x, attention_mask=attention_mask, **kwargs)
            rows = place.rows_of(x)
            heads = attention.attend(_normed(before, attention.projections[0], rows), place)
            rows = attention.output(heads, rows)
        else:
            y, _ = attention(hidden_states=before(x), attention_mask=attention_mask, **kwargs)
            rows = (x + y).flatten(0, 1)
        rows = mlp(_normed(between, mlp.projections[0], rows), rows)
        return rows.view(x.shape) if place is None else place.columns_of(rows, x.shape, x)

    def lowbit_parts(self) -> tuple[nn.Module, QuantMLP, list[nn.Module]]:
        """Attention, the MLP, and the norms in front of them."""
        adapter = self.lowbit_adapter
        norms = [self.get_submodule(norm.name) for norm in adapter.norms]
        return self.get_submodule(adapter.attention), self.get_submodule(adapter.mlp), norms


def _normed(norm: nn.Module, linear: QuantLinear, x: Tensor) -> Tensor | PackedTensor:
    """The norm of x, quantized for `linear` where it quantizes its input."""
    if not linear.quantizes(x):
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    if linear.rotation is not None:
        return linear.quantize_input(norm(x))
    y, _ = rmsnorm_quant(
        x,
        linear.activation_format,
        None,
        norm.weight,
        norm.variance_epsilon,
        linear.activation_clip,
        linear.input_layout,
        backend=linear.backend,
    )
    return y


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of decoder layers `kind`, fused; an instance of it is one of both."""
    return type(f"Fused{kind.__name__}", (FusedBlock, kind), {})


def packed_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """(name, linear) of every packed linear as it is saved: the parts of those that are merged."""
    for path, module in model.named_modules():
        if isinstance(module, MergedLinear):
            parent = path[: path.rfind(".") + 1]
            yield from ((f"{parent}{name}", part) for name, part in module.split().items())
        elif isinstance(module, QuantLinear):
            yield path, module


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Fuse the decoder layers of a packed model, in place.

    Those of which the architecture's are plain (lowbit/models/spaces.py) and whose linears'
    inputs are quantized: others stay as they are.
    """
    adapter, config = adapter_for(model.config), model.lowbit_config
    if not adapter.plain or config.format.activation is None:
        return model
    for block in model.get_submodule(adapter.block_path):
        if not isinstance(block, FusedBlock):
            _merge(block.get_submodule(adapter.mlp), GATE_UP)
            if config.format.kv is not None:
                _merge(block.get_submodule(adapter.attention), QKV)
            block.lowbit_adapter, block.__class__ = adapter, _fused(type(block))
    return model


def unfuse(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `fuse`, in place."""
    for block in [m for m in model.modules() if isinstance(m, FusedBlock)]:
        attention, mlp, _ = block.lowbit_parts()
        _split(attention)
        _split(mlp)
        del block.lowbit_adapter
        block.__class__ = type(block).__bases__[1]
    return model


def _merge(module: QuantAttention | QuantMLP, name: str):
    """The projections of a module as one, where they are several and alike."""
    parts = dict(zip(module.parts.projections, module.projections, strict=True))
    if len(parts) == 1 or not _alike(list(parts.values())):
        return
    _replace(module, tuple(parts), {name: MergedLinear(parts)})


def _split(module: nn.Module):
    for name, linear in list(module.named_children()):
        if isinstance(linear, MergedLinear):
            _replace(module, (name,), linear.split())


def _replace(module: QuantAttention | QuantMLP, old: tuple[str, ...], new: dict[str, QuantLinear]):
    """New projections in the place of the old ones, so that the state dict keeps its order."""
    children = list(module.named_children())
    for name, _ in children:
        delattr(module, name)
    for name, child in children:
        for part, own in new.items() if name == old[0] else ():
            setattr(module, part, own)
        if name not in old:
            setattr(module, name, child)
    module.parts = replace(module.parts, projections=tuple(new))


def _alike(linears: list[QuantLinear]) -> bool:
    """Whether all have or lack a bias, and rotate their input by the same matrices; the rest of
    what they must share, formats and clips, lowbit/nn/linear.py has checked."""
    matrices = [[] if m.rotation is None else list(m.rotation.parameters()) for m in linears]
    return all(
        (m.bias is None) == (linears[0].bias is None)
        and all(torch.equal(a, b) for a, b in zip(own, matrices[0], strict=True))
        for m, own in zip(linears, matrices, strict=True)
    )
