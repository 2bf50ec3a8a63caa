"""The published papers' simulation: quantized numbers as floats in ordinary modules.

    linear      codes of the input times codes of the weight, as floats, then both scales
    attention   softmax(q R . fake_quantize(k R)) fake_quantize(v), k and v of a prompt's own
                forward as they are where prefill_kv (lowbit/nn/attention.py) is "full"

No packing, no integer arithmetic, no pages: K and V stay in an ordinary cache and are quantized
when they are read. fp32 throughout, whatever the model's dtype.

A paper's code multiplies dequantized operands; here the scales stay outside the sum, in the order
of the ops' contracts. Sums of codes are exact in any order (fp64 where fp32 would round), so an
fp32 model on the reference backend gives the same bits packed and simulated, and any difference a
kernel shows is its own. Without that, one rounding on a code's boundary moves a whole step, and
thirty layers later the two are as far apart as two random seeds. The textbook order differs from
this one by fp32 rounding: tests/test_fake_quant.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lowbit.errors import InputError
from lowbit.formats import GROUP_SCALE_MAX, MIN_SCALE, IntFormat, Layout
from lowbit.integrations import detach
from lowbit.nn.attention import FULL, QuantAttention, is_causal_mask
from lowbit.nn.fused import unfuse
from lowbit.nn.linear import QuantLinear
from lowbit.nn.mlp import QuantMLP
from lowbit.nn.online_map import OnlineMap
from lowbit.nn.slices import cut
from lowbit.ops import dequantize, to_layout
from lowbit.ops.kv_attention import attend
from lowbit.ops.rows import rows_times
from lowbit.tensor_parallel import check_whole

IMPLEMENTATION = "lowbit_fake"
EXACT_FP32 = 2**24  # integers up to here are exact in fp32, and so are their sums


def fake_codes(
    x: Tensor, grid: IntFormat, clip: float = 1.0, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(code - zero point, scale [..., 1]) as floats, one scale per row: fake_quantize's factors."""
    levels = 2.0**grid.bits - 1
    if grid.symmetric:
        largest = 2.0 ** (grid.bits - 1) - 1
        scale = _quotient(clip * x.abs().amax(-1, keepdim=True), largest)
        scale = scale.clamp(min=MIN_SCALE).to(scale_dtype).to(x.dtype)
        return torch.clamp((x / scale).round(), -largest - 1, largest), scale
    high = clip * x.amax(-1, keepdim=True).clamp(min=0)
    low = clip * x.amin(-1, keepdim=True).clamp(max=0)
    scale = _quotient(high - low, levels).clamp(min=MIN_SCALE).to(scale_dtype).to(x.dtype)
    zero = (-low / scale).round().clamp(0, levels)
    return torch.clamp((x / scale).round() + zero, 0, levels) - zero, scale


