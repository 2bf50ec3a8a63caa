"""hadamard: every matrix exactly orthogonal, every split the cheapest, every refusal worded."""

import itertools
import math

import pytest
import torch

from lowbit import hadamard
from lowbit.hadamard import (
    HadamardOrderError,
    exists,
    factorize,
    hadamard_matrix,
    largest_block,
)

# The sizes that models rotate, from 135M to 72B parameters.
HEADS = (1, 2, 4, 8, 12, 16, 24, 28, 32, 36, 40, 48, 52, 56, 64)
HEAD_DIM = (64, 80, 96, 128, 256)
HIDDEN = (576, 896, 960, 1024, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 6656, 7168)
INTERMEDIATE_TO_10K = (768, 3840, 4864, 5632, 5760, 8192, 8960, 9216, 9728, 10240)
INTERMEDIATE_TO_20K = (10944, 11008, 12288, 13824, 14336, 16384, 17408, 17920, 18944)
INTERMEDIATE_TO_30K = (20480, 22016, 25600, 27648, 28672, 29568)
INTERMEDIATE = INTERMEDIATE_TO_10K + INTERMEDIATE_TO_20K + INTERMEDIATE_TO_30K
MODEL_SIZES = sorted({*HEADS, *HEAD_DIM, *HIDDEN, *INTERMEDIATE})
FULL = 4096  # the largest order multiplied out in full: 2 * 4096^3 operations take about 1 s
SMALL_SIZES = [n for n in MODEL_SIZES if n <= FULL]
LARGE_SIZES = [n for n in MODEL_SIZES if n > FULL]

# Multiples of 4 up to 200 that Sylvester and Paley do not reach, as published: OEIS A046116.
UNREACHABLE_TO_200 = {92, 116, 156, 172, 184, 188}

FIELDS = [(3, 1), (5, 1), (7, 1), (43, 1), (3, 2), (5, 2), (3, 3), (7, 2), (3, 4), (5, 3), (7, 3)]


def assert_symmetric_hadamard(h: torch.Tensor):
    """H is int8, +-1 and symmetric, and H H^T = n I; exact, as fp32 sums stay below 2^24."""
    n = len(h)
    assert h.shape == (n, n) and h.dtype == torch.int8
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h, h.T)
    assert n < 2**24
    assert torch.equal(h.float() @ h.float().T, n * torch.eye(n))


def prime_powers(limit: int) -> set[int]:
    """The odd ones, straight from the definition."""
    primes = [p for p in range(3, limit + 1) if all(p % d for d in range(2, math.isqrt(p) + 1))]
    return {p**k for p in primes for k in range(1, 20) if p**k <= limit}


def base_orders(limit: int) -> list[int]:
    """Paley's orders, I from q = 3 mod 4 and II from q = 1 mod 4, without the powers of two."""
    powers = prime_powers(limit)
    orders = {q + 1 for q in powers if q % 4 == 3} | {2 * (q + 1) for q in powers if q % 4 == 1}
    return sorted(b for b in orders if b <= limit and b.bit_count() > 1)


