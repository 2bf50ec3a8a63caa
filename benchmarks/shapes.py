"""The shapes that are timed: model dimensions, rows of activations, tokens in the KV cache."""

from dataclasses import dataclass

import torch

from lowbit import hadamard
from lowbit.errors import InputError

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)  # M of a call
CONTEXTS = tuple(1 << log2 for log2 in range(10, 18))  # 1K .. 128K tokens


@dataclass(frozen=True)
class Model:
    """Dimensions in elements, of one decoder layer but for the last two.

    qkv_bias  as Qwen2.5 has it
    """

    hidden: int
    intermediate: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocabulary: int
    qkv_bias: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each GEMM of a layer: q, k and v are one, and so are gate and up."""
        heads = self.num_q_heads * self.head_dim
        return {
            "qkv": (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, heads),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    "llama2-7b": Model(4096, 11008, 32, 32, 128, 32, 32000),
    "llama2-13b": Model(5120, 13824, 40, 40, 128, 40, 32000),
    "llama2-70b": Model(8192, 28672, 64, 8, 128, 80, 32000),
    "llama3-8b": Model(4096, 14336, 32, 8, 128, 32, 128256),
    "llama3-70b": Model(8192, 28672, 64, 8, 128, 80, 128256),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128, 28, 152064, qkv_bias=True),
    "qwen2.5-72b": Model(8192, 29568, 64, 8, 128, 80, 152064, qkv_bias=True),
    "mistral-7b": Model(4096, 14336, 32, 8, 128, 32, 32768),
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 30, 49152),
    "tiny": Model(256, 384, 4, 2, 64, 2, 512),  # of no model: for a CPU, and for a memory checker
}


def model_named(name: str) -> Model:
    if name not in MODELS:
        raise InputError(f"shapes must be among {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]


@dataclass(frozen=True)
class Setup:
    """What the cases of an op are made for: rows are M of a call, contexts tokens in the cache."""

    model: Model
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    device: torch.device

    def linears(self) -> list[tuple[tuple[int, int], str]]:
        """((N, K), name) of every different GEMM."""
        return list({shape: (shape, name) for name, shape in self.model.linears.items()}.values())

    def row_lengths(self) -> list[int]:
        """What is quantized per token: inputs of the linears."""
        return sorted({self.model.hidden, self.model.intermediate})

    def rotations(self, block: int) -> list[tuple[int, int, int]]:
        """(K, order, inner): whole rows of down_proj's input and blocks of them, and the heads of
        o_proj's input mixed, where there is a Hadamard matrix of that order."""
        m = self.model
        found = [
            (m.intermediate, m.intermediate, 1),
            (m.intermediate, block, 1),
            (m.num_q_heads * m.head_dim, m.num_q_heads, m.head_dim),
        ]
        return [r for r in found if r[0] % (r[1] * r[2]) == 0 and hadamard.exists(r[1])]
