"""QuantMLP: a gated MLP whose inputs are quantized, each once.

h = quantize(rotate(act(gate(x)) * up(x)))       one op, silu_mul_hadamard_quant, where the rotation
                                                 has one stage
y = down(h)
"""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from lowbit.errors import InputError
from lowbit.nn.linear import QuantLinear, check_same_input
from lowbit.ops import silu_mul_hadamard_quant

# transformers' hidden_act -> activation of the op
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class QuantMLP(nn.Module):
    """Stands in for LlamaMLP and keeps its names; `hidden_act` is transformers' name."""

    def __init__(
        self, gate_proj: QuantLinear, up_proj: QuantLinear, down_proj: QuantLinear, hidden_act: str
    ):
        super().__init__()
        check_same_input("MLP", gate_proj, up_proj)
        if hidden_act not in ACTIVATIONS:
            raise InputError(f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {hidden_act!r}")
        transform = down_proj.transform
        if transform is not None and transform.inner != 1:
            raise InputError(
                f"the rotation of down_proj's input must have inner 1, got {transform.inner}"
            )
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation, self.act_fn = ACTIVATIONS[hidden_act], ACT2FN[hidden_act]
        self.backend: str | None = None

    @classmethod
    def from_mlp(cls, mlp: nn.Module, hidden_act: str) -> "QuantMLP":
        """From a LlamaMLP-like module whose linears are QuantLinear already."""
        module = cls(mlp.gate_proj, mlp.up_proj, mlp.down_proj, hidden_act)
        module.config, module.replaced = mlp.config, type(mlp)
        return module.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.gate_proj.quantize_input(x)
        gate, up = self.gate_proj(packed), self.up_proj(packed)
        down, rotation = self.down_proj, self.down_proj.rotation
        if rotation is not None and len(rotation.transform.stages) > 1:  # no kernel has two
            return down(self.act_fn(gate) * up)
        order, matrix = 0, None
        if rotation is not None:
            ((order, _, matrix),) = rotation.stages(x.device)
        hidden = silu_mul_hadamard_quant(
            gate,
            up,
            down.activation_format,
            order,
            matrix,
            self.activation,
            down.activation_clip,
            down.input_layout,
            backend=self.backend,
        )
        return down(hidden)
