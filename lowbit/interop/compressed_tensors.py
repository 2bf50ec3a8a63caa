"""compressed-tensors checkpoints of integers, as llm-compressor writes them.

Of a linear with N outputs, K inputs and G groups, b = num_bits, codes q and zero points z from
-2^(b-1) to 2^(b-1) - 1:

    pack-quantized  weight_packed      int32 [N, K b / 32]   fields (fields.py) q + 2^(b-1)
                    weight_zero_point  int32 [N b / 32, G]   fields z + 2^(b-1) down each column,
                                                             of asymmetric weights
                    weight_shape       int64 [2]
                    weight_g_idx       int32 [K]             of older writers, with actorder group
    int-quantized   weight             int8 [N, K]           q
                    weight_zero_point  int8 [N, G]           z
    both            weight_scale       any float [N, G]

    weight = (q - z) * scale

Dynamic activations have one scale a token, amax / ((2^b - 1) / 2): lowbit's, clipped by
(2^(b-1) - 1) / ((2^b - 1) / 2). That is what compressed-tensors itself computes; vLLM's kernels
divide by 2^(b-1) - 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.config import LowbitConfig
from lowbit.errors import InputError
from lowbit.formats import PACKED_BITS, IntFormat, QuantFormat
from lowbit.interop import ct_transforms
from lowbit.interop.fields import packed, unpacked, width
from lowbit.interop.reader import Online, Reader, Shape, field_of, grid
from lowbit.interop.weights import ForeignWeight, exactly, foreign_weight
from lowbit.nn.linear import QuantLinear

METHOD = "compressed-tensors"
PACKED, BYTES = "pack-quantized", "int-quantized"
SCALE, ZERO_POINT, G_IDX = "weight_scale", "weight_zero_point", "weight_g_idx"
CODES = {PACKED: "weight_packed", BYTES: "weight"}


def reader(config: dict) -> Reader:
    """How to read a checkpoint with this quantization_config."""
    groups = field_of(config, "config_groups", dict)
    if len(groups) != 1:
        raise InputError(f"all linears must be quantized alike, got config_groups {sorted(groups)}")
    (scheme,) = groups.values()
    layout = scheme.get("format") or config.get("format")
    if layout not in CODES:
        raise InputError(f"format must be one of {sorted(CODES)}, got {layout!r}")
    sparsity = config.get("sparsity_config")
    if sparsity and sparsity.get("format") != "dense":
        raise InputError(f"sparsity_config must be empty or dense, got {sparsity}")
    if config.get("kv_cache_scheme"):
        raise InputError(f"kv_cache_scheme must be null, got {config['kv_cache_scheme']}")
    if scheme.get("output_activations"):
        raise InputError(f"output_activations must be null, got {scheme['output_activations']}")
    weight = _weight_grid(field_of(scheme, "weights", dict))
    activation = _activation_grid(scheme.get("input_activations"))
    format = QuantFormat(weight, activation)

    def shapes(shape: tuple[int, int]) -> dict[str, Shape]:
        return _shapes(layout, weight, shape)

    def read(tensors: dict[str, Tensor], shape: tuple[int, int]) -> ForeignWeight:
        return _read(layout, weight, tensors, shape)

    def online(stored: Mapping[str, Tensor], linears: dict[str, str]) -> Online:
        return ct_transforms.online(config.get("transform_config") or {}, stored, linears)

    return Reader(
        format,
        f"{METHOD}, {layout}",
        SCALE,
        shapes,
        read,
        optional=("weight_shape", G_IDX),
        activation_clip=activation_clip(activation),
        online=online,
    )


def activation_clip(activation: IntFormat | None) -> float:
    """That with which lowbit's per-token quantizer is the one of compressed-tensors."""
    if activation is None or not activation.symmetric:
        return 1.0
    return activation.qmax / ((2**activation.bits - 1) / 2)


def _weight_grid(weights: dict) -> IntFormat:
    strategy = weights.get("strategy")
    if weights.get("type") != "int" or weights.get("dynamic"):
        raise InputError(
            f"weights must be static and of type 'int', got type {weights.get('type')!r}, "
            f"dynamic {weights.get('dynamic')!r}"
        )
    if strategy not in ("group", "channel"):
        raise InputError(f"strategy of weights must be 'group' or 'channel', got {strategy!r}")
    group_size = field_of(weights, "group_size", int) if strategy == "group" else -1
    symmetric = field_of(weights, "symmetric", bool)
    return grid(field_of(weights, "num_bits", int), group_size, symmetric)


