"""The published papers' simulation: quantize-dequantize in floating point, ordinary modules.

    linear      F.linear(fake_quantize(x R), dequantized codes, bias)
    attention   transformers' sdpa over fake_quantize(k R), fake_quantize(v) and q R

It shares the codes of the weights with the packed model and no arithmetic: rotations are dense
products, quantizers are the formulas below, K and V stay in an ordinary cache and are quantized
when they are read. fp32 throughout, whatever the model's dtype, so that the packed model differs by
the order of fp32 sums, and where that moves a value across a rounding boundary by one step.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbit.errors import InputError
from lowbit.formats import MIN_SCALE, IntFormat
from lowbit.nn.attention import PROJECTIONS, QuantAttention
from lowbit.nn.linear import QuantLinear
from lowbit.nn.mlp import QuantMLP
from lowbit.ops import dequantize
from lowbit.transforms.online import OnlineTransform

IMPLEMENTATION = "lowbit_fake"


def fake_quantize(
    x: Tensor, grid: IntFormat, clip: float = 1.0, scale_dtype: torch.dtype = torch.float32
) -> Tensor:
    """x on the grid of `grid`, one scale per row, as a tensor of the dtype of x."""
    levels = 2.0**grid.bits - 1
    if grid.symmetric:
        largest = 2.0 ** (grid.bits - 1) - 1
        scale = clip * x.abs().amax(-1, keepdim=True) / largest
        scale = scale.clamp(min=MIN_SCALE).to(scale_dtype).to(x.dtype)
        return scale * torch.clamp((x / scale).round(), -largest - 1, largest)
    high = clip * x.amax(-1, keepdim=True).clamp(min=0)
    low = clip * x.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low) / levels).clamp(min=MIN_SCALE).to(scale_dtype).to(x.dtype)
    zero = (-low / scale).round().clamp(0, levels)
    return scale * (torch.clamp((x / scale).round() + zero, 0, levels) - zero)


@cache
def _dense(transform: OnlineTransform, dtype: torch.dtype, device: torch.device) -> Tensor:
    return transform.dense().to(device, dtype)


def rotate(x: Tensor, transform: OnlineTransform | None) -> Tensor:
    """x (I (x) R (x) I_inner) as one dense product with R."""
    if transform is None:
        return x
    blocks = x.unflatten(-1, (-1, transform.order, transform.inner))
    dense = _dense(transform, x.dtype, x.device)
    return torch.einsum("...ai,ab->...bi", blocks, dense).flatten(-3)


class FakeQuantLinear(nn.Module):
    """A linear layer in fp32 over the numbers that a QuantLinear's codes stand for."""

    def __init__(self, linear: QuantLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation_format = linear.activation_format
        self.activation_clip, self.transform = linear.activation_clip, linear.transform
        weight = dequantize(linear.packed_weight, torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if linear.bias is None else linear.bias.float()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = rotate(x.to(self.weight.dtype), self.transform)
        if self.activation_format is not None:
            y = fake_quantize(y, self.activation_format, self.activation_clip)
        return F.linear(y, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def fake_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention over fake-quantized K and V; q, k, v [B, heads, length, D]."""
    kv, clip, transform = module.fake_kv
    dtype, compute = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value = (t.to(compute) for t in (query, key, value))
    query = rotate(query, transform)
    key = fake_quantize(rotate(key, transform), kv, clip, torch.float16)
    value = fake_quantize(value, kv, clip, torch.float16)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out.to(dtype), None


AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
AttentionInterface.register(IMPLEMENTATION, fake_attention)


def to_fake(model: PreTrainedModel) -> PreTrainedModel:
    """The packed model as its simulation, in place: transformers' own MLP and attention again."""
    if getattr(model, "lowbit_config", None) is None:
        raise InputError("to_fake needs a packed model, got one without a lowbit_config")
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantMLP):
            model.set_submodule(name, _ordinary_mlp(module))
        elif isinstance(module, QuantAttention):
            model.set_submodule(name, _ordinary_attention(module))
            model.set_attn_implementation(IMPLEMENTATION)
        elif hasattr(module, "lowbit_cache_hook"):
            module.lowbit_cache_hook.remove()
            del module.lowbit_cache_hook, module.lowbit_kv
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, FakeQuantLinear(module))
    return model


def _ordinary_mlp(module: QuantMLP) -> nn.Module:
    with torch.device("meta"):
        mlp = module.replaced(module.config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, getattr(module, name))
    return mlp.train(module.training)


def _ordinary_attention(module: QuantAttention) -> nn.Module:
    with torch.device("meta"):
        attention = module.replaced(module.config, module.layer_idx)
    for name in PROJECTIONS:
        setattr(attention, name, getattr(module, name))
    attention.fake_kv = (module.kv, module.clip, module.transform)
    return attention.train(module.training)