def all_splits(n: int, bases: list[int]):
    """Every way to write n as ascending bases times a power of two, as (bases, power)."""
    if n.bit_count() == 1:
        yield (), n
    for i, base in enumerate(bases):
        if n % base == 0:
            for rest, power in all_splits(n // base, bases[i:]):
                yield (base, *rest), power


def cheapest(n: int, bases: list[int]) -> tuple[int, ...] | None:
    """Largest power of two; then least sum of bases; then the smaller first base."""
    splits = [(-power, sum(b), b) for b, power in all_splits(n, [b for b in bases if n % b == 0])]
    if not splits:
        return None
    power, _, split = min(splits)
    return (*split, -power) if power < -1 or not split else split


def row(n: int, i: int) -> torch.Tensor:
    """Row i of H_n without H_n: the product of rows of the factors, f0 the slowest digit of i."""
    result = torch.ones(1, dtype=torch.int64)
    for f in reversed(factorize(n)):
        i, digit = divmod(i, f)
        result = torch.kron(hadamard_matrix(f)[digit].long(), result)
    return result


@pytest.mark.parametrize("n", SMALL_SIZES)
def test_model_size_is_orthogonal(n):
    h = hadamard_matrix(n)
    assert_symmetric_hadamard(h)
    product = torch.ones(1, 1, dtype=torch.int8)
    for f in factorize(n):
        product = torch.kron(product, hadamard_matrix(f))
    assert torch.equal(h, product)
    for i in (0, 1, n // 2, n - 1):
        assert torch.equal(row(n, i % n), h[i % n].long())


@pytest.mark.parametrize("n", LARGE_SIZES)
def test_large_model_size_is_orthogonal_by_its_factors(n):
    """(A (x) B)(A (x) B)^T = A A^T (x) B B^T: exact factors and an exact product are a proof."""
    factors = factorize(n)
    assert math.prod(factors) == n
    for f in factors:
        if f <= FULL:
            assert_symmetric_hadamard(hadamard_matrix(f))
        else:  # Sylvester's step, down to an order that is multiplied out elsewhere
            assert f in (2 * FULL, 4 * FULL)
            h, half = hadamard_matrix(f), hadamard_matrix(f // 2)
            quarters = h.view(2, f // 2, 2, f // 2).transpose(1, 2)
            for i, j in itertools.product(range(2), repeat=2):
                assert torch.equal(quarters[i, j], -half if i and j else half)
    generator = torch.Generator().manual_seed(n)
    sample = {0, 1, n // 2, n - 1, *torch.randint(n, (4,), generator=generator).tolist()}
    rows = torch.stack([row(n, i) for i in sorted(sample)])
    assert torch.equal(rows.abs(), torch.ones_like(rows))
    assert torch.equal(rows @ rows.T, n * torch.eye(len(rows), dtype=torch.int64))


def test_factors_apply_slowest_first():
    """x viewed as [f0, f1, ...] and multiplied along each axis is x @ H, in exact integers."""
    n, factors = 2080, (20, 52, 2)
    assert factorize(n) == factors
    x = torch.arange(n) % 17 - 8
    y = x.view(factors)
    for axis, f in enumerate(factors):
        y = torch.tensordot(y, hadamard_matrix(f).long(), dims=([axis], [0])).movedim(-1, axis)
    assert torch.equal(y.reshape(n), x @ hadamard_matrix(n).long())


@pytest.fixture
def one_thread():
    """Hundreds of small products: on a busy machine, waiting for the other threads costs most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_reachable_order_to_1000_is_orthogonal(one_thread):
    for n in range(4, 1001, 4):
        if exists(n):
            assert_symmetric_hadamard(hadamard_matrix(n))


def test_reach_is_that_of_sylvester_paley_and_kronecker():
    """A sieve over products of 2 and Paley's orders, written from the theory alone."""
    limit = 4096
    generators = [2, *base_orders(limit)]
    reached = {1}
    for n in range(2, limit + 1):
        if any(n % g == 0 and n // g in reached for g in generators):
            reached.add(n)
    assert {n for n in range(1, limit + 1) if exists(n)} == reached
    assert set(range(4, 201, 4)) - reached == UNREACHABLE_TO_200


@pytest.mark.parametrize(
    "split",
    [(1,), (2,), (4096,), (12, 2), (20, 4), (36, 4), (36, 16), (20, 52), (108, 128), (180, 32)]
    + [(28, 512), (140, 128), (76, 64), (148, 128), (344, 32), (924, 32)],
)
def test_split_by_example(split):
    assert factorize(math.prod(split)) == split


def test_split_is_the_cheapest():
    bases = base_orders(max(MODEL_SIZES))
    for n in itertools.chain(range(1, 2049), MODEL_SIZES):
        expected = cheapest(n, bases)
        assert (factorize(n) if exists(n) else None) == expected, n


def test_split_with_power_of_two_last_and_no_trivial_factor():
    for n in filter(exists, range(2, 4097)):
        *bases, last = factorize(n)
        assert math.prod(bases) * last == n and last > 1
        assert bases == sorted(bases) and all(b % 4 == 0 and b & (b - 1) for b in bases)


def test_split_ties():
    """Least product, least sum, smaller base; the last of these no real order needs so far."""
    ranked = [
        ((36,), 4),
        ((20, 36), 2),  # 720, sum 56
        ((12, 60), 2),  # 720, sum 72
        ((720,), 2),
        ((20, 50), 2),  # 1000
        ((10, 104), 2),  # 1040, sum 114
        ((8, 130), 2),  # 1040, sum 138
    ]
    assert sorted(reversed(ranked), key=hadamard._cost) == ranked


@pytest.mark.parametrize("p,k", FIELDS)
def test_quadratic_character_of_field(p, k):
    """Q Q^T = q I - J and Q J = 0: true of the character of a field, not of a ring that is none."""
    q = p**k
    matrix = torch.from_numpy(hadamard._character_matrix(p, k, sign=-1)).long()
    assert torch.equal(matrix.abs(), 1 - torch.eye(q, dtype=torch.int64))
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.int64) - 1)
    assert not matrix.sum(1).any()
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("p,k", FIELDS)
def test_paley_matrix_over_field(p, k):
    """Also the fields that `factorize` never asks for, such as GF(9), since 20 = 19 + 1."""
    build, order = {
        1: (hadamard._paley_two, 2 * (p**k + 1)),
        3: (hadamard._paley_one, p**k + 1),
    }[p**k % 4]
    h = torch.from_numpy(build(p, k))
    assert len(h) == order
    assert_symmetric_hadamard(h)


def test_irreducible_polynomials_have_no_roots():
    """In degrees 2 and 3 irreducible means without a root."""
    for p, k in [(3, 2), (5, 2), (7, 2), (11, 2), (3, 3), (5, 3), (7, 3)]:
        polynomial = (*hadamard._irreducible(p, k), 1)
        assert len(polynomial) == k + 1
        assert all(sum(c * x**i for i, c in enumerate(polynomial)) % p for x in range(p))


@pytest.mark.parametrize(
    "n,block",
    [(1, 1), (9, 1), (14, 2), (15, 1), (92, 4), (172, 4), (184, 8), (344, 344), (1000, 1000)]
    + [(10944, 10944), (13696, 128)],
)
def test_largest_block(n, block):
    assert largest_block(n) == block
    assert block == max(d for d in range(1, n + 1) if n % d == 0 and exists(d))


@pytest.mark.parametrize("call", [hadamard_matrix, factorize])
@pytest.mark.parametrize("n,block", [(3, 1), (9, 1), (14, 2), (15, 1), (18, 2), (90, 2)])
def test_impossible_order(call, n, block):
    message = (
        rf"^no Hadamard matrix of order {n} exists \(an order is 1, 2 or a multiple of 4\); "
        rf"the largest block that divides {n} is {block}$"
    )
    assert not exists(n)
    with pytest.raises(HadamardOrderError, match=message):
        call(n)


@pytest.mark.parametrize("call", [hadamard_matrix, factorize])
@pytest.mark.parametrize("n,block", [(92, 4), (116, 4), (172, 4), (184, 8), (428, 4), (13696, 128)])
def test_order_that_is_not_built(call, n, block):
    message = (
        rf"^no Hadamard matrix of order {n} is built here, though one may exist \(tried: Sylvester,"
        rf" Paley I and II over every GF\(q\), Kronecker products of these\); "
        rf"the largest block that divides {n} is {block}$"
    )
    assert not exists(n)
    with pytest.raises(HadamardOrderError, match=message):
        call(n)


@pytest.mark.parametrize("call", [hadamard_matrix, factorize, exists, largest_block])
@pytest.mark.parametrize("n", [0, -4, 4.0, "12", None, True])
def test_order_must_be_a_positive_int(call, n):
    with pytest.raises(ValueError, match=rf"^hadamard: n must be an int >= 1, got {n!r}$"):
        call(n)


@pytest.mark.parametrize("n", [1, 12, 64, 344, 576])
def test_caller_cannot_corrupt_the_cache(n):
    first = hadamard_matrix(n)
    expected = first.clone()
    first.zero_()
    assert torch.equal(hadamard_matrix(n), expected)


def test_torch_modes_leave_no_mark():
    """A first call while a model is made on the meta device must not be what is remembered."""
    hadamard._paley.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        hadamard_matrix(12)
    h = hadamard_matrix(12)
    assert h.device.type == "cpu" and not h.is_inference()
    assert_symmetric_hadamard(h)
