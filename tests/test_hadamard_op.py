"""hadamard (the op; lowbit/hadamard.py has test_hadamard.py): integers, so every order agrees."""

import math

import pytest
import torch
from helpers import assert_bitwise, assert_no_worse_than_torch, assert_registered, poison

from lowbit.hadamard import HadamardOrderError, hadamard_matrix
from lowbit.ops import hadamard
from lowbit.ops.dispatch import NoBackendError, interpreted
from lowbit.ops.hadamard import HADAMARD
from lowbit.ops.quantize import FLOAT_DTYPES

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)

# K, order, inner: every kind of factor, whole rows and blocks, mixing heads (inner = head_dim).
ROTATIONS = pytest.mark.parametrize(
    "K,order,inner",
    [(1, 1, 1), (6, 1, 2), (2, 2, 1), (64, 64, 1), (128, 128, 1), (512, 512, 1), (4096, 4096, 1)]
    + [(12, 12, 1), (20, 20, 1), (576, 576, 1), (1536, 1536, 1), (1536, 128, 1), (1376, 1376, 1)]
    + [(1040, 1040, 1), (576, 64, 1), (1536, 4, 64), (1536, 12, 128), (480, 12, 4), (96, 2, 3)],
)


def integers(M: int, K: int, limit: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, (M, K), generator=generator)


def dense(x: torch.Tensor, matrix: torch.Tensor, inner: int) -> torch.Tensor:
    """x (I (x) matrix (x) I_inner), written as one sum over k."""
    blocks = x.unflatten(-1, (-1, len(matrix), inner))
    return torch.einsum("maki,kj->maji", blocks, matrix).flatten(1)


@ROTATIONS
@DTYPES
def test_exact_inputs(K, order, inner, dtype):
    """Sums of small integers are exact; then one multiplication in fp32 and one narrowing."""
    x = integers(3, K, limit=8, seed=K)
    sums = dense(x, hadamard_matrix(order).long(), inner)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor(1 / math.sqrt(order), dtype=compute)
    expected = (sums.to(compute) * factor).to(dtype)
    assert_bitwise(hadamard(x.to(dtype), order, inner), expected)


@DTYPES
@pytest.mark.parametrize("inner", [1, 8])
def test_exact_matrix(dtype, inner):
    """A matrix that is neither symmetric nor scaled: y = x R, and nothing else is done to it."""
    matrix = integers(9, 9, limit=3, seed=1)
    x = integers(2, 144, limit=8, seed=2)
    expected = dense(x, matrix, inner).to(dtype)
    for matrix_dtype in (torch.float32, torch.bfloat16):
        got = hadamard(x.to(dtype), 9, inner, matrix.to(matrix_dtype))
        assert_bitwise(got, expected)


@pytest.mark.parametrize("order", [1, 4, 64, 1024])
def test_twice_is_the_identity(order):
    """H is symmetric, and for an order 4^k both products are exact."""
    x = integers(2, 2048, limit=8).to(torch.float16)
    assert_bitwise(hadamard(hadamard(x, order), order), x)


@ROTATIONS
@DTYPES
def test_random_inputs(K, order, inner, dtype):
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(4, K, generator=generator).to(dtype)
    matrix = hadamard_matrix(order).double() / math.sqrt(order)
    in_torch = dense(x, matrix.to(dtype), inner)
    got = hadamard(x, order, inner)
    assert_no_worse_than_torch(got, in_torch, dense(x.double(), matrix, inner), floor=1e-13)
    norms = [t.double().norm(dim=-1) for t in (got, x)]
    assert torch.allclose(*norms, rtol=4 * torch.finfo(dtype).eps)


