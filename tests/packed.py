"""Tiny packed models: tests/models.py's Llama with RTN weights and every online rotation."""

from dataclasses import replace

import torch
from models import tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import cuda
from lowbit.config import LowbitConfig
from lowbit.formats import Layout, QuantFormat
from lowbit.models import adapter_for
from lowbit.nn import swap
from lowbit.ops.dispatch import OPS, Backend
from lowbit.ops.int_gemm import DEFAULTS, INT_GEMM
from lowbit.ops.weight_only_gemm import WEIGHT_ONLY_GEMM
from lowbit.rounding import RTN
from lowbit.transforms import Rotation
from lowbit.transforms.online import OnlineTransform

# What a fused layer runs for a token whose inputs and cache are quantized.
DECODING = (
    "rmsnorm_quant",
    "int_gemm",
    "kv_append",
    "kv_attention_quant",
    "int_gemm",
    "rmsnorm_quant",
    "int_gemm",
    "silu_mul_hadamard_quant",
    "int_gemm",
)
# And for one that is not quantized, beside two norms of torch's.
DECODING_FLOAT = (
    "weight_only_gemm",
    "kv_append",
    "kv_attention",
    "hadamard",
    "weight_only_gemm",
    "weight_only_gemm",
    "aten::silu",
    "aten::mul",
    "hadamard",
    "weight_only_gemm",
)
WEIGHT_ONLY_REFERENCE = "lowbit.ops.weight_only_gemm:_reference"


class Launches(TorchDispatchMode):
    """What runs: ops that are not views of their inputs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = func.namespace == "lowbit"
        if own or not (func.is_view or func._schema.name in ("aten::sym_size", "aten::detach")):
            self.names.append(func._schema.name.removeprefix("lowbit::"))
        return func(*args, **(kwargs or {}))


def launches_of(block: nn.Module) -> Launches:
    """What runs in the next call of `block`."""
    mode = Launches()
    block.register_forward_pre_hook(lambda *_: mode.__enter__() and None)
    block.register_forward_hook(lambda *_: mode.__exit__(None, None, None))
    return mode


def packed_llama(
    format: str = "w4a4kv4", kind: str | None = "hadamard", clip: float = 1.0, **sizes
):
    """tiny_llama(**sizes), quantized; kind None: without rotations."""
    return pack_model(tiny_llama(**sizes), format, kind, clip)


def pack_model(model, format: str, kind: str | None = "hadamard", clip: float = 1.0):
    """`model`, quantized in place; rotations are undone in the weights, so it stays the same one
    but for the rounding."""
    adapter, c, format = adapter_for(model.config), model.config, QuantFormat.parse(format)
    transforms = {}
    if kind is not None and format.weight is not None:
        heads = OnlineTransform(kind, c.num_attention_heads, c.head_dim)
        hidden = OnlineTransform(kind, c.intermediate_size)
        transforms = {"self_attn.o_proj": heads, "mlp.down_proj": hidden}
    config = LowbitConfig(
        format,
        "test",
        activation_clip=clip,
        kv_clip=clip,
        input_transforms=transforms,
        query_key_transform=None if kind is None else OnlineTransform(kind, c.head_dim),
    )
    packed = {}
    for index, block in enumerate(model.model.layers):
        for name in adapter.linears if format.weight else ():
            weight = block.get_submodule(name).weight.double()
            if name in transforms:
                weight = Rotation("input", transforms[name], None).apply(weight)
            packed[f"model.layers.{index}.{name}"] = pack_weight(weight.float(), format.weight)
    swap(model, adapter, config)
    for name, weight in packed.items():
        model.get_submodule(name).assign(weight)
    return model


def pack_weight(weight, format):
    """RTN codes of one weight, as QuantLinear stores them."""
    return RTN().round(weight, format)[0]


def pretend_cuda(monkeypatch, sm: int) -> list[tuple]:
    """As if CPU tensors lay on a GPU of that architecture, whose GEMMs are the references behind
    what kernels ask for: prepared weights, and activations that suit them. Returns the calls of
    int_gemm."""
    calls, weight_only = [], WEIGHT_ONLY_GEMM.backends["cuda"]

    def why_not_cuda(*tensors):
        here = all(t is None or t.device == torch.device("cpu") for t in tensors)
        return None if here else "the tensors are elsewhere"

    def why_not_int_gemm(*args):
        (_, w_layout, _), packed = (*args, *DEFAULTS[len(args) - 10 :])[10:], args[7]
        if w_layout == Layout.ROW_MAJOR or packed != (w_layout == Layout.FRAGMENT_INT4):
            return f"it reads no weights {w_layout} with packed={packed}"
        calls.append((w_layout, packed))
        return why_not_cuda(args[3])

    monkeypatch.setattr(cuda, "why_not_cuda", why_not_cuda)
    monkeypatch.setattr(cuda, "sm", lambda device=None: sm)
    for op in OPS.values():  # the others have no such twin, and the library may not be built
        monkeypatch.setitem(op.backends, "cuda", Backend(lambda *_args: "it is not pretended"))
    kernel = Backend(why_not_int_gemm, "lowbit.ops.int_gemm:_reference")
    monkeypatch.setitem(INT_GEMM.backends, "cuda", kernel)
    weight_only = replace(weight_only, target=WEIGHT_ONLY_REFERENCE)
    monkeypatch.setitem(WEIGHT_ONLY_GEMM.backends, "cuda", weight_only)
    return calls
