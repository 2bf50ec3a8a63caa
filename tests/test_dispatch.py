"""dispatch: which backend runs, what it says when none can, and what torch.library sees."""

import sys

import pytest
import torch
from helpers import assert_bitwise, assert_registered
from torch import Tensor

from lowbit.ops import hadamard, pack
from lowbit.ops.dispatch import BACKENDS, OPS, Backend, Op

SMALL = torch.ones(3)
LARGE = torch.ones(4)


def run_triton(x: Tensor, factor: float) -> Tensor:
    """Stands for a kernel; the dispatcher finds it by the name "test_dispatch:run_triton"."""
    return torch.full_like(x, 2.0)


def run_cuda(x: Tensor, factor: float) -> Tensor:
    return torch.full_like(x, 3.0)


def _check(x: Tensor, factor: float):
    if factor == 0.0:
        raise ValueError("test_scale: factor must not be 0")


def _reference(x: Tensor, factor: float) -> Tensor:
    return x * factor


def _why_not_triton(x: Tensor, factor: float) -> str | None:
    return None if x.numel() >= 4 else f"x has {x.numel()} elements, needs 4"


def _why_not_cuda(x: Tensor, factor: float) -> str | None:
    return None if factor == 9.0 else "factor is not 9"


@pytest.fixture(scope="module")
def scale():
    """An op with three backends; not one of ours, so it leaves OPS when the tests are done."""
    backends = {
        "triton": Backend(_why_not_triton, f"{__name__}:run_triton"),
        "cuda": Backend(_why_not_cuda, f"{__name__}:run_cuda"),
    }
    yield Op("test_scale", _check, _reference, lambda x, factor: x.new_empty(x.shape), backends)
    del OPS["test_scale"]


def test_first_backend_that_can_runs(scale):
    assert scale(LARGE, 9.0)[0] == 3.0  # cuda can, and comes first
    assert scale(LARGE, 5.0)[0] == 2.0  # triton can
    assert scale(SMALL, 5.0)[0] == 5.0  # only the reference can


def test_an_allocation_that_fails_in_a_kernel_is_out_of_memory(scale, monkeypatch):
    """torch's stable ABI says no more than which function failed."""

    def full(x, factor):
        raise RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack) API call failed')

    monkeypatch.setattr(sys.modules[__name__], "run_cuda", full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory. test_scale found no room"):
        scale(LARGE, 9.0)


def test_reasons_in_order_of_preference(scale):
    cuda, triton = "factor is not 9", "x has 3 elements, needs 4"
    assert list(scale.reasons(SMALL, 5.0).items()) == [
        ("cuda", cuda),
        ("triton", triton),
        ("reference", None),
    ]
    assert scale.reasons(LARGE, 9.0) == dict.fromkeys(BACKENDS)


def test_named_backend_runs(scale):
    assert scale(LARGE, 9.0, backend="triton")[0] == 2.0
    assert scale(LARGE, 9.0, backend="reference")[0] == 9.0


def test_named_backend_that_cannot_raises_with_every_reason(scale):
    message = (
        r"^test_scale: backend 'triton' was asked for and cannot run this call\n"
        r"  cuda: factor is not 9\n"
        r"  triton: x has 3 elements, needs 4$"
    )
    with pytest.raises(RuntimeError, match=message):
        scale(SMALL, 5.0, backend="triton")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_named_backend_never_falls_back(backend):
    """True of every op of ours that has no kernel yet: a reason, and no result."""
    with pytest.raises(RuntimeError, match="no (CUDA|Triton) kernel for hadamard yet"):
        hadamard(torch.ones(4), backend=backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"pack: backend must be one of .*'reference'.*'cudnn'"):
        pack(torch.zeros(2, dtype=torch.uint8), 4, backend="cudnn")


@pytest.mark.parametrize("backend", [None, *BACKENDS, "cudnn"])
def test_contract_is_checked_before_any_backend_is_chosen(scale, backend):
    with pytest.raises(ValueError, match="factor must not be 0"):
        scale(SMALL, 0.0, backend=backend)


def test_contract_is_checked_while_tracing(scale):
    with torch.device("meta"), pytest.raises(ValueError, match="factor must not be 0"):
        scale(torch.empty(3), 0.0)


def test_registered(scale):
    assert_registered(scale, SMALL, 5.0)
    assert str(torch.ops.lowbit.test_scale.default._schema) == (
        "lowbit::test_scale(Tensor x, float factor, *, str? backend=None) -> Tensor"
    )


def test_backend_is_chosen_inside_a_compiled_graph(scale):
    compiled = torch.compile(
        lambda x: scale(x, 5.0, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    assert_bitwise(compiled(LARGE), LARGE * 5)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_states_every_backend(name):
    """A backend that is missing has a reason that names it; none is a stub."""
    op = OPS[name]
    assert set(op.backends) == set(BACKENDS) - {"reference"}
    for backend in op.backends.values():
        assert backend.target is None or ":" in backend.target


def test_numbers_that_a_trace_makes_symbolic(scale):
    """torch.compile turns a number that changed between calls into a symbol; ours are constants."""
    compiled = torch.compile(hadamard, fullgraph=True, backend="aot_eager")
    for order in (2, 4, 8, 16):
        assert_bitwise(compiled(torch.ones(16), order), hadamard(torch.ones(16), order))
    compiled = torch.compile(lambda x, c: scale(x, c), fullgraph=True, backend="aot_eager")
    for factor in (2.0, 3.0, 4.0, 5.0):
        assert_bitwise(compiled(SMALL, factor), SMALL * factor)
