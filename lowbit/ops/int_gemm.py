"""int_gemm: integer codes x integer codes -> scaled floats, a linear layer with quantized input.

    acc[m, n, g] = sum over k in group g of (x_code[m, k] - x_zero[m]) * w_code[n, k]      int32
    y[m, n]      = (sum over g of acc[m, n, g] * w_scale[n, g]) * x_scale[m]
                   + bias[n] + residual[m, n]                                              fp32

acc is exact. y is fp32 arithmetic in this order, every product and sum rounded, groups added in
ascending order, and is narrowed to out_dtype once. Weights are symmetric; x_zero is 0 for symmetric
activations.

With w_channel_scale the scales have two levels, w_scale is an integer and so is the sum over groups
(QServe's progressive groups, arXiv 2405.04532, section 4.1):

    acc[m, n]    = sum over g of w_scale[n, g] * acc[m, n, g]                              int32
    y[m, n]      = acc[m, n] * w_channel_scale[n] * x_scale[m] + bias[n] + residual[m, n]  fp32

    x_codes       [M, K]             int8 (symmetric) or uint8 (asymmetric) codes of x_bits, or
                  [M, K * sb / 8]    uint8 when x_packed, sb = storage bits of x_bits
    x_scale       [M, 1]             fp32
    x_zero_point  [M, 1]             uint8; None: symmetric
    w_codes       [N, K * sb / 8]    uint8, symmetric codes of w_bits (docs/formats.md), row_major;
                  [ceil(N / 64), ceil(K / 64), 64 * 64 * sb / 8] uint8, fragment or fragment_int4
    w_scale       [N, G]             fp32 or fp16, G = K / group_size; 1: per output channel;
                                     uint8, 1..15, with w_channel_scale
    bias          [N]                any float, or None
    y             [M, N]             out_dtype: fp32, fp16 or bf16
    bits          2..8 on both sides; w_bits 2..4 with w_channel_scale
    w_channel_scale  [N, 1]          fp32; None: w_scale is all there is
    w_layout      the layout of w_codes by its name; N is that of w_scale, as codes may be padded
    residual      [M, N]             out_dtype, or None

acc must not overflow: K / G * 2^(w_bits - 1) * X <= 2^31 - 1, where X = 2^(x_bits - 1) for
symmetric and 2^x_bits - 1 for asymmetric activations. At 8 x 8 bits that is K / G <= 131071 and
65793. With w_channel_scale: K * 15 * 2^(w_bits - 1) * X <= 2^31 - 1; at 4 x 8 bits K <= 139810 and
70179. w_scale * w_code then fits int8: kernels may apply w_scale to the weights or to the sums.
y overflows to inf as its dtype does.
"""

import torch
from torch import Tensor

from lowbit import cuda
from lowbit.errors import InputError
from lowbit.formats import (
    GROUP_SCALE_MAX,
    GROUP_SIZES,
    MAX_BITS,
    MIN_BITS,
    TWO_LEVEL_MAX_BITS,
    IntFormat,
    Layout,
    PackedTensor,
    codes_shape,
)
from lowbit.ops.dispatch import Backend, Op, why_not_triton
from lowbit.ops.pack import UNPACK, fragment_codes
from lowbit.ops.quantize import SCALE_DTYPES, check_float

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_ACC = 2**31 - 1
LONGEST_X16 = LARGEST_ACC // (128 * 255)  # kernels sum 16 * nibble like 8-bit codes: 65793
W_LAYOUTS = (Layout.ROW_MAJOR, Layout.FRAGMENT, Layout.FRAGMENT_INT4)
CUDA_GROUP_SIZES = (64, 128)  # of two-level scales
CUDA_INT4_SM = range(80, 90)  # the architectures with 4-bit matrix units
# of w_channel_scale, w_layout and residual: torch.library hands on no trailing default
DEFAULTS = (None, Layout.ROW_MAJOR.value, None)
ROW_CHUNK = 512  # rows at a time in the reference: their sums stay in the CPU's cache