def test_narrowed_once():
    """bf16 and fp16 in are the fp32 result, rounded at the end; what is out of range is inf."""
    x = torch.randn(2, 1536, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_bitwise(hadamard(x), hadamard(x.float()).bfloat16())
    x = torch.full((1, 64), 16384.0, dtype=torch.float16)  # sum 2^20, / 8 = 2^17
    assert hadamard(x)[0, 0] == float("inf") and not hadamard(x)[0, 1:].any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_numbers_spoil_their_block_only(bad):
    x = torch.ones(2, 128)
    x[1, 70] = bad
    got = hadamard(x, 64)
    assert not got[1, 64:].isfinite().any()
    assert got[0].isfinite().all() and got[1, :64].isfinite().all()


def test_whole_row_by_default():
    x = integers(2, 48, limit=8).float()
    assert_bitwise(hadamard(x), hadamard(x, 48))
    assert_bitwise(hadamard(x, inner=4), hadamard(x, 12, 4))


def test_shapes_strides_and_argument_untouched():
    x = integers(24, 16, limit=8).float()
    before = x.clone()
    expected = hadamard(x)
    assert_bitwise(hadamard(x.view(2, 3, 4, 16)).view(24, 16), expected)
    assert_bitwise(hadamard(x[0]), expected[0])
    assert hadamard(x[:0]).shape == (0, 16)
    assert_bitwise(hadamard(x.T, 8), hadamard(x.T.contiguous(), 8))
    assert_bitwise(hadamard(x[:, 2:6]), hadamard(x[:, 2:6].contiguous()))
    hadamard(x, 1).zero_()  # not x itself, whatever the order
    assert_bitwise(x, before)


@pytest.mark.parametrize("inner", [1, 2])
def test_registered(inner):
    x = integers(3, 48, limit=8).bfloat16()
    assert_registered(HADAMARD, x, 12, inner, None)
    assert_registered(HADAMARD, x, 3, inner, torch.eye(3))


def test_public_function_compiles():
    x = integers(3, 48, limit=8).float()
    compiled = torch.compile(hadamard, fullgraph=True, backend="eager")
    assert_bitwise(compiled(x), hadamard(x))


X = torch.zeros(2, 36)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: hadamard(X.int()), "hadamard: x must be fp64.* got torch.int32"),
        (lambda: hadamard(X, 8), "order . inner must divide the row length 36, got order 8 and"),
        (lambda: hadamard(X, 4, 18), "must divide the row length 36, got order 4 and inner 18"),
        (lambda: hadamard(X, 0), "got order 0 and inner 1"),
        (lambda: hadamard(X, 4, -1), "got order 4 and inner -1"),
        (lambda: hadamard(X, 4, matrix=torch.eye(3)), r"matrix must be floating point \[4, 4\]"),
        (lambda: hadamard(X, 4, matrix=torch.eye(4).int()), "got torch.int32"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_order_without_a_matrix():
    with pytest.raises(HadamardOrderError, match="no Hadamard matrix of order 9 exists"):
        hadamard(X, 9)
    with pytest.raises(HadamardOrderError, match="order 92 is built here"):
        hadamard(torch.zeros(1, 92))


INTERPRET = pytest.mark.interpret
TRITON_ROTATIONS = pytest.mark.parametrize(
    "K,order,inner",
    [(1, 1, 1), (6, 1, 2), (2, 2, 1), (192, 64, 1), (8192, 8192, 1), (12, 12, 1), (40, 20, 1)]
    + [(576, 576, 1), (1536, 1536, 1), (1376, 1376, 1), (1536, 4, 64), (480, 12, 4), (96, 2, 3)]
    + [(480, 4, 40)],
)


@INTERPRET
@TRITON_ROTATIONS
def test_triton_exact_inputs(K, order, inner):
    """bf16 only where nothing is rounded: the interpreter truncates."""
    x = integers(3, K, limit=8, seed=K)
    for dtype in (torch.float32, torch.float16):
        with poison():
            got = hadamard(x.to(dtype), order, inner, backend="triton")
        assert_bitwise(got, hadamard(x.to(dtype), order, inner, backend="reference"))
    if order in (1, 4, 64):
        x = (x // 8).bfloat16() * 8
        assert_bitwise(
            hadamard(x, order, inner, backend="triton"),
            hadamard(x.float(), order, inner, backend="reference").bfloat16(),
        )


@INTERPRET
@TRITON_ROTATIONS
def test_triton_random_inputs(K, order, inner):
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(3, K, generator=generator)
    matrix = hadamard_matrix(order).double() / math.sqrt(order)
    floor = 1e-13 if interpreted() else 1e-6  # matrix units cut off what they align to add
    for dtype in (torch.float32, torch.float16):
        x = x.to(dtype)
        in_torch = dense(x, matrix.to(dtype), inner)
        got = hadamard(x, order, inner, backend="triton")
        assert_no_worse_than_torch(got, in_torch, dense(x.double(), matrix, inner), floor)


@INTERPRET
@pytest.mark.parametrize("inner", [1, 8])
def test_triton_exact_matrix(inner):
    matrix = integers(9, 9, limit=3, seed=1)
    x = integers(2, 144, limit=8, seed=2)
    expected = dense(x, matrix, inner)
    for dtype in (torch.float32, torch.float16):
        got = hadamard(x.to(dtype), 9, inner, matrix.bfloat16(), backend="triton")
        assert_bitwise(got, expected.to(dtype))


@INTERPRET
def test_triton_edges():
    """A bad number spoils its block only; out of range is inf; any strides, no rows."""
    x = torch.ones(3, 96)
    x[1, 70], x[2, 0] = float("inf"), float("nan")
    got = hadamard(x, 12, backend="triton").view(3, 8, 12)
    bad = torch.zeros(3, 8, 1, dtype=torch.bool)
    bad[1, 5], bad[2, 0] = True, True
    assert torch.equal(~got.isfinite(), bad.expand(3, 8, 12))
    x = torch.full((1, 64), 16384.0, dtype=torch.float16)
    got = hadamard(x, backend="triton")
    assert got[0, 0] == float("inf") and not got[0, 1:].any()
    x = integers(24, 16, limit=8).float()
    for view in (x.view(2, 3, 4, 16), x[0], x[:0], x.T, x[:, 2:6]):
        order = 4 if view.shape[-1] < 16 else 8
        before = view.clone()
        got = hadamard(view, order, backend="triton")
        assert_bitwise(got, hadamard(before, order, backend="reference"))
        assert_bitwise(view, before)


@INTERPRET
@pytest.mark.parametrize(
    "x,order,matrix,reason",
    [
        (X.double(), None, None, "x is fp64"),
        (torch.zeros(1, 65536), None, None, "32768 elements at once, here 65536"),
        (X, 1, torch.eye(1), "its matrix must be at least 2 x 2"),
    ],
)
def test_triton_reasons(x, order, matrix, reason):
    with pytest.raises(NoBackendError, match=reason):
        hadamard(x, order, matrix=matrix, backend="triton")