def _quotient(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once on a GPU too, where torch multiplies by the inverse of a number."""
    return x / torch.full_like(x, number)


def fake_quantize(
    x: Tensor, grid: IntFormat, clip: float = 1.0, scale_dtype: torch.dtype = torch.float32
) -> Tensor:
    """x on the grid of `grid`, one scale per row, as a tensor of the dtype of x."""
    codes, scale = fake_codes(x, grid, clip, scale_dtype)
    return scale * codes


def rotate(x: Tensor, rotation: OnlineMap | None) -> Tensor:
    """x (I (x) R (x) I_inner)."""
    return x if rotation is None else rotation(x, "reference")


class FakeQuantLinear(nn.Module):
    """A linear layer in fp32 over the numbers that a QuantLinear's codes stand for.

    weight  fp32 [N, K]: dequantized where the input is not quantized, else the codes alone, which
            `scale` [N, G] then multiplies outside the sum over each group. Of two-level scales the
            integers multiply the codes: `scale` is [N, 1]

    Inputs that the QuantLinear does not quantize, few rows (lowbit/nn/decode.py), are not here.
    """

    quantizes = QuantLinear.quantizes

    def __init__(self, linear: QuantLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation_format = linear.activation_format
        self.activation_clip, self.rotation = linear.activation_clip, linear.rotation
        self.decode_rows = linear.decode_rows
        packed = linear.packed_weight
        if self.activation_format is None:
            weight, self.scale = dequantize(packed, torch.float32), None
        else:
            weight, scale = to_layout(packed, Layout.BYTES).codes.float(), packed.scale
            largest = 2.0 ** (packed.format.bits - 1 + self.activation_format.bits)
            if packed.format.two_level:
                groups = weight.unflatten(1, (scale.shape[1], -1))
                weight, scale = (groups * scale.unsqueeze(-1)).flatten(1), packed.channel_scale
                largest *= GROUP_SCALE_MAX
            self.scale = nn.Buffer(scale.detach().float())
            exact = largest * self.in_features <= EXACT_FP32
            self.sum_dtype = torch.float32 if exact else torch.float64
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if linear.bias is None else linear.bias.float()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = rotate(x.to(self.weight.dtype), self.rotation)
        count = self.slices
        y_slices = y.chunk(count, -1)
        if self.quantizes(y):
            slices = (y_slices, self.weight.chunk(count, -1), cut(self.scale, count))
            first, *others = (self._product(*part) for part in zip(*slices, strict=True))
        else:
            slices = (y_slices, self._dequantized().chunk(count, -1))
            first, *others = (rows_times(x, w.T) for x, w in zip(*slices, strict=True))
        total = first if self.bias is None else first + self.bias
        for part in others:
            total = part + total
        return total.to(x.dtype)

    @property
    def slices(self) -> int:
        """Of the input, as the QuantLinear has them."""
        grid = self.activation_format
        return 1 if grid is None else grid.num_groups(self.in_features)

    def _product(self, y: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Of a slice of the input, which has a scale a row, by its columns of the weight."""
        codes, x_scale = fake_codes(y, self.activation_format, self.activation_clip)
        groups = scale.shape[1]
        total = 0
        for x_group, w_group, w_scale in zip(
            codes.to(self.sum_dtype).chunk(groups, -1),
            weight.to(self.sum_dtype).chunk(groups, -1),
            scale.unbind(1),
            strict=True,
        ):
            total = total + F.linear(x_group, w_group).to(y.dtype) * w_scale
        return total * x_scale

    def _dequantized(self) -> Tensor:
        if self.scale is None:
            return self.weight
        groups = self.weight.unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale.unsqueeze(-1)).flatten(1)

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
    """Attention over fake-quantized K and V; q, k, v [B, heads, length, D], of a cache that grows.

    Plain causal calls run the reference's own sums; a mask (padding) goes through transformers'
    sdpa, equal to fp32 rounding.
    """
    kv, clip, rotation, prefill_kv, window = module.fake_kv
    new = query.shape[2] if prefill_kv == FULL and query.shape[2] > 1 else 0
    cached = key.shape[2] - new
    dtype, compute = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value = (t.to(compute) for t in (query, key, value))
    query = rotate(query, rotation)
    key, value = (
        torch.cat((fake_quantize(x[:, :, :cached], kv, clip, torch.float16), x[:, :, cached:]), 2)
        for x in (rotate(key, rotation), value)
    )
    if attention_mask is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out.to(dtype), None
    token_major = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    rows = [
        attend(q, k.transpose(0, 1), v.transpose(0, 1), module.scaling, window)
        for q, k, v in zip(*token_major, strict=True)
    ]
    return torch.stack(rows).to(dtype), None


def fake_mask(*, mask_function=causal_mask_function, attention_mask=None, **kwargs):
    """sdpa_mask; None where the queries, the last of the keys, see all up to themselves, or of
    those the last, as many as the attention's window."""
    new, cached, columns = (kwargs.get(name) for name in ("q_length", "q_offset", "kv_length"))
    is_causal = is_causal_mask(mask_function, **kwargs) and not kwargs.get("kv_offset")
    if is_causal and None not in (new, cached) and cached + new == columns:
        if attention_mask is None or bool(attention_mask.all()):
            return None
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


AttentionMaskInterface.register(IMPLEMENTATION, fake_mask)
AttentionInterface.register(IMPLEMENTATION, fake_attention)


def to_fake(model: PreTrainedModel) -> PreTrainedModel:
    """The packed model as its simulation, in place: transformers' own MLP and attention again."""
    if getattr(model, "lowbit_config", None) is None:
        raise InputError("to_fake needs a packed model, got one without a lowbit_config")
    check_whole(model, "to_fake")
    unfuse(model)
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
    detach(model)
    return model


def _ordinary_mlp(module: QuantMLP) -> nn.Module:
    with torch.device("meta"):
        mlp = module.replaced(module.config)
    for name in (*module.parts.projections, module.parts.output):
        setattr(mlp, name, getattr(module, name))
    return mlp.train(module.training)


def _ordinary_attention(module: QuantAttention) -> nn.Module:
    with torch.device("meta"):
        attention = module.replaced(module.config, module.layer_idx)
    parts = module.parts
    for name in (*parts.projections, parts.output, *parts.norms):
        part = getattr(module, name)
        if part is not None:
            setattr(attention, name, part)
    attention.fake_kv = (
        module.kv,
        module.clip,
        module.rotation,
        module.prefill_kv,
        module.window,
    )
    return attention.train(module.training)