def check_weight(
    op: str,
    K: int,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    levels: int,
    layout: Layout = Layout.ROW_MAJOR,
):
    """The checks of a weight [N, K] that every GEMM shares."""
    max_bits = TWO_LEVEL_MAX_BITS if levels == 2 else MAX_BITS
    if not MIN_BITS <= bits <= max_bits:
        raise ValueError(f"{op}: w_bits must be in {MIN_BITS}..{max_bits}, got {bits}")
    row_bits = K * IntFormat(bits).storage_bits
    if layout is not Layout.ROW_MAJOR:
        _check_fragment(op, K, w_codes, w_scale, bits, layout)
    elif w_codes.dtype != torch.uint8 or w_codes.dim() != 2 or w_codes.shape[1] * 8 != row_bits:
        raise ValueError(
            f"{op}: w_codes must be uint8 [N, {row_bits / 8:g}] for K = {K} and {bits} bits, "
            f"got {w_codes.dtype} {tuple(w_codes.shape)}"
        )
    N = w_codes.shape[0] if layout is Layout.ROW_MAJOR else w_scale.shape[0]
    if w_scale.dtype not in ((torch.uint8,) if levels == 2 else SCALE_DTYPES):
        expected = "uint8, as w_channel_scale is given" if levels == 2 else "fp32 or fp16"
        raise ValueError(f"{op}: w_scale must be {expected}, got {w_scale.dtype}")
    if w_scale.dim() != 2 or w_scale.shape[0] != N or not w_scale.shape[1] or K % w_scale.shape[1]:
        raise ValueError(
            f"{op}: w_scale must have shape [{N}, G] with G dividing {K}, "
            f"got {tuple(w_scale.shape)}"
        )
    if bias is not None:
        check_float(op, "bias", bias)
        if bias.shape != (N,):
            raise ValueError(f"{op}: bias must have shape [{N}], got {tuple(bias.shape)}")


def _check_fragment(op: str, K: int, w_codes: Tensor, w_scale: Tensor, bits: int, layout: Layout):
    if w_scale.dim() != 2:
        raise ValueError(f"{op}: w_scale must have shape [N, G], got {tuple(w_scale.shape)}")
    N = w_scale.shape[0]
    try:
        expected = codes_shape(IntFormat(bits), layout, (N, K))
    except InputError as error:
        raise ValueError(f"{op}: {error}") from None
    if w_codes.dtype != torch.uint8 or w_codes.shape != expected:
        raise ValueError(
            f"{op}: w_codes must be uint8 {expected} for [N, K] = [{N}, {K}], {bits} bits and "
            f"layout {layout.value!r}, got {w_codes.dtype} {tuple(w_codes.shape)}"
        )


