"""Rounding: RTN is the quantize op; GPTQ never loses to RTN in its own norm."""

import numpy as np
import pytest
import torch

from lowbit.formats import IntFormat, Layout
from lowbit.ops import dequantize, quantize
from lowbit.rounding import GPTQ, RTN, quadratic_error
from lowbit.rounding.grid import on_grid, weight_grid

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
@pytest.mark.parametrize("clip_search", [False, True])
def test_gptq_error_is_at_most_rtn_error(weight, format, clip_search):
    hessian = hessian_of(correlated_inputs(512, 128))
    errors = {}
    for rounder in (RTN(clip_search), GPTQ(clip_search=clip_search)):
        packed, _ = rounder.round(weight, format, hessian)
        errors[type(rounder)] = quadratic_error(weight - dequantize(packed), hessian)
    assert errors[GPTQ] <= errors[RTN]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", [IntFormat(4), IntFormat(4, False, 32)], ids=str)
def test_gptq_matches_a_column_by_column_solution(act_order, format):
    """Against the textbook update (optimal brain surgeon, one inverse per column) in fp64."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    hessian = hessian_of(correlated_inputs(256, 64))
    packed, report = GPTQ(act_order, clip_search=False).round(weight, format, hessian)

    damped = hessian.double().numpy().copy()
    damped[np.diag_indices(64)] += report["damp"] * damped.diagonal().mean()
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if act_order else np.arange(64)
    scale, zero, _ = weight_grid(weight, format)
    group = format.group_size or 64
    left, solution = weight.double().numpy().copy(), np.zeros((8, 64))
    for position, j in enumerate(order):
        rest = order[position:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        s = scale[:, j // group].double().numpy()
        z = 0 if zero is None else zero[:, j // group].double().numpy()
        code = np.clip(np.round(left[:, j] / s) + z, format.qmin, format.qmax)
        solution[:, j] = (code - z) * s
        error = (left[:, j] - solution[:, j]) / inverse[0, 0]
        left[:, rest] -= np.outer(error, inverse[0])
    assert np.abs(dequantize(packed).double().numpy() - solution).max() < 1e-5


def test_gptq_is_rtn_when_inputs_are_uncorrelated(weight):
    packed, _ = GPTQ(clip_search=False).round(weight, IntFormat(4), torch.eye(128))
    expected, _ = RTN().round(weight, IntFormat(4))
    assert torch.equal(packed.codes, expected.codes)


def test_dead_inputs_are_zeroed(weight):
    x = correlated_inputs(512, 128)
    x[:, 7] = 0
    packed, _ = GPTQ().round(weight, IntFormat(4), hessian_of(x))
    assert (dequantize(packed)[:, 7] == 0).all()


def test_indefinite_hessian_raises_the_damp_then_falls_back_to_rtn(weight):
    slightly = torch.eye(128)
    slightly[0, 1] = slightly[1, 0] = 1.05  # eigenvalue -0.05: needs damp 0.1
    _, report = GPTQ().round(weight, IntFormat(4), slightly)
    assert report["damp"] == pytest.approx(0.1)
    hopeless = torch.eye(128)
    hopeless[0, 1] = hopeless[1, 0] = 9.0
    packed, report = GPTQ(clip_search=False).round(weight, IntFormat(4), hopeless)
    assert report["damp"] is None
    assert torch.equal(packed.codes, RTN().round(weight, IntFormat(4))[0].codes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_clip_search_takes_the_least_error(weight, format):
    """Against a scalar search over the same 80 candidates, one group at a time."""
    weight = weight[:3]
    scale, zero, _ = weight_grid(weight, format, clip_search=True)
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
