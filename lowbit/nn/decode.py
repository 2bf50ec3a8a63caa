"""Formats by phase: a decoding step runs weight-only on the weights that a prompt's integers meet.

    rows > decode_rows    int_gemm(quantize(rotate(x)), W)       as the checkpoint's format says
    rows <= decode_rows   weight_only_gemm(rotate(x), W)         the same codes and scales of W

rows are those of a linear's input: tokens of the forward, all sequences together; of the pads of a
ragged prompt those that are computed, as quantized attention leaves them out and other modules do
not. So the choice follows from shapes alone, and a CUDA graph or a compiled model holds one of the
two. Weights lie in one layout that both ops read (lowbit/ops/kernel_layouts.py); nothing about it
is saved. What is in the cache was written by whichever ran: a prompt's K and V by the first.
"""

from typing import NamedTuple

from transformers import PreTrainedModel

from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.models import adapter_for
from lowbit.nn.linear import QuantLinear, prepare

# What the smallest tile of weight_only_gemm holds, which takes as long for one row as for all of
# them. Not measured: `lowbit bench weight_only_gemm` shows where int_gemm becomes the faster.
DECODE_ROWS = 8


class Decode(NamedTuple):
    """How few rows run, in place of the model's own format; `model.lowbit_decode`, or None."""

    format: str
    rows: int

    def __str__(self) -> str:
        return f"{self.format} up to {self.rows} rows"


def set_decode(model: PreTrainedModel, decode: str | None, rows: int = DECODE_ROWS):
    """Let linears of `model` take up to `rows` rows as they are, where its format quantizes them.

    decode  that format with 16-bit activations and of weights alone, such as "w4a16" for w4a4kv4;
            None: the model's own format for any number of rows

    InputError where another name is given; for integer group scales, which only int_gemm applies;
    for experts, whose rows a router chooses; and where the device's kernels of the two ops read no
    layout in common.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantLinear) and m.activation_format]
    if decode is not None:
        _check(model, decode, rows, linears)
    try:
        _set(linears, 0 if decode is None else rows)
        prepare(model)
    except InputError:
        set_decode(model, None)
        raise
    model.lowbit_decode = None if decode is None else Decode(decode, rows)


def _set(linears: list[QuantLinear], rows: int):
    for linear in linears:
        linear.decode_rows = rows


def _check(model: PreTrainedModel, decode: str, rows: int, linears: list[QuantLinear]):
    format = model.lowbit_config.format
    if format.activation is None or not linears:
        raise InputError(
            f"decode must be None for a model whose linears do not quantize their inputs, got "
            f"{decode!r} for {format}"
        )
    if format.weight.two_level:
        raise InputError(
            f"decode must be None for integer group scales, which are applied to int_gemm's sums, "
            f"got {decode!r} for {format}"
        )
    if adapter_for(model.config).experts:
        raise InputError(
            "decode must be None for a model of experts, whose rows are the router's choice and "
            f"not a shape, got {decode!r}"
        )
    expected = QuantFormat(format.weight).name
    if decode != expected:
        raise InputError(
            f"decode must be {expected!r}, the weights of {format} with 16-bit activations, got "
            f"{decode!r}"
        )
    if rows < 1:
        raise InputError(f"decode_rows must be at least 1, got {rows}")