def _check(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_bits: int,
    x_packed: bool,
    w_bits: int,
    out_dtype: torch.dtype,
    w_channel_scale: Tensor | None = None,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
):
    if not MIN_BITS <= x_bits <= MAX_BITS:
        raise ValueError(f"int_gemm: x_bits must be in {MIN_BITS}..{MAX_BITS}, got {x_bits}")
    grid = IntFormat(x_bits, symmetric=x_zero_point is None)
    code_dtype = torch.uint8 if x_packed else grid.code_dtype
    if x_codes.dtype != code_dtype or x_codes.dim() != 2:
        raise ValueError(
            f"int_gemm: x_codes must be {code_dtype} [M, K] (packed={x_packed}, "
            f"symmetric={grid.symmetric}), got {x_codes.dtype} {tuple(x_codes.shape)}"
        )
    M, row = x_codes.shape
    if x_scale.dtype != torch.float32 or x_scale.shape != (M, 1):
        raise ValueError(
            f"int_gemm: x_scale must be fp32 [{M}, 1], got {x_scale.dtype} {tuple(x_scale.shape)}"
        )
    if x_zero_point is not None and (
        x_zero_point.dtype != torch.uint8 or x_zero_point.shape != (M, 1)
    ):
        raise ValueError(
            f"int_gemm: x_zero_point must be uint8 [{M}, 1], "
            f"got {x_zero_point.dtype} {tuple(x_zero_point.shape)}"
        )
    K = row * 8 // grid.storage_bits if x_packed else row
    two_level = w_channel_scale is not None
    if w_layout not in W_LAYOUTS:
        raise ValueError(
            f"int_gemm: w_layout must be one of {[layout.value for layout in W_LAYOUTS]}, "
            f"got {w_layout!r}"
        )
    levels = 2 if two_level else 1
    check_weight("int_gemm", K, w_codes, w_scale, bias, w_bits, levels, Layout(w_layout))
    N = w_scale.shape[0]
    largest = max(-grid.qmin, grid.qmax) * -IntFormat(w_bits).qmin  # |(code - zero_point) * code|
    length = K // w_scale.shape[1]
    if two_level:
        if w_channel_scale.dtype != torch.float32 or w_channel_scale.shape != (N, 1):
            raise ValueError(
                f"int_gemm: w_channel_scale must be fp32 [{N}, 1], "
                f"got {w_channel_scale.dtype} {tuple(w_channel_scale.shape)}"
            )
        largest, length = GROUP_SCALE_MAX * largest, K
    if length * largest > LARGEST_ACC:
        raise ValueError(
            f"int_gemm: int32 sums of {x_bits} x {w_bits} bits overflow past "
            f"{LARGEST_ACC // largest} elements a {'row' if two_level else 'group'}, got {length}"
        )
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"int_gemm: out_dtype must be fp32, fp16 or bf16, got {out_dtype}")
    if residual is not None and (residual.dtype != out_dtype or residual.shape != (M, N)):
        raise ValueError(
            f"int_gemm: residual must be {out_dtype} [{M}, {N}], as y is, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )


def _has_int8_dot() -> bool:
    """torch._int_mm is exact on CPUs with VNNI; older ones may saturate pairs of products."""
    return torch.cpu._is_vnni_supported()


def _int_matmul(x: Tensor, w: Tensor) -> Tensor:
    """int32 [M, N] = x @ w.T of int8 [M, K] and [N, K], exactly."""
    if x.device.type == "cpu" and _has_int8_dot():
        return torch._int_mm(x, w.T)
    # Integers below 2^24 are exact in fp32 (2^53 in fp64) in any order of additions, so that many
    # products of at most 2^14 are summed at a time. GPUs may round fp32 operands to TF32: fp64.
    dtype, step = (torch.float32, 1 << 10) if x.device.type == "cpu" else (torch.float64, 1 << 39)
    acc = x.new_zeros((x.shape[0], w.shape[0]), dtype=torch.int32)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        acc += (x[:, part].to(dtype) @ w[:, part].to(dtype).T).to(torch.int32)
    return acc


def _reference(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_bits: int,
    x_packed: bool,
    w_bits: int,
    out_dtype: torch.dtype,
    w_channel_scale: Tensor | None = None,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
) -> Tensor:
    x, shift = x_codes, None
    if x_packed:
        x = UNPACK.reference(x, IntFormat(x_bits).storage_bits, x_zero_point is None)
    if x_zero_point is not None:  # code - 128 fits int8; the rest of the zero point meets sum(w)
        x = x.bitwise_xor(128).view(torch.int8)
        shift = 128 - x_zero_point.to(torch.int32)  # [M, 1]
    w_storage, layout = IntFormat(w_bits).storage_bits, Layout(w_layout)
    if layout is Layout.ROW_MAJOR:
        w = UNPACK.reference(w_codes, w_storage, True)
    else:
        w = fragment_codes(w_codes, layout, w_storage, (w_scale.shape[0], x.shape[1]))
    if w_channel_scale is not None:
        groups = w.unflatten(1, (w_scale.shape[1], -1))
        w = (groups * w_scale.to(torch.int8).unsqueeze(-1)).flatten(1)  # at most 8 * 15: fits int8
        w_scale = w_channel_scale
    y = x.new_empty((x.shape[0], w.shape[0]), dtype=out_dtype)
    for start in range(0, x.shape[0], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        scaled = _weighted_sums(x[rows], None if shift is None else shift[rows], w, w_scale)
        scaled.mul_(x_scale[rows])
        if bias is not None:
            scaled.add_(bias.float())
        y[rows] = scaled if residual is None else scaled.add_(residual[rows].float())
    return y


def _weighted_sums(x: Tensor, shift: Tensor | None, w: Tensor, w_scale: Tensor) -> Tensor:
    """fp32 [M, N]: over the groups, w_scale times the int32 sum of (x + shift) * w."""
    group_size = w.shape[1] // w_scale.shape[1]
    y = None
    for g, scale in enumerate(w_scale.float().unbind(1)):
        group = slice(g * group_size, (g + 1) * group_size)
        acc = _int_matmul(x[:, group], w[:, group])
        if shift is not None:
            acc += shift * w[:, group].sum(1, dtype=torch.int32)
        scaled = acc.float().mul_(scale)
        y = scaled if y is None else y.add_(scaled)
    return y


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_bits: int,
    x_packed: bool,
    w_bits: int,
    out_dtype: torch.dtype,
    w_channel_scale: Tensor | None = None,
    w_layout: str = "row_major",
    residual: Tensor | None = None,
) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], w_scale.shape[0]), dtype=out_dtype)