def _activation_grid(activations: dict | None) -> IntFormat | None:
    if activations is None:
        return None
    kind = {name: activations.get(name) for name in ("type", "dynamic", "strategy")}
    if kind != {"type": "int", "dynamic": True, "strategy": "token"}:
        raise InputError(
            f"input_activations must be of type 'int', dynamic and of strategy 'token', got {kind}"
        )
    symmetric = field_of(activations, "symmetric", bool)
    return IntFormat(field_of(activations, "num_bits", int), symmetric)


def _shapes(layout: str, weight: IntFormat, shape: tuple[int, int]) -> dict[str, Shape]:
    (N, K), groups, bits = shape, weight.num_groups(shape[1]), weight.bits
    packed = layout == PACKED
    shapes = {CODES[layout]: (N, width(K, bits)) if packed else shape, SCALE: (N, groups)}
    if not weight.symmetric:
        shapes[ZERO_POINT] = (width(N, bits) if packed else N, groups)
    return shapes


def _read(
    layout: str, weight: IntFormat, tensors: dict[str, Tensor], shape: tuple[int, int]
) -> ForeignWeight:
    (N, K), bits = shape, weight.bits
    codes, scale, zeros = (tensors.get(name) for name in (CODES[layout], SCALE, ZERO_POINT))
    if layout == PACKED:
        codes = unpacked(codes, bits, K)
        zeros = None if zeros is None else unpacked(zeros.T, bits, N).T
    else:
        codes, zeros = _from_zero(codes, bits), None if zeros is None else _from_zero(zeros, bits)
    if zeros is None:
        zeros = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    return ForeignWeight(codes, scale, zeros)


def _from_zero(codes: Tensor, bits: int) -> Tensor:
    """Signed codes, counted from the lowest."""
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.dtype != torch.int8 or codes.min() < lowest or codes.max() > highest:
        raise InputError(
            f"int-quantized codes must be int8 in {lowest}..{highest}, got {codes.dtype} in "
            f"{codes.min()}..{codes.max()}"
        )
    return (codes.to(torch.int16) - lowest).to(torch.uint8)


def quantization_config(config: LowbitConfig, dtype: torch.dtype) -> dict:
    """That of a checkpoint with the same weights; what it cannot say is an InputError."""
    weight, activation = config.format.weight, config.format.activation
    if weight is None or weight.bits not in PACKED_BITS or weight.two_level:
        raise InputError(
            f"{METHOD} has weights of {PACKED_BITS} bits and one level of scales, got "
            f"{config.format}"
        )
    if config.format.kv:
        raise InputError(f"{METHOD} has no dynamic quantization of KV, got {config.format}")
    _check_inputs(config)
    layout = PACKED if activation is None else BYTES
    scheme = {
        "targets": ["Linear"],
        "weights": _arguments(weight, "channel" if weight.group_size is None else "group"),
        "input_activations": activation and _arguments(activation, "token", dynamic=True),
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": ct_transforms.config_of(config.input_transforms),
    }


def _arguments(grid: IntFormat, strategy: str, dynamic: bool = False) -> dict:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group_size,
        "dynamic": dynamic,
    }


def _check_inputs(config: LowbitConfig):
    """That the format's own quantizer of inputs is this one.

    Of symmetric 8-bit ones, also that which divides by 127, as vLLM's kernels do.
    """
    activation = config.format.activation
    if activation is None:
        return
    if config.tensor_parallel > 1:
        raise InputError(
            f"{METHOD} has one scale a token, got a model quantized for {config.tensor_parallel} "
            "ranks, with a scale for the slice of each"
        )
    known = {activation_clip(activation)}
    if activation.bits == 8:
        known.add(1.0)
    if config.clips or config.activation_clip not in known:
        raise InputError(
            f"{METHOD} quantizes {activation.bits}-bit inputs with clip {sorted(known)}, got "
            f"{config.activation_clip} and {len(config.clips)} of single modules"
        )


def linear_tensors(linear: QuantLinear, dtype: torch.dtype, path: str) -> dict[str, Tensor]:
    """Its tensors by their last names, without the bias; scales in the model's dtype."""
    weight, bits = foreign_weight(linear.packed_weight), linear.weight_format.bits
    tensors = {SCALE: exactly(weight.scale, dtype, f"{path}: scales")}
    if linear.activation_format is not None:
        lowest = 1 << (bits - 1)
        return tensors | {CODES[BYTES]: (weight.codes.to(torch.int16) - lowest).to(torch.int8)}
    tensors |= {
        CODES[PACKED]: packed(weight.codes, bits),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not linear.weight_format.symmetric:
        tensors[ZERO_POINT] = packed(weight.zero_point.T, bits).T.contiguous()
    return tensors
