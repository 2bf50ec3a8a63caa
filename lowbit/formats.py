"""What the bits mean: IntFormat, QuantFormat, Layout, PackedTensor; docs/formats.md draws them.

    value = (code - zero_point) * scale          zero_point = 0 when symmetric
    value = code * scale * channel_scale         two-level scales: scale an integer

Symmetric codes are two's complement, -2^(b-1) .. 2^(b-1) - 1, with scale = amax / (2^(b-1) - 1).
Asymmetric codes are unsigned, 0 .. 2^b - 1, with an integer zero_point in the same range.
"""

import difflib
import re
from dataclasses import dataclass, replace
from enum import Enum

import torch

from lowbit.errors import InputError

PACKED_BITS = (2, 3, 4, 8)  # widths with a dense packing; other widths live in 8-bit containers
MIN_BITS, MAX_BITS, UNQUANTIZED_BITS = 2, 8, 16
GROUP_SIZES = (32, 64, 128)

# Two-level scales: an integer per group, so that code * scale fits int8: 8 * 15 = 120.
GROUP_SCALE_MAX, TWO_LEVEL_MAX_BITS = 15, 4

# The smallest positive fp16 number, used as a maximum: a scale is never 0, in fp16 or in fp32.
MIN_SCALE = 2.0**-24


FRAGMENT_TILE = 64  # rows and columns of a tile of the kernel layouts


class Layout(str, Enum):
    """How codes lie in memory. Only ROW_MAJOR is ever saved.

    The last three are kernel layouts of weights [N, K]: tiles of 64 x 64 codes, padded with zeros,
    in the order in which the lanes of a warp hold the A operand of a matrix instruction.
    """

    ROW_MAJOR = "row_major"  # packed, code 0 in the lowest bits, uint8
    BYTES = "bytes"  # one code per byte, int8 (symmetric) or uint8 (asymmetric)
    FRAGMENT = "fragment"  # of 8-bit matrix instructions, m16n8k32; codes of 4 or 8 bits
    FRAGMENT_INT4 = "fragment_int4"  # of the 4-bit one, m16n8k64
    FRAGMENT_FLOAT = "fragment_float"  # of those of fp16 and bf16, m16n8k16; any stored width