def _why_not_triton(*args) -> str | None:
    if not args:
        return why_not_triton()
    x_codes, w_scale, x_bits, x_packed, w_bits = args[0], args[4], *args[6:9]
    w_channel_scale, w_layout, residual = (*args, *DEFAULTS[len(args) - 10 :])[10:]
    if w_layout != Layout.ROW_MAJOR:
        return f"the Triton kernel reads row_major weights, w is {w_layout}: see to_layout"
    two_level = w_channel_scale is not None
    for name, bits in {"x": x_bits if x_packed else 8, "w": w_bits}.items():
        if IntFormat(bits).storage_bits not in (4, 8):
            return f"the Triton kernel reads codes packed in 4 or 8 bits, {name}_bits is {bits}"
    K = x_codes.shape[1] * 8 // (IntFormat(x_bits).storage_bits if x_packed else 8)
    G = w_scale.shape[1]
    if (G > 1 or two_level) and K // G not in GROUP_SIZES:
        return f"the Triton kernel takes groups of {GROUP_SIZES} or one a row, got {K // G}"
    if K // G > LONGEST_X16:
        return f"the Triton kernel sums up to {LONGEST_X16} elements, got {K // G}"
    return why_not_triton(*args[:6], w_channel_scale, residual)


def _why_not_cuda(*args) -> str | None:
    if not args:
        return cuda.why_not_cuda()
    args = (*args, *DEFAULTS[len(args) - 10 :])
    tensors = [t for t in args if isinstance(t, Tensor)]
    return (
        _why_not_codes_in_cuda(args)
        or _why_not_scales_in_cuda(args)
        or _why_not_memory_in_cuda(args)
        or cuda.why_not_cuda(*tensors)
        or _why_not_int4_in_cuda(args)
    )


def _why_not_codes_in_cuda(args: tuple) -> str | None:
    x_codes, w_scale, x_bits, x_packed, w_bits = args[0], args[4], *args[6:9]
    w_channel_scale, w_layout = args[10:12]
    if w_layout == Layout.ROW_MAJOR:
        return "the CUDA kernel reads weights in a kernel layout, w is row_major: see to_layout"
    stored = IntFormat(x_bits).storage_bits if x_packed else 8
    expected = 4 if w_layout == Layout.FRAGMENT_INT4 else 8
    if stored != expected:
        return (
            f"with w of layout {w_layout} the CUDA kernel reads x of {expected} bits a code, "
            f"these are {stored}"
        )
    row, N = x_codes.shape[1], w_scale.shape[0]
    if row == 0 or row % 16 or N % 8:
        return f"rows must be multiples of 16 bytes of x and 8 columns of y, got {row} and {N}"
    x16 = w_layout == Layout.FRAGMENT and w_channel_scale is None and w_bits == 4
    if x16 and row > LONGEST_X16:
        return f"the CUDA kernel sums up to {LONGEST_X16} products of 4-bit weights, got {row}"
    return None


