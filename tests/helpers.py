"""The three comparisons every test uses, a slow quantizer to compare with, and what all ops pass.

assert_bitwise               every byte equal: exact inputs, packing, round trips
assert_codes                 quantizers on random inputs
assert_no_worse_than_torch   matrix products and attention on random inputs
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lowbit.formats import MIN_SCALE, Layout, PackedTensor
from lowbit.ops import to_layout
from lowbit.ops.dispatch import Op, interpreted

MAX_CODE_SHARE = 1e-4  # of codes may differ between backends, each by one step


def assert_bitwise(got, expected):
    """Same dtype, shape and bytes; tensors, PackedTensors, None, or tuples of them."""
    if isinstance(expected, PackedTensor):
        assert (got.format, got.layout, got.shape) == (
            expected.format,
            expected.layout,
            expected.shape,
        )
        assert_bitwise(got.channel_scale, expected.channel_scale)
        return assert_bitwise(_tensors(got), _tensors(expected))
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected), f"{len(got)} outputs, expected {len(expected)}"
        for a, b in zip(got, expected, strict=True):
            assert_bitwise(a, b)
    elif expected is None or got is None:
        assert got is expected
    else:
        _assert_same_kind(got, expected)
        size = expected.element_size()
        a, b = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (got, expected))
        differs = (a != b).view(-1, size).any(-1).view(expected.shape)
        assert not differs.any(), _report("bits differ", differs, got, expected)


def assert_codes(got, expected):
    """PackedTensors, or (codes one per byte, scale[, zero_point]): a quantizer's random inputs.

    scale within 1 ulp, NaN in the same places; zero_point within 1; code - zero_point within 1,
    and equal on all but MAX_CODE_SHARE of the elements.
    """
    got, expected = _tensors(got, Layout.BYTES), _tensors(expected, Layout.BYTES)
    codes, scale, zero = zip(got, expected, strict=True)
    _assert_same_kind(*scale)
    bits = [_ordered_bits(s) for s in scale]
    differs = ((bits[0] - bits[1]).abs() > 1) & ~(scale[0].isnan() & scale[1].isnan()).cpu()
    assert not differs.any(), _report("scale is more than 1 ulp off", differs, *scale)

    _assert_same_kind(*codes)
    steps = [c.cpu().to(torch.int32) for c in codes]
    if zero[1] is not None and zero[1].numel():
        _assert_same_kind(*zero)
        zeros = [z.cpu().to(torch.int32) for z in zero]
        differs = (zeros[0] - zeros[1]).abs() > 1
        assert not differs.any(), _report("zero_point is more than 1 off", differs, *zero)
        steps = [
            (s.unflatten(-1, (z.shape[-1], -1)) - z.unsqueeze(-1)).flatten(-2)
            for s, z in zip(steps, zeros, strict=True)
        ]
    distance = (steps[0] - steps[1]).abs()
    assert distance.max() <= 1, _report("code is more than 1 off", distance > 1, *codes)
    share = (distance > 0).double().mean().item()
    assert share <= MAX_CODE_SHARE, _report("too many codes differ", distance > 0, *codes)


def assert_no_worse_than_torch(got: Tensor, in_torch: Tensor, in_fp64: Tensor, floor: float):
    """max |got - in_fp64| <= 2 max |in_torch - in_fp64| + floor; non-finite where torch's is.

    in_torch is what torch gives in got's dtype. `floor` is absolute, stated by the test.
    """
    _assert_same_kind(got, in_torch)
    assert in_fp64.dtype == torch.float64 and in_fp64.shape == got.shape
    got, in_torch, in_fp64 = got.cpu().double(), in_torch.cpu().double(), in_fp64.cpu()
    finite = in_torch.isfinite()
    same = torch.where(finite, got.isfinite(), (got == in_torch) | (got.isnan() & in_torch.isnan()))
    assert same.all(), _report("non-finite elsewhere than in torch", ~same, got, in_torch)
    error, limit = [torch.where(finite, (t - in_fp64).abs(), 0.0) for t in (got, in_torch)]
    limit = 2 * limit.max() + floor
    assert error.max() <= limit, _report(
        f"error {error.max():.3g} against fp64 exceeds {limit:.3g}", error > limit, got, in_fp64
    )


def assert_same_logits(got: Tensor, expected: Tensor):
    """Of a small random model by Triton's kernels and by the reference.

    Interpreted they add in one order. Compiled, a unit in the last place of attention's outputs
    changes codes further on, and these logits by some per cent: there each op's own tests count.
    """
    share = 1e-5 if interpreted() else 0.1
    assert (got - expected).norm() < share * expected.norm()


def slow_quantize(row, bits: int, symmetric: bool, clip: float, scale_dtype=np.float32):
    """(codes, scale, zero_point) of one group of fp32 numbers, one number at a time.

    The contract of lowbit/ops/quantize.py for fp32 arithmetic, written again from its docstring.
    """
    f32 = np.float32
    qmax = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    qmin = -qmax - 1 if symmetric else 0
    row = [f32(v) for v in row]
    if not all(np.isfinite(v) for v in row):
        return [0] * len(row), scale_dtype(np.nan), 0
    with np.errstate(over="ignore"):
        lo = min(min(row), f32(0)) * f32(clip)
        hi = max(max(row), f32(0)) * f32(clip)
        span = max(abs(v) for v in row) * f32(clip) if symmetric else hi - lo
    scale = span / f32(qmax)
    scale = scale_dtype(min(max(scale, f32(MIN_SCALE)), f32(np.finfo(scale_dtype).max)))
    step = f32(scale)  # rounded to the stored dtype before it is used
    zero = 0 if symmetric else min(max(round(float(-lo / step)), 0), qmax)
    codes = [min(max(round(float(v / step)) + zero, qmin), qmax) for v in row]
    return codes, scale, zero


def assert_registered(op: Op, *args):
    """torch.library.opcheck; and compiled, run twice and run on poisoned memory: the same bits."""
    overload = getattr(torch.ops.lowbit, op.name).default
    torch.library.opcheck(overload, args)
    expected = overload(*args)
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: overload(*a), fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*args), expected)
    assert_bitwise(overload(*args), expected)
    with poison():
        assert_bitwise(overload(*args), expected)


@contextmanager
def poison():
    """Memory that torch.empty hands out holds NaN, or the largest integer, until it is written."""
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _tensors(t, layout: Layout | None = None) -> tuple:
    """(codes, scale, zero_point or None) of a PackedTensor or of such a tuple."""
    if isinstance(t, PackedTensor):
        t = t if layout is None else to_layout(t, layout, backend="reference")
        return t.codes, t.scale, t.zero_point
    return (*t, None)[:3]


def _ordered_bits(t: Tensor) -> Tensor:
    """int64 that counts the floating-point numbers in order, so that 1 ulp is a difference of 1."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    bits = t.cpu().contiguous().view(integer).to(torch.int64)
    magnitude = bits & torch.iinfo(integer).max
    return torch.where(bits < 0, -magnitude, magnitude)


def _assert_same_kind(got: Tensor, expected: Tensor):
    kinds = [(t.dtype, tuple(t.shape)) for t in (got, expected)]
    assert kinds[0] == kinds[1], f"got {kinds[0]}, expected {kinds[1]}"


def _report(what: str, differs: Tensor, got: Tensor, expected: Tensor) -> str:
    """The first differing coordinate, both values and the share of elements that differ."""
    first = tuple(differs.nonzero()[0].tolist())
    count, total = int(differs.sum()), differs.numel()
    return (
        f"{what}: first at {first}, got {got[first].item()!r}, expected {expected[first].item()!r};"
        f" {count} of {total} elements ({count / total:.3g})"
    )
