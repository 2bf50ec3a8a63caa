"""Rounding: RTN is the quantize op; GPTQ never loses to RTN in its own norm."""

import numpy as np
import pytest
import torch
from helpers import assert_bitwise

from lowbit.errors import InputError
from lowbit.formats import IntFormat, Layout
from lowbit.ops import dequantize, quantize
from lowbit.rounding import (
    GPTAQ,
    GPTQ,
    HQQ,
    RTN,
    Qronos,
    Statistics,
    asymmetric_error,
    quadratic_error,
    statistics_of,
)
from lowbit.rounding.grid import CLIPS, on_grid, weight_grid

FORMATS = [
    IntFormat(4),
    IntFormat(8),
    IntFormat(3, True, 32),
    IntFormat(4, False, 64),
    IntFormat(2, False, 32),
    IntFormat(6),
]


def correlated_inputs(n: int, K: int, seed: int = 0) -> torch.Tensor:
    """Activations [n, K] with correlated channels, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * 0.2 + torch.eye(K)
    x = torch.randn(n, K, generator=generator) @ mix
    x[:, ::37] *= 10
    return x


def drifting(n: int, K: int) -> Statistics:
    """Of inputs and, as full-precision ones, the same with some of other channels mixed in."""
    x = correlated_inputs(n, K)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(4)) / K**0.5
    return statistics_of([x], [x + 0.2 * x @ mix])


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.T @ x / x.shape[0]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(2)) * 0.05


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rtn_is_the_quantize_op(weight, format):
    packed, _ = RTN().round(weight, format)
    expected = quantize(
        weight, format, layout=Layout.ROW_MAJOR, scale_dtype=format.weight_scale_dtype
    )
    assert torch.equal(packed.codes, expected.codes)
    assert torch.equal(packed.scale, expected.scale)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_gptq_error_is_at_most_rtn_error(weight, format, clip):
    statistics = statistics_of([correlated_inputs(512, 128)])
    errors = {}
    for rounder in (RTN(clip), GPTQ(clip=clip)):
        packed, _ = rounder.round(weight, format, statistics)
        error = weight - dequantize(packed)
        errors[type(rounder)] = quadratic_error(error, statistics.hessian)
    assert errors[GPTQ] <= errors[RTN]


@pytest.mark.parametrize("format", [IntFormat(4), IntFormat(4, False, 32)], ids=str)
@pytest.mark.parametrize(
    "rounder",
    [
        GPTQ(clip="none"),
        GPTQ(act_order=False, clip="none"),
        GPTQ(act_order=False, static_groups=False, clip="weight"),
        GPTAQ(clip="none", alpha=0.5),
        Qronos(clip="none"),
    ],
    ids=str,
)
def test_a_column_by_column_solution(rounder, format):
    """Against the textbook update (optimal brain surgeon, one inverse per column) in fp64."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    statistics = drifting(256, 64)
    packed, report = rounder.round(weight, format, statistics)

    hessian, drift = (t.double().numpy().copy() for t in statistics)
    order = np.arange(64)
    if rounder.act_order:
        order = np.argsort(-statistics.hessian.diagonal().numpy(), kind="stable")
    qronos = isinstance(rounder, Qronos)
    whole = np.linalg.eigvalsh(hessian).max() if qronos else hessian.diagonal().mean()
    hessian[np.diag_indices(64)] += report["damp"] * whole
    scale, zero, _ = weight_grid(weight, format, rounder.clip)
    group = format.group_size or 64
    original = weight.double().numpy()
    left, solution = original.copy(), np.zeros((8, 64))
    if qronos:  # least squares for the drifted targets
        left += original @ drift @ np.linalg.inv(hessian)
    for position, j in enumerate(order):
        rest = order[position:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        if not rounder.static_groups and j % group == 0:
            part = torch.from_numpy(left[:, j : j + group].copy()).float()
            fresh = weight_grid(part, IntFormat(format.bits, format.symmetric), rounder.clip)
            scale[:, j // group : j // group + 1] = fresh.scale
            if zero is not None:
                zero[:, j // group : j // group + 1] = fresh.zero_point
        s = scale[:, j // group].double().numpy()
        z = 0 if zero is None else zero[:, j // group].double().numpy()
        wanted = left[:, j]
        if qronos and position == 0:  # the others as they were
            wanted = original[:, j] + original @ drift[:, j] / hessian[j, j]
        code = np.clip(np.round(wanted / s) + z, format.qmin, format.qmax)
        solution[:, j] = (code - z) * s
        error = (left[:, j] - solution[:, j]) / inverse[0, 0]
        left[:, rest] -= np.outer(error, inverse[0])
        if isinstance(rounder, GPTAQ) and len(rest) > 1:
            later = np.linalg.inv(hessian[np.ix_(rest[1:], rest[1:])])
            moved = rounder.alpha * drift[j, rest[1:]] @ later
            left[:, rest[1:]] += np.outer(original[:, j], moved)
    assert np.abs(dequantize(packed).double().numpy() - solution).max() < 1e-5


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_siblings_come_nearer_to_the_full_precision_outputs(weight, format):
    statistics = drifting(512, 128)
    errors = {}
    for rounder in (GPTQ(), GPTAQ(), GPTAQ(alpha=1.0), Qronos()):
        packed, _ = rounder.round(weight, format, statistics)
        errors[rounder] = asymmetric_error(weight, dequantize(packed), statistics)
    gptq, a_quarter, all_of_it, qronos = errors.values()
    assert qronos < a_quarter < gptq and all_of_it < gptq


@pytest.mark.parametrize("rounder", [GPTAQ(), Qronos()], ids=str)
def test_without_drift_siblings_are_gptq(weight, rounder):
    hessian = drifting(512, 128).hessian
    statistics = Statistics(hessian, torch.zeros_like(hessian))
    got, _ = rounder.round(weight, IntFormat(4), statistics)
    damp = rounder.damp
    if isinstance(rounder, Qronos):
        damp *= (torch.linalg.matrix_norm(hessian, 2) / hessian.diagonal().mean()).item()
    assert_bitwise(got, GPTQ(damp=damp).round(weight, IntFormat(4), statistics)[0])


def test_statistics_do_not_depend_on_batches():
    x, x_full = correlated_inputs(96, 16), correlated_inputs(96, 16, seed=1)
    whole = statistics_of([x], [x_full])
    parts = statistics_of(x.split(40), x_full.split(40))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole.hessian, hessian_of(x))
    torch.testing.assert_close(whole.drift, 2 / 96 * (x_full - x).T @ x)
    assert statistics_of([x]).drift is None


def test_asymmetric_error_is_the_distance_of_outputs():
    """Up to a constant: so differences of it are differences of |Q x - W x_full|^2."""
    x, x_full = correlated_inputs(96, 16).double(), correlated_inputs(96, 16, seed=1).double()
    statistics = statistics_of([x.float()], [x_full.float()])
    weight, first, second = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(3))
    got = [asymmetric_error(weight, q, statistics) for q in (first, second)]
    target = x_full @ weight.double().T
    expected = [2 / 96 * (x @ q.double().T - target).square().sum().item() for q in (first, second)]
    assert got[0] - got[1] == pytest.approx(expected[0] - expected[1], rel=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GPTQ(static_groups=False), "act_order needs static_groups"),
        (lambda: GPTQ(damp=0.0), r"damp must be in \(0, 1.0\], got 0.0"),
        (lambda: RTN(clip="best"), "clip must be one of .*got 'best'"),
        (lambda: GPTQ(clip="best"), "clip must be one of .*got 'best'"),
    ],
)
def test_options_that_do_not_exist(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_gptq_is_rtn_when_inputs_are_uncorrelated(weight):
    packed, _ = GPTQ(clip="none").round(weight, IntFormat(4), Statistics(torch.eye(128)))
    expected, _ = RTN().round(weight, IntFormat(4))
    assert torch.equal(packed.codes, expected.codes)


def test_dead_inputs_are_zeroed(weight):
    x = correlated_inputs(512, 128)
    x[:, 7] = 0
    packed, _ = GPTQ().round(weight, IntFormat(4), statistics_of([x]))
    assert (dequantize(packed)[:, 7] == 0).all()


def test_indefinite_hessian_raises_the_damp_then_falls_back_to_rtn(weight):
    slightly = torch.eye(128)
    slightly[0, 1] = slightly[1, 0] = 1.05  # eigenvalue -0.05: needs damp 0.1
    _, report = GPTQ().round(weight, IntFormat(4), Statistics(slightly))
    assert report["damp"] == pytest.approx(0.1)
    hopeless = torch.eye(128)
    hopeless[0, 1] = hopeless[1, 0] = 9.0
    packed, report = GPTQ(clip="none").round(weight, IntFormat(4), Statistics(hopeless))
    assert report["damp"] is None
    assert torch.equal(packed.codes, RTN().round(weight, IntFormat(4))[0].codes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_clip_search_takes_the_least_error(weight, format):
    """Against a scalar search over the same 80 candidates, one group at a time."""
    weight = weight[:3]
    scale, zero, _ = weight_grid(weight, format, clip="weight")
    got = (on_grid(weight, scale, zero, format) - weight).abs().double().pow(2.4)
    groups = weight.unflatten(-1, (scale.shape[-1], -1))
    errors = []
    for i in range(80):
        t = quantize(groups, IntFormat(format.bits, format.symmetric), clip=1 - i / 100,
                     scale_dtype=scale.dtype)  # fmt: skip
        errors.append((dequantize(t) - groups).abs().double().pow(2.4).sum(-1))
    least = torch.stack(errors).amin(0)
    got = got.unflatten(-1, (scale.shape[-1], -1)).sum(-1)
    torch.testing.assert_close(got, least, rtol=1e-5, atol=0)  # ties within fp32 rounding


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_range_has_its_zero_in_the_middle(weight, bits, group_size):
    """maxq = 2^b - 1, scale = 2 max|w| / maxq, zero = (maxq + 1) / 2 in GPTQ's code."""
    found = weight_grid(weight, IntFormat(bits, False, group_size), "symmetric")
    largest = weight.unflatten(-1, (found.scale.shape[-1], -1)).abs().amax(-1)
    assert_bitwise(found.scale, (2 * largest / (2**bits - 1)).to(found.scale.dtype))
    assert (found.zero_point == 2 ** (bits - 1)).all()
    symmetric = IntFormat(bits, True, group_size)
    assert_bitwise(weight_grid(weight, symmetric, "symmetric"), weight_grid(weight, symmetric))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("clip", ["output", "output-symmetric"])
def test_output_clip_loses_least_at_the_output_of_each_group(weight, format, clip):
    x = correlated_inputs(256, 128)
    best, whole = (
        on_grid(weight, grid.step, grid.zero_point, format)
        for grid in (
            weight_grid(weight, format, clip, hessian_of(x)),
            weight_grid(weight, format),
        )
    )
    size = format.group_size or 128
    best, whole = (
        torch.einsum("ngk,tgk->gnt", *(t.unflatten(1, (-1, size)) for t in (q - weight, x)))
        for q in (best, whole)
    )
    best, whole = (y.double().square().sum(-1) for y in (best, whole))  # [G, N]
    assert (best <= whole * (1 + 1e-5)).all() and best.sum() < 0.99 * whole.sum()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_hqq_lowers_the_robust_error_of_every_group(format):
    """Heavy tails: what the p-norm is robust to."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(6)) ** 3 * 0.05
    errors = []
    for rounder in (HQQ(), RTN()):
        packed, _ = rounder.round(weight, format)
        error = (dequantize(packed) - weight).abs().double() ** 0.7
        errors.append(error.unflatten(1, (format.num_groups(128), -1)).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    # symmetric grids have no zero point to move, only a scale
    assert errors[0].sum() < (1 if format.symmetric else 0.99) * errors[1].sum()


def test_hqq_edge_rows():
    weight = torch.zeros(4, 64)
    weight[1] = 3.0
    weight[2, 5] = 1e30
    for format in (IntFormat(4, False, 32), IntFormat(4)):
        packed, _ = HQQ().round(weight, format)
        got = dequantize(packed)
        assert got.isfinite().all() and (got[0] == 0).all()
    with pytest.raises(InputError, match=r"p must be in \(0, 1\), got 1"):
        HQQ(p=1)