def _why_not_scales_in_cuda(args: tuple) -> str | None:
    x_codes, w_scale, bias, w_channel_scale, w_layout = args[0], *args[4:6], *args[10:12]
    G = w_scale.shape[1]
    if w_channel_scale is not None and w_layout != Layout.FRAGMENT:
        return f"the CUDA kernel takes two-level scales with layout fragment, w has {w_layout}"
    if w_channel_scale is not None and x_codes.shape[1] // G not in GROUP_SIZES:
        return f"the CUDA kernel takes groups of {GROUP_SIZES}, got {x_codes.shape[1] // G}"
    if w_channel_scale is None and (G != 1 or w_scale.dtype != torch.float32):
        return f"the CUDA kernel takes one fp32 scale a channel, got {G} of {w_scale.dtype}"
    if bias is not None and bias.dtype not in OUT_DTYPES:
        return f"the CUDA kernel takes a bias of fp32, fp16 or bf16, got {bias.dtype}"
    return None


def _why_not_memory_in_cuda(args: tuple) -> str | None:
    x_codes, x_scale, x_zero_point, w_codes, w_scale, bias = args[:6]
    w_channel_scale, residual = args[10], args[12]
    channel_scale = w_scale if w_channel_scale is None else w_channel_scale
    vectors = (x_codes, w_codes, channel_scale, bias, residual)
    if any(t is not None and t.data_ptr() % 16 for t in vectors):
        return "the CUDA kernel's matrices must start at multiples of 16 bytes"
    tensors = (*vectors, x_scale, x_zero_point, w_scale)
    if any(t is not None and not t.is_contiguous() for t in tensors):
        return "the CUDA kernel's tensors must be contiguous"
    return None


def _why_not_int4_in_cuda(args: tuple) -> str | None:
    sm = cuda.sm(args[0].device)
    if args[11] == Layout.FRAGMENT_INT4 and sm not in CUDA_INT4_SM:
        return f"sm_{sm} has no 4-bit matrix units, which layout fragment_int4 is for"
    return None


_BACKENDS = {
    "cuda": Backend(_why_not_cuda, "lowbit.cuda:int_gemm"),
    "triton": Backend(_why_not_triton, "lowbit.kernels.int_gemm:int_gemm"),
}
INT_GEMM = Op("int_gemm", _check, _reference, _fake, _BACKENDS)


def check_operands(op: str, x, w: PackedTensor, layouts: tuple[Layout, ...] = (Layout.ROW_MAJOR,)):
    """What a GEMM's tensors alone do not tell: the weight's layout and rank, and equal K."""
    if w.layout not in layouts:
        raise ValueError(
            f"{op}: w must have layout {' or '.join(repr(layout.value) for layout in layouts)}, "
            f"got {w.layout.value!r}: see to_layout"
        )
    if len(w.shape) != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"{op}: w must have shape [N, {x.shape[-1]}] for x of shape {tuple(x.shape)}, "
            f"got {tuple(w.shape)}"
        )


def call_arguments(
    x: PackedTensor,
    w: PackedTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None,
) -> tuple:
    """Those of the op."""
    return (
        x.codes.reshape(-1, x.codes.shape[-1]),
        x.scale.reshape(-1, 1),
        None if x.zero_point is None else x.zero_point.reshape(-1, 1),
        w.codes,
        w.scale,
        bias,
        x.format.bits,
        x.layout is Layout.ROW_MAJOR,
        w.format.bits,
        out_dtype,
        w.channel_scale,
        w.layout.value,
        None if residual is None else residual.reshape(-1, w.shape[0]),
    )


def int_gemm(
    x: PackedTensor,
    w: PackedTensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    backend: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] (one scale per row, packed or not) times w [N, K], plus residual: [..., N].

    The contract is this module's docstring.
    """
    check_operands("int_gemm", x, w, W_LAYOUTS)
    if x.layout not in (Layout.ROW_MAJOR, Layout.BYTES):
        raise ValueError(
            f"int_gemm: x must have layout 'row_major' or 'bytes', got {x.layout.value!r}"
        )
    if x.format.group_size is not None:
        raise ValueError(
            f"int_gemm: x must have one scale per row, got group_size {x.format.group_size}"
        )
    if not w.format.symmetric:
        raise ValueError("int_gemm: w must be symmetric, got an asymmetric format")
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None and residual.shape != shape:
        raise ValueError(f"int_gemm: residual must have shape {shape}, got {tuple(residual.shape)}")
    y = INT_GEMM(*call_arguments(x, w, bias, out_dtype, residual), backend=backend)
    return y.view(shape)
