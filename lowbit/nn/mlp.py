"""QuantMLP: a gated MLP whose inputs are quantized, each once.

h = quantize(rotate(act(gate(x)) * up(x)))       one op, silu_mul_hadamard_quant, where the rotation
                                                 has one stage
y = down(h)
"""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from lowbit.errors import InputError
from lowbit.formats import PackedTensor
from lowbit.models.spaces import LLAMA_MLP, MLPParts
from lowbit.nn.linear import QuantLinear, check_same_input, shared_input
from lowbit.nn.slices import quantized_by_slice
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
    """Stands in for an MLP of transformers and keeps its names; `hidden_act` is transformers' name.

    up_proj  None: gate_proj makes gate and up, in this order
    """

    def __init__(
        self,
        gate_proj: QuantLinear,
        up_proj: QuantLinear | None,
        down_proj: QuantLinear,
        hidden_act: str,
        parts: MLPParts = LLAMA_MLP,
    ):
        super().__init__()
        check_same_input("MLP", gate_proj, up_proj)
        if hidden_act not in ACTIVATIONS:
            raise InputError(f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {hidden_act!r}")
        transform = down_proj.transform
        if transform is not None and transform.inner != 1:
            raise InputError(
                f"the rotation of {parts.output}'s input must have inner 1, got {transform.inner}"
            )
        self.parts = parts
        projections = [linear for linear in (gate_proj, up_proj) if linear is not None]
        for name, linear in zip(parts.projections, projections, strict=True):
            setattr(self, name, linear)
        setattr(self, parts.output, down_proj)
        self.activation, self.act_fn = ACTIVATIONS[hidden_act], ACT2FN[hidden_act]
        self.backend: str | None = None

    @classmethod
    def from_mlp(cls, mlp: nn.Module, hidden_act: str, parts: MLPParts = LLAMA_MLP) -> "QuantMLP":
        """From a module made of `parts` whose linears are QuantLinear already."""
        gate, up = (*(getattr(mlp, name) for name in parts.projections), None)[:2]
        module = cls(gate, up, getattr(mlp, parts.output), hidden_act, parts)
        module.config, module.replaced = mlp.config, type(mlp)
        return module.train(mlp.training)

    @property
    def projections(self) -> list[QuantLinear]:
        """What makes gate and up, of one quantized input."""
        return [getattr(self, name) for name in self.parts.projections]

    def _gate_up(self, x: Tensor | PackedTensor) -> tuple[Tensor, Tensor]:
        x = shared_input(self.projections[0], x)
        outputs = [projection(x) for projection in self.projections]
        gate, up = outputs[0].chunk(2, -1) if len(outputs) == 1 else outputs
        return gate, up

    def forward(self, x: Tensor | PackedTensor, residual: Tensor | None = None) -> Tensor:
        """Of x, or of x quantized for the projections; with a residual, their sum."""
        gate, up = self._gate_up(x)
        down = getattr(self, self.parts.output)
        rotation = down.rotation
        two_stages = rotation is not None and len(rotation.transform.stages) > 1  # in no kernel
        if two_stages or not down.quantizes(gate):
            return down(self.act_fn(gate) * up, residual)
        order, matrix = 0, None
        if rotation is not None:
            ((order, _, matrix),) = rotation.stages(gate.device)
        hidden = quantized_by_slice(
            lambda gate, up, format: silu_mul_hadamard_quant(
                gate,
                up,
                format,
                order,
                matrix,
                self.activation,
                down.activation_clip,
                down.input_layout,
                backend=self.backend,
            ),
            down.activation_format,
            gate,
            up,
        )
        return down(hidden, residual)
