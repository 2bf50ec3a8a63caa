"""What is compiled ahead of time of the Triton kernels: data only.

tests/test_compile.py compiles every one of them for every architecture, without a GPU; the tiles of
tiles.py are all among them.
"""

from dataclasses import dataclass, field, replace
from importlib.metadata import version

from lowbit.kernels.tiles import (
    ADD_PARTS_BLOCK_N,
    ANY,
    INT_GEMM_GROUPED_TILES,
    INT_GEMM_TILES,
    SPLIT_K_MAX_M,
    WEIGHT_ONLY_FP32_TILES,
    WEIGHT_ONLY_TILES,
    Tile,
    attention_tile,
    head_words,
)


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    kernel     "module:function" in lowbit.kernels
    arguments  run-time arguments in any order: Triton types, such as "*fp16", "i32", "fp32"
    constants  tl.constexpr arguments; an argument that is 1 at run time belongs here
    aligned    integer arguments that are multiples of 16; pointers always are
    fp_fusion  as at launch; False in everything that quantizes
    units      compute capability -> regular expression of the matrix instruction it must use
    expects    regular expressions that the PTX must match
    forbids    regular expressions that it must not match

    Whatever the configuration, floats are narrowed by rounding to nearest (tests/test_compile.py).
    """

    kernel: str
    name: str
    arguments: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    fp_fusion: bool = True
    units: dict[int, str] = field(default_factory=dict)
    expects: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()


# Division is IEEE; nothing is contracted, so that each product is rounded as in the reference.
_NO_FAST_DIVISION = r"div\.(full|approx)"
_IEEE = {
    "fp_fusion": False,
    "expects": (r"div\.rn\.f32",),
    "forbids": (_NO_FAST_DIVISION, r"fma\.rn\.f32", r"rcp\.", r"rsqrt\."),
}
# Rotations add x times +-1 by FMA, which rounds no product; an exponential is built of FMAs.
_ROTATED = {**_IEEE, "forbids": (_NO_FAST_DIVISION,)}


def _quantized(symmetric: bool, packed: bool, scale: str = "*fp32") -> dict[str, str]:
    """The arguments of what a kernel that quantizes returns."""
    codes = "*u8" if packed or not symmetric else "*i8"
    return {"codes_ptr": codes, "scale_ptr": scale, "zero_ptr": "*u8", "clip": "fp32"}


def _grid(bits: int, symmetric: bool, packed: bool) -> dict[str, object]:
    return {"BITS": bits, "STORAGE_BITS": bits, "SYMMETRIC": symmetric, "PACKED": packed}


QUANTIZE = tuple(
    Config(
        "quantize:_quantize_kernel",
        f"{x}-{block_g}x{block_k}-{bits}-{'sym' if symmetric else 'asym'}",
        {"x_ptr": f"*{x}", "groups": "i32", **_quantized(symmetric, packed, scale)},
        {"K": K, **_grid(bits, symmetric, packed), "BLOCK_G": block_g, "BLOCK_K": block_k},
        warps,
        **_IEEE,
    )
    for x, bits, symmetric, packed, scale, K, block_g, block_k, warps in (
        ("bf16", 4, True, True, "*fp32", 576, 4, 1024, 8),
        ("bf16", 8, True, False, "*fp32", 4096, 1, 4096, 8),
        ("fp16", 4, False, True, "*fp16", 128, 32, 128, 8),
        ("fp32", 2, False, True, "*fp32", 11008, 1, 16384, 32),
        ("fp16", 4, True, False, "*fp16", 28672, 1, 32768, 32),
    )
)
DEQUANTIZE = tuple(
    Config(
        "quantize:_dequantize_kernel",
        f"{out}-{bits}-{'sym' if symmetric else 'asym'}",
        {
            "codes_ptr": "*u8" if packed or not symmetric else "*i8",
            "scale_ptr": "*fp16",
            "zero_ptr": "*u8",
            "out_ptr": f"*{out}",
            "total": "i64",
            "group_size": "i32",
        },
        {"BITS": bits, "SYMMETRIC": symmetric, "PACKED": packed, "BLOCK": 1024},
        aligned=("group_size",),
        fp_fusion=False,
    )
    for out, bits, symmetric, packed in (
        ("bf16", 4, True, True),
        ("fp16", 4, False, True),
        ("fp32", 8, True, False),
    )
)


def _units(kind: str, rows: int, blackwell: str | None = None) -> dict[int, str]:
    """The matrix instruction of each architecture for a dot of so many rows."""
    mma = rf"mma\.sync\S*\.row\.col\.\S*{kind}"
    if rows < 64:
        return dict.fromkeys((80, 89, 90, 100), mma)
    return {80: mma, 89: mma, 90: rf"wgmma\.\S*{kind}", 100: blackwell or mma}


def _int8_units(rows: int) -> dict[int, str]:
    """Before Triton 3.9 int8 has mma.sync on sm_100, whose own unit it does not address."""
    major, minor = map(int, version("triton").split(".")[:2])
    return _units(
        r"s32\.s8\.s8", rows, r"tcgen05\.mma\S*kind::i8" if (major, minor) >= (3, 9) else None
    )


def unique(tiles: tuple[Tile, ...]) -> list[Tile]:
    """One of the tiles that differ in what they are for alone: that for the fewest rows, as K is
    split of few."""
    return list({replace(t, max_M=ANY, max_N=ANY): t for t in reversed(tiles)}.values())[::-1]


def _float_units(x: str, rows: int) -> dict[int, str]:
    return _units(rf"f32\.{x.replace('fp', 'f')}", rows, r"tcgen05\.mma\S*kind::f16")


INT_GEMM = tuple(
    Config(
        "int_gemm:int_gemm_kernel",
        f"{name}-{t.BLOCK_M}x{t.BLOCK_N}{'-split' if split else ''}",
        {
            "x": "*i8",
            "x_scale": "*fp32",
            **({} if symmetric else {"x_zero_point": "*u8"}),
            "w": "*i8",
            **({"w_group_scale": "*u8"} if two_level else {}),
            "w_scale": "*fp16" if group and not two_level else "*fp32",
            **({} if symmetric else {"bias": "*fp16", "residual": f"*{out}"}),
            "y": f"*{out}",
            **({"parts": "*i32"} if split else {}),
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "columns": "i32",
        },
        {
            **({"x_zero_point": None, "bias": None, "residual": None} if symmetric else {}),
            **({} if two_level else {"w_group_scale": None}),
            **({} if split else {"parts": None}),
            "X_BITS": x_bits,
            "X_NIBBLES": x_nibbles,
            "W_NIBBLES": w_nibbles,
            "GROUP": group,
            "BLOCK_M": t.BLOCK_M,
            "BLOCK_N": t.BLOCK_N,
            "BLOCK_K": min(t.BLOCK_K, group or t.BLOCK_K),
        },
        t.num_warps,
        t.num_stages,
        aligned=("N", "K", "columns"),
        fp_fusion=False,
        units=_int8_units(t.BLOCK_M),
        forbids=(r"fma\.rn\.f32",),
    )
    for name, out, x_bits, symmetric, x_nibbles, w_nibbles, group, two_level in (
        ("w8a8", "fp16", 8, True, False, False, 0, False),
        ("w4a8", "bf16", 8, True, False, True, 0, False),
        ("w4a4-packed", "fp16", 4, True, True, True, 0, False),
        ("w4a8-asym", "fp32", 8, False, False, True, 0, False),
        ("w4a4-packed-asym-g32", "bf16", 4, False, True, True, 32, False),
        ("w4a8-g128", "fp16", 8, True, False, True, 128, False),
        ("w4a4-packed-asym-g32-two-level", "fp16", 4, False, True, True, 32, True),
        ("w4a8-g128-two-level", "bf16", 8, True, False, True, 128, True),
    )
    for t in unique(INT_GEMM_GROUPED_TILES if group else INT_GEMM_TILES)
    for split in (
        (False, True) if (two_level or not group) and t.max_M <= SPLIT_K_MAX_M else (False,)
    )
) + tuple(
    Config(
        "int_gemm:add_parts_kernel",
        f"add-parts-{out}",
        {
            "parts": "*i32",
            "x_scale": "*fp32",
            "w_scale": "*fp32",
            **({"bias": "*bf16", "residual": f"*{out}"} if bias else {}),
            "y": f"*{out}",
            **dict.fromkeys(("M", "N", "number"), "i32"),
        },
        {
            **({} if bias else {"bias": None, "residual": None}),
            "BLOCK_N": ADD_PARTS_BLOCK_N,
        },
        aligned=("N",),
        fp_fusion=False,
        forbids=(r"fma\.rn\.f32",),
    )
    for out, bias in (("fp16", False), ("bf16", True), ("fp32", False))
)


def _weight_only(t: Tile, x: str, name: str, bits: int, signed: bool, group: int) -> Config:
    gemv = t.BLOCK_M == 1
    on_fp32_units = gemv or x == "fp32"
    return Config(
        f"weight_only_gemm:weight_only_{'gemv' if gemv else 'gemm'}_kernel",
        f"{x}-{name}-{t.BLOCK_M}x{t.BLOCK_N}",
        {
            "x": f"*{x}",
            "w": "*u8",
            "w_scale": "*fp16" if group else "*fp32",
            **({} if signed else {"w_zero_point": "*u8", "bias": f"*{x}", "residual": f"*{x}"}),
            "y": f"*{x}",
            **({} if gemv else {"M": "i32"}),
            "N": "i32",
            "K": "i32",
        },
        {
            **({"w_zero_point": None, "bias": None, "residual": None} if signed else {}),
            "BITS": bits,
            "GROUP": group,
            **({} if gemv else {"BLOCK_M": t.BLOCK_M}),
            "BLOCK_N": t.BLOCK_N,
            "BLOCK_K": min(t.BLOCK_K, group or t.BLOCK_K),
        },
        t.num_warps,
        t.num_stages,
        aligned=("N", "K"),
        units={} if on_fp32_units else _float_units(x, t.BLOCK_M),
        expects=(r"fma\.rn\.f32",) if on_fp32_units else (),
        forbids=(r"mma\S*tf32",),
    )


WEIGHT_ONLY_GEMM = tuple(
    _weight_only(t, x, *format)
    for x, tiles, formats in (
        (
            "bf16",
            WEIGHT_ONLY_TILES,
            (("w4", 4, True, 0), ("w4-asym-g128", 4, False, 128), ("w2-asym-g32", 2, False, 32)),
        ),
        ("fp16", WEIGHT_ONLY_TILES, (("w8", 8, True, 0), ("w3-asym-g64", 3, False, 64))),
        ("fp32", WEIGHT_ONLY_FP32_TILES, (("w8", 8, True, 0), ("w4-g128", 4, True, 128))),
    )
    for t in unique(tiles)
    for format in formats
)

# order: BASE, BASE_PAD, POW2, LOG_POW2, and the warps of a program that holds one block
_ORDERS = {
    9: (9, 16, 1, 0, 8),  # a matrix of floats
    64: (1, 1, 64, 6, 8),
    4096: (1, 1, 4096, 12, 8),
    576: (36, 64, 16, 4, 4),
    1536: (12, 16, 128, 7, 4),
    4160: (1040, 2048, 4, 2, 4),
    11008: (344, 512, 32, 5, 16),
    13824: (108, 128, 128, 7, 8),
    14336: (28, 32, 512, 9, 16),
    18944: (148, 256, 128, 7, 16),
    28672: (28, 32, 1024, 10, 16),
    32768: (1, 1, 32768, 15, 32),
}


def _matrix(x: str, order: int) -> dict[str, str]:
    """Where a base is not one: signs, or the floats of a matrix; else anything."""
    base = _ORDERS[order][0]
    return {"matrix_ptr": f"*{x}" if base == 1 else "*i8" if base % 4 == 0 else "*fp32"}


def _rotation_units(x: str, order: int, activation: str = "") -> dict[int, str]:
    """Base orders of rows neither too long nor too narrow; sm_100 keeps mma.sync for some."""
    base, rows, pow2 = _ORDERS[order][:3]
    if base == 1 or base % 4 or pow2 < 16 or rows * pow2 > 16384:
        return {}
    units = _float_units("bf16" if activation else x.replace("fp32", "bf16"), rows)
    return {**units, 100: rf"{units[80]}|{units[100]}"}


def _rotation(order: int, block_r: int, block_i: int) -> dict[str, object]:
    names = ("BASE", "BASE_PAD", "POW2", "LOG_POW2")
    constants = dict(zip(names, _ORDERS[order], strict=False))
    inner = {"inner": 1} if block_i == 1 else {}
    return {**constants, "BLOCK_R": block_r, "BLOCK_I": block_i, **inner}


HADAMARD = tuple(
    Config(
        "hadamard:_hadamard_kernel",
        f"{x}-{order}x{block_r}x{block_i}",
        {
            "x_ptr": f"*{x}",
            **_matrix(x, order),
            "y_ptr": f"*{x}",
            "blocks": "i32",
            "factor": "fp32",
            **({} if block_i == 1 else {"inner": "i32"}),
        },
        _rotation(order, block_r, block_i),
        _ORDERS[order][-1],
        units=_rotation_units(x, order),
    )
    for x, order, block_r, block_i in (
        ("bf16", 64, 64, 1),
        ("fp16", 64, 1, 64),
        ("bf16", 4096, 1, 1),
        ("fp32", 576, 4, 1),
        ("bf16", 1536, 2, 1),
        ("bf16", 11008, 1, 1),
        ("bf16", 14336, 1, 1),
        ("fp16", 32768, 1, 1),
    )
)
HADAMARD_QUANT = tuple(
    Config(
        "hadamard_quant:_hadamard_quant_kernel",
        f"{x}-{order}x{block_i}-{bits}",
        {
            **dict.fromkeys(("x_ptr", "up_ptr"), f"*{x}"),
            **_matrix(x, order),
            "factor": "fp32",
            "gap": "i32",
            **_quantized(symmetric, packed),
            **({} if block_i == 1 else {"inner": "i32"}),
        },
        {
            "A": 1,
            "ACTIVATION": "",
            **_rotation(order, 1, block_i),
            **_grid(bits, symmetric, packed),
        },
        16 if block_i > 1 else _ORDERS[order][-1],
        units=_rotation_units(x, order),
        **_ROTATED,
    )
    for x, order, bits, symmetric, packed, block_i in (
        ("bf16", 4096, 4, True, True, 1),
        ("bf16", 64, 4, True, True, 128),
        ("bf16", 9, 4, True, True, 64),
        ("bf16", 1536, 8, True, False, 1),
        ("fp16", 576, 4, False, True, 1),
        ("bf16", 11008, 4, True, True, 1),
        ("bf16", 13824, 4, True, True, 1),
        ("bf16", 14336, 4, True, True, 1),
        ("bf16", 4160, 4, True, True, 1),
        ("bf16", 18944, 4, True, True, 1),
        ("bf16", 28672, 8, True, False, 1),
        ("fp16", 32768, 8, False, False, 1),
    )
)
SILU_MUL_HADAMARD_QUANT = tuple(
    Config(
        "hadamard_quant:_hadamard_quant_kernel",
        f"{x}-{order}-{activation}-{bits}",
        {
            **dict.fromkeys(("x_ptr", "up_ptr"), f"*{x}"),
            **_matrix(x, order),
            "factor": "fp32",
            "gap": "i32",
            **_quantized(symmetric, packed),
        },
        {
            "A": 1,
            "ACTIVATION": activation,
            **_rotation(order, 1, 1),
            **_grid(bits, symmetric, packed),
        },
        _ORDERS[order][-1],
        units=_rotation_units(x, order, activation),
        **_ROTATED,
    )
    for x, order, activation, bits, symmetric, packed in (
        ("bf16", 1536, "silu", 4, True, True),
        ("bf16", 11008, "silu", 4, True, True),
        ("bf16", 14336, "silu", 8, True, False),
        ("bf16", 28672, "silu", 4, True, True),
        ("fp16", 4096, "gelu", 4, False, True),
        ("bf16", 4096, "gelu_tanh", 4, True, True),
        ("bf16", 64, "relu", 8, True, False),
    )
)
RMSNORM_QUANT = tuple(
    Config(
        "rmsnorm_quant:_rmsnorm_quant_kernel",
        f"{x}-{block}-{bits}" + ("" if residual else "-plain"),
        {
            **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "sum_ptr"), f"*{x}"),
            **_quantized(symmetric, packed),
            "eps": "fp32",
            "K": "i32",
        },
        {
            "HAS_RESIDUAL": residual,
            "HAS_WEIGHT": residual,
            "BLOCK": block,
            **_grid(bits, symmetric, packed),
        },
        warps,
        aligned=("K",),
        **_IEEE,
    )
    for x, block, bits, symmetric, packed, residual, warps in (
        ("bf16", 1024, 4, True, True, True, 2),
        ("fp16", 4096, 8, True, False, False, 8),
        ("bf16", 8192, 4, False, True, True, 16),
    )
)
PACK, UNPACK = (
    tuple(
        Config(
            f"pack:_{kernel}_kernel",
            f"{bits}",
            {"codes_ptr": "*i8", "packed_ptr": "*u8", "codes": "i32", "packed": "i32"},
            {"BITS": bits, **constants, "BLOCK": 1024},
        )
        for bits in (2, 3, 4, 8)
    )
    for kernel, constants in (("pack", {}), ("unpack", {"SIGNED": True}))
)

# D, BASE, BASE_PAD, POW2, LOG_POW2, BLOCK_R and warps
_HEADS = {
    "plain-80": (80, 1, 128, 1, 0, 16, 4),
    "hadamard-64": (64, 1, 1, 64, 6, 32, 4),
    "hadamard-80": (80, 20, 32, 4, 2, 8, 2),
    "hadamard-96": (96, 12, 16, 8, 3, 4, 1),
    "hadamard-128": (128, 1, 1, 128, 7, 16, 4),
    "hadamard-256": (256, 1, 1, 256, 8, 8, 4),
    "matrix-128": (128, 128, 128, 1, 0, 32, 8),
    "matrix-256": (256, 256, 256, 1, 0, 16, 8),
}
_HEAD_TABLES = {"hadama": "*i8", "matrix": "*fp32"}
_HEAD_CONSTANTS = ("D", "BASE", "BASE_PAD", "POW2", "LOG_POW2", "BLOCK_R")
_STRIDES = tuple(f"{x}_{of}_stride" for x in ("q", "k", "v") for of in ("token", "head"))
KV_APPEND = tuple(
    Config(
        "kv_append:_kv_append_kernel",
        f"{x}-{head}-{bits}",
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_out_ptr"), f"*{x}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{angle}"),
            "slot_ptr": "*i64",
            **{f"{t}_codes_ptr": "*u8" for t in ("k", "v")},
            **{f"{t}_scale_ptr": "*fp16" for t in ("k", "v")},
            **{f"{t}_zero_ptr": "*u8" for t in ("k", "v")},
            "matrix_ptr": f"*{x}" if _HEADS[head][1] == 1 else _HEAD_TABLES[head[:6]],
            **dict.fromkeys(("T", "num_q_heads", "num_kv_heads", "slots"), "i32"),
            **dict.fromkeys((*_STRIDES, "cos_stride", "sin_stride", "matrix_stride"), "i32"),
            "factor": "fp32",
            "clip": "fp32",
        },
        {
            **dict(zip(_HEAD_CONSTANTS, _HEADS[head], strict=False)),
            "R": R,
            "BITS": bits,
            "STORAGE_BITS": 8 if bits > 4 else bits,
        },
        _HEADS[head][-1],
        aligned=(*_STRIDES, "cos_stride", "sin_stride", "matrix_stride"),
        fp_fusion=False,
        # bf16 is rounded to nearest even, which the interpreter does not show
        expects=(
            r"div\.rn\.f32",
            r"ld\.global\S*\.v4",
        ),
        # a product with a matrix is FMAs, neither in TF32 nor in lower precision
        forbids=(*_IEEE["forbids"], "mma") if _HEADS[head][1] == 1 else (_NO_FAST_DIVISION, "mma"),
    )
    for x, angle, head, R, bits in (
        ("bf16", "fp32", "plain-80", 32, 2),
        ("bf16", "bf16", "hadamard-64", 64, 4),
        ("fp16", "fp16", "hadamard-80", 32, 4),
        ("bf16", "bf16", "hadamard-96", 96, 6),
        ("bf16", "bf16", "hadamard-128", 128, 4),
        ("fp32", "fp32", "hadamard-256", 64, 4),
        ("bf16", "bf16", "matrix-128", 128, 4),
        ("fp16", "fp16", "matrix-256", 256, 2),
    )
)


# fmt: off
def _kv_attention(
    q: str, head_dim: int, bits: int, heads: int, queries: float, new=False, window=False
) -> Config:
    # fmt: on
    words, split = head_words(head_dim, bits), queries == 1
    t = attention_tile(q == "fp32", heads * queries, head_dim, words, new)
    parts = {"row_max": "*fp32", "row_sum": "*fp32"}
    given = {"k_new": f"*{q}", "v_new": f"*{q}", "cached_lens": "*i32"}
    return Config(
        "kv_attention:kv_attention_kernel",
        f"{q}-{head_dim}-int{bits}-{heads}-{t.BLOCK_M}x{t.BLOCK_N}"
        + ("-split" if split else "")
        + ("-new" if new else "")
        + ("-window" if window else ""),
        {
            "q": f"*{q}",
            **dict.fromkeys(("k_codes", "v_codes"), "*i16"),
            **dict.fromkeys(("k_scale", "v_scale"), "*fp16"),
            **dict.fromkeys(("k_zero_point", "v_zero_point"), "*u8"),
            **dict.fromkeys(("block_table", "seq_lens", "query_start"), "*i32"),
            **(given if new else {}),
            **({"out": "*fp32", **parts} if split else {"out": f"*{q}"}),
            **dict.fromkeys(("T", "B", "P", "num_kv_heads", "split_length"), "i32"),
            "factor": "fp32",
            **({"window": "i32"} if window else {}),
        },
        {
            **({} if window else {"window": None}),
            **({} if split else dict.fromkeys(parts)),
            **({} if new else dict.fromkeys(given)),
            **{"HEAD_DIM": head_dim, "BITS": bits, "PAGE_SIZE": 16},
            **{"HEADS": heads, "ROWS": heads if split else t.BLOCK_M},
            **{"BLOCK_M": t.BLOCK_M, "BLOCK_N": t.BLOCK_N, "WORDS": words, "COPIES": t.copies},
        },
        t.num_warps,
        t.num_stages,
        aligned=("split_length",),
        units={} if q == "fp32" else _float_units(q, t.BLOCK_M),
        # two codes an instruction
        expects=(
            *((r"fma\.rn\.f32",) if q == "fp32" else ()),
            *((r"fma\.rn\.b?f16x2",) if bits < 8 and q != "fp32" else ()),
        ),
        forbids=(r"mma\S*tf32",),
    )


# fmt: off
_KV_CALLS = (  # head_dim, bits, query heads of a KV head, queries of one; with k_new; a window
    ("bf16", 64, 4, 3, 1), ("fp16", 64, 8, 1, 1), ("bf16", 80, 4, 1, 1), ("fp16", 128, 4, 8, 1),
    ("bf16", 128, 4, 4, 1), ("bf16", 128, 8, 8, 1), ("fp16", 128, 2, 4, 1), ("fp16", 256, 4, 4, 1),
    ("bf16", 256, 8, 1, 1), ("fp16", 128, 4, 4, 16), ("bf16", 64, 4, 3, ANY),
    ("fp16", 80, 8, 1, ANY), ("fp16", 128, 4, 4, ANY), ("bf16", 128, 4, 8, ANY),
    ("fp16", 256, 4, 4, ANY), ("bf16", 256, 8, 4, ANY), ("fp32", 64, 8, 3, ANY),
    ("fp32", 128, 4, 4, ANY), ("fp32", 256, 8, 4, ANY),
    ("bf16", 64, 4, 3, ANY, True), ("fp16", 80, 8, 1, ANY, True), ("fp16", 128, 4, 4, ANY, True),
    ("bf16", 128, 2, 4, 1, True), ("bf16", 256, 8, 4, ANY, True), ("fp32", 128, 4, 4, ANY, True),
    ("fp32", 64, 8, 3, ANY, True), ("bf16", 128, 4, 4, 1, False, True),
    ("bf16", 128, 4, 4, ANY, False, True), ("fp16", 128, 4, 8, ANY, True, True),
    ("fp32", 128, 4, 4, ANY, True, True),
)
# fmt: on
KV_ATTENTION = tuple(_kv_attention(*call) for call in _KV_CALLS) + tuple(
    Config(
        "kv_attention:combine_kernel",
        f"combine-{out}-{head_dim}-{splits}",
        {
            **{"partial": "*fp32", "row_max": "*fp32", "row_sum": "*fp32", "out": f"*{out}"},
            **dict.fromkeys(("seq_lens", "query_start"), "*i32"),
            **dict.fromkeys(("T", "B", "num_q_heads", "split_length"), "i32"),
            **({} if window is None else {"window": window}),
        },
        {
            **({"window": None} if window is None else {}),
            **{"BLOCK_N": 32, "HEAD_DIM": head_dim, "SPLITS": splits, "BLOCK_D": block_d},
        },
        aligned=("split_length",),
    )
    for out, head_dim, block_d, splits, window in (
        ("bf16", 80, 128, 2, None),
        ("fp16", 256, 256, 128, "i32"),
    )
)

CONFIGS: dict[str, tuple[Config, ...]] = {  # by op
    "pack": PACK,
    "unpack": UNPACK,
    "quantize": QUANTIZE,
    "dequantize": DEQUANTIZE,
    "hadamard": HADAMARD,
    "hadamard_quant": HADAMARD_QUANT,
    "rmsnorm_quant": RMSNORM_QUANT,
    "silu_mul_hadamard_quant": SILU_MUL_HADAMARD_QUANT,
    "int_gemm": INT_GEMM,
    "weight_only_gemm": WEIGHT_ONLY_GEMM,
    "kv_append": KV_APPEND,
    "kv_attention": KV_ATTENTION,
}