@dataclass(frozen=True)
class IntFormat:
    """An integer grid of 2..8 bits, one scale per `group_size` elements of a row; None: per row.

    two_level: that scale is an integer, 1..GROUP_SCALE_MAX, in steps of the row's fp32 scale.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    two_level: bool = False

    def __post_init__(self):
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise InputError(f"bits must be in {MIN_BITS}..{MAX_BITS}, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size must be None or positive, got {self.group_size}")
        one_level = not self.symmetric or self.group_size is None or self.bits > TWO_LEVEL_MAX_BITS
        if self.two_level and one_level:
            raise InputError(
                f"two-level scales need symmetric codes of at most {TWO_LEVEL_MAX_BITS} bits in "
                f"groups, got {self.bits} bits, symmetric={self.symmetric}, group {self.group_size}"
            )

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def storage_bits(self) -> int:
        """Bits one code takes in ROW_MAJOR: its own width where that packs densely, else 8."""
        return self.bits if self.bits in PACKED_BITS else 8

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of a code in the BYTES layout."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def weight_scale_dtype(self) -> torch.dtype:
        """Stored dtype of a weight's scales: fp32 for one per output channel, whose bytes do not
        matter, fp16 for groups, uint8 for groups of two-level scales."""
        if self.two_level:
            return torch.uint8
        return torch.float32 if self.group_size is None else torch.float16

    def num_groups(self, K: int) -> int:
        """Scales per row of K elements; a group size that does not divide K is an InputError."""
        if self.group_size is None:
            return 1
        if K % self.group_size:
            raise InputError(f"group_size must divide the row length {K}, got {self.group_size}")
        return K // self.group_size


# kernel layout -> widths of stored codes it is made for
FRAGMENT_BITS = {
    Layout.FRAGMENT: (4, 8),
    Layout.FRAGMENT_INT4: (4,),
    Layout.FRAGMENT_FLOAT: PACKED_BITS,
}


def codes_shape(format: IntFormat, layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the codes of a tensor [..., K]; what `layout` cannot hold is an InputError."""
    K, bits = shape[-1], format.storage_bits
    if layout is Layout.BYTES:
        return tuple(shape)
    if layout is Layout.ROW_MAJOR:
        if K * bits % 8:
            raise InputError(f"a packed row must fill whole bytes, got {K} codes of {bits} bits")
        return (*shape[:-1], K * bits // 8)
    takes_format = format.symmetric or layout is Layout.FRAGMENT_FLOAT
    if len(shape) != 2 or not takes_format or bits not in FRAGMENT_BITS[layout]:
        kind = "weights" if layout is Layout.FRAGMENT_FLOAT else "symmetric weights"
        *others, widest = map(str, FRAGMENT_BITS[layout])
        widths = f"{', '.join(others)} or {widest}" if others else widest
        raise InputError(
            f"layout {layout.value!r} is for {kind} [N, K] of {widths} stored bits, "
            f"got shape {tuple(shape)}, symmetric={format.symmetric}, {bits} stored bits"
        )
    tiles = (-(-size // FRAGMENT_TILE) for size in shape)
    return (*tiles, FRAGMENT_TILE * FRAGMENT_TILE * bits // 8)


@dataclass(frozen=True)
class PackedTensor:
    """A quantized tensor [..., K] and everything needed to read it.

    codes          ROW_MAJOR: uint8 [..., K * storage_bits / 8]; BYTES: int8 or uint8 [..., K];
                   kernel layouts: uint8 [ceil(N / 64), ceil(K / 64), 64 * 64 * storage_bits / 8]
    scale          [..., G] fp32 or fp16, uint8 of two levels; G = format.num_groups(K)
    zero_point     [..., G] uint8, None when symmetric
    shape          (..., K), the shape of the tensor the codes stand for
    channel_scale  [..., 1] fp32, which multiplies `scale`; None unless it has two levels
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    format: IntFormat
    layout: Layout
    shape: torch.Size
    channel_scale: torch.Tensor | None = None

    def __post_init__(self):
        K = self.shape[-1]
        expected = codes_shape(self.format, self.layout, self.shape)
        if tuple(self.codes.shape) != expected:
            raise InputError(f"codes must have shape {expected}, got {tuple(self.codes.shape)}")
        groups = (*self.shape[:-1], self.format.num_groups(K))
        if tuple(self.scale.shape) != groups:
            raise InputError(f"scale must have shape {groups}, got {tuple(self.scale.shape)}")
        if (self.zero_point is None) != self.format.symmetric:
            raise InputError(
                "zero_point must be None exactly when the format is symmetric, got "
                f"symmetric={self.format.symmetric} and zero_point {self.zero_point is not None}"
            )
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise InputError(
                f"zero_point must have shape {groups}, got {tuple(self.zero_point.shape)}"
            )
        channels = (*self.shape[:-1], 1) if self.format.two_level else None
        got = None if self.channel_scale is None else tuple(self.channel_scale.shape)
        if got != channels:
            raise InputError(
                f"channel_scale must have shape {channels}: two_level={self.format.two_level}, "
                f"got {got}"
            )

    def to(self, device: torch.device | str) -> "PackedTensor":
        """The same on another device."""
        parts = ("codes", "scale", "zero_point", "channel_scale")
        tensors = {name: getattr(self, name) for name in parts}
        moved = {name: t if t is None else t.to(device) for name, t in tensors.items()}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        tensors = (self.codes, self.scale, self.zero_point, self.channel_scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


GRAMMAR = (
    "w<bits>a<bits>[kv<bits>][g<group>][-wasym|-wtwolevel][-aasym][-head<bits>], "
    "bits 2..8 or 16, group 32, 64 or 128"
)
KNOWN_NAMES = (
    "w4a4kv4",
    "w4a8kv4",
    "w4a4",
    "w4a8",
    "w6a6",
    "w8a8",
    "w8a8kv8",
    "w4a16kv4",
    "w4a16",
    "w8a16",
    "w4a16g128",
    "w3a16g128",
    "w2a16g128",
    "w2a16g32",
)
_NAME = re.compile(
    r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?(-wasym|-wtwolevel)?(-aasym)?(?:-head(\d+))?"
)


@dataclass(frozen=True)
class QuantFormat:
    """Formats of a model: linear weights, their inputs, KV cache, the output head's weight.

    None: left unquantized, as what the head reads always is.

    `parse` and `name` are inverses. Weights: per output channel or per group along K, symmetric
    unless `-wasym`, of two levels with `-wtwolevel`. Activations: per token, symmetric unless
    `-aasym`. KV: per token and KV head, one group of head_dim elements, asymmetric. Head: per row,
    symmetric.
    """

    weight: IntFormat | None
    activation: IntFormat | None = None
    kv: IntFormat | None = None
    head: IntFormat | None = None

    def __post_init__(self):
        w, a, kv = self.weight, self.activation, self.kv
        if a is not None and w is None:
            raise InputError("a format that quantizes activations must quantize weights too")
        if a is not None and not w.symmetric:
            raise InputError("-wasym needs 16-bit activations: int_gemm takes symmetric weights")
        if a is None and w is not None and w.two_level:
            raise InputError("-wtwolevel needs quantized activations: its scales are for int_gemm")
        if w is not None and w.group_size not in (None, *GROUP_SIZES):
            raise InputError(f"group must be one of {GROUP_SIZES}, got {w.group_size}")
        if a is not None and a.group_size is not None:
            raise InputError("activations are quantized per token: they have no group size")
        if kv is not None and (kv.symmetric or kv.group_size is not None):
            raise InputError("the KV cache is asymmetric, one group per token and head")
        if self.head is not None and self.head != IntFormat(self.head.bits):
            raise InputError("the output head is symmetric, one group per row")

    @property
    def name(self) -> str:
        w, a, kv = self.weight, self.activation, self.kv
        bits = [UNQUANTIZED_BITS if f is None else f.bits for f in (w, a)]
        return (
            f"w{bits[0]}a{bits[1]}"
            + ("" if kv is None else f"kv{kv.bits}")
            + ("" if w is None or w.group_size is None else f"g{w.group_size}")
            + ("" if w is None or w.symmetric else "-wasym")
            + ("-wtwolevel" if w is not None and w.two_level else "")
            + ("" if a is None or a.symmetric else "-aasym")
            + ("" if self.head is None else f"-head{self.head.bits}")
        )

    @classmethod
    def parse(cls, name: str) -> "QuantFormat":
        """The format a name stands for; a name not understood is an InputError with the grammar."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(_not_understood(name))
        w, a, kv, group, weight, activation_asym, head = match.groups()
        group_size, two_level = int(group) if group else None, weight == "-wtwolevel"
        try:
            result = cls(
                weight=_int_format(w, weight != "-wasym", group_size, two_level),
                activation=_int_format(a, not activation_asym),
                kv=_int_format(kv, symmetric=False) if kv else None,
                head=_int_format(head, symmetric=True) if head else None,
            )
        except InputError as error:
            raise InputError(f"{_not_understood(name)} ({error})") from None
        if result.name != name:  # kv16, w04 and the like: one format, one name
            raise InputError(_not_understood(name, nearest=result.name))
        return result

    def __str__(self) -> str:
        return self.name


def _int_format(
    bits: str, symmetric: bool, group_size: int | None = None, two_level: bool = False
) -> IntFormat | None:
    if int(bits) == UNQUANTIZED_BITS:
        return None
    return IntFormat(int(bits), symmetric, group_size, two_level)


def _not_understood(name: str, nearest: str | None = None) -> str:
    nearest = nearest or next(iter(difflib.get_close_matches(name, KNOWN_NAMES, 1, 0.0)))
    return f"unknown format {name!r}: expected {GRAMMAR}; the nearest known name is {nearest!r}"
