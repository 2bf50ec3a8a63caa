"""lowbit: rotated, quantized LLMs on real low-bit kernels.

model = lowbit.quantize("smollm2-135m", recipe="quarot", format="w4a4kv4")
lowbit.save(model, "smollm2-w4a4kv4")
model = lowbit.load("smollm2-w4a4kv4")
"""

from lowbit.checkpoint import load, save
from lowbit.errors import InputError
from lowbit.formats import IntFormat, Layout, PackedTensor, QuantFormat
from lowbit.quantize import quantize
from lowbit.recipes import RECIPES, Calibration, Recipe

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Calibration",
    "InputError",
    "IntFormat",
    "Layout",
    "PackedTensor",
    "QuantFormat",
    "Recipe",
    "load",
    "quantize",
    "save",
]
