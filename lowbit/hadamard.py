"""hadamard: which Hadamard orders exist here, how each is split into factors, how each is built.

    H H^T = n I,   H in {-1, +1}^(n x n),   n = 1, 2 or a multiple of 4

Nothing is stored: three constructions and their Kronecker products give every order we use.

    Sylvester   2^k                                     H_2m = [[H_m, H_m], [H_m, -H_m]]
    Paley I     q + 1,      q = p^k, q = 3 mod 4        `_paley_one`
    Paley II    2 (q + 1),  q = p^k, q = 1 mod 4        `_paley_two`
    Kronecker   m n from m and n                        (A (x) B)(A (x) B)^T = A A^T (x) B B^T

J. J. Sylvester, Phil. Mag. 34 (1867) 461-475; R. E. A. C. Paley, J. Math. Phys. 12 (1933) 311-320.
Orders such as 92, 116 and 172 need other constructions (Williamson's, for one) and are not built.

Every matrix built here is also symmetric, so H / sqrt(n) is its own inverse and H^T needs no code.

A row of n elements is transformed factor by factor, never by the full matrix:

    H_n = H_f0 (x) H_f1 (x) ... (x) H_2^k,   (f0, f1, ..., 2^k) = factorize(n),   f0 slowest
"""

import math
from functools import cache, lru_cache, reduce
from itertools import product

import numpy as np
import torch

from lowbit.errors import InputError

# The matrices are made in NumPy so that no torch mode (default device, fake tensors, inference)
# that is active at the first call can leave its mark on what the cache keeps.


class HadamardOrderError(InputError):
    """No Hadamard matrix of this order is built here; says whether one can exist at all."""


def hadamard_matrix(n: int) -> torch.Tensor:
    """The Hadamard matrix of order n: int8 [n, n] of +-1, H H^T = n I, H = H^T.

    It equals the Kronecker product, in order, of the matrices of `factorize(n)`. The tensor is the
    caller's own: writing to it changes nothing here. Raises HadamardOrderError where none is built.
    """
    factors = [_sylvester(f) if _is_power_of_two(f) else _paley(f) for f in factorize(n)]
    return torch.from_numpy(reduce(np.kron, factors, np.ones((1, 1), np.int8)))


def factorize(n: int) -> tuple[int, ...]:
    """The factors of the fast transform, slowest index first: base orders, then the power of two.

    A base order is a Paley order that is no power of two. Kernels apply all of them as one dense
    matrix, as many multiplications per element as the product of the base orders, and the
    power-of-two part, one Sylvester matrix, by butterflies: log2 additions. So the split has the
    least product of base orders, the largest power of two; ties go to the least sum, then to the
    smaller first base. Base orders ascend; a power of two of 1 is left out, except that
    factorize(1) is (1,).

        factorize(576) = (36, 16)    factorize(11008) = (344, 32)    factorize(4096) = (4096,)
    """
    _check_order(n)
    split = _cheapest_split(n)
    if split is None:
        raise HadamardOrderError(_why_not(n))
    bases, log2 = split
    return (*bases, 1 << log2) if log2 or not bases else bases


def exists(n: int) -> bool:
    """Whether order n is built here; False does not mean that no such matrix exists."""
    _check_order(n)
    return _cheapest_split(n) is not None


def largest_block(n: int) -> int:
    """The largest divisor of n that is built here, for a block-diagonal rotation; 1 at worst."""
    _check_order(n)
    return max(d for d in _divisors(n) if _cheapest_split(d) is not None)


def _check_order(n: int):
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"hadamard: n must be an int >= 1, got {n!r}")


def _why_not(n: int) -> str:
    block = f"the largest block that divides {n} is {largest_block(n)}"
    if n % 4:
        return (
            f"no Hadamard matrix of order {n} exists (an order is 1, 2 or a multiple of 4); {block}"
        )
    return (
        f"no Hadamard matrix of order {n} is built here, though one may exist (tried: Sylvester, "
        f"Paley I and II over every GF(q), Kronecker products of these); {block}"
    )


# Which orders: integers only, no matrix is made.


@cache
def _cheapest_split(n: int) -> tuple[tuple[int, ...], int] | None:
    """(base orders, ascending; log2 of the rest) of least cost, or None if n is out of reach."""
    if _is_power_of_two(n):
        return (), n.bit_length() - 1
    if n % 4:
        return None
    splits = []
    for base in (4 * d for d in _divisors(n // 4) if _paley_field(4 * d)):
        rest = _cheapest_split(n // base)
        if rest is not None:
            bases, log2 = rest
            splits.append((tuple(sorted((base, *bases))), log2))
    return min(splits, key=_cost, default=None)


def _cost(split: tuple[tuple[int, ...], int]) -> tuple:
    """What `factorize` minimizes, in its order."""
    bases, _ = split
    return math.prod(bases), sum(bases), bases


@cache
def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) that gives this base order by Paley I, else II; or None.

    The sizes fix q mod 4: order = 0 mod 4 makes q = order - 1 = 3 mod 4, and order = 4 mod 8 makes
    q = order / 2 - 1 = 1 mod 4. Powers of two are Sylvester's and are no base orders.
    """
    if order % 4 or _is_power_of_two(order):
        return None
    return _prime_power(order - 1) or (_prime_power(order // 2 - 1) if order % 8 == 4 else None)


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime, or None; q is odd and at least 3."""
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


# The matrices of one factor: int8 of +-1, symmetric.


def _sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1), np.int8)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@lru_cache(maxsize=32)
def _paley(order: int) -> np.ndarray:
    """The matrix of a base order, read-only because it is shared between calls."""
    p, k = _paley_field(order)
    h = _paley_one(p, k) if p**k == order - 1 else _paley_two(p, k)
    h.flags.writeable = False
    return h


def _paley_one(p: int, k: int) -> np.ndarray:
    """Paley I, order q + 1 with q = p^k = 3 mod 4, rows arranged so that H is symmetric.

        H = [[1, 1^T], [1, M]],   M_ij = chi(a_i + a_j), and -1 where a_i + a_j = 0

    Paley's own form is I + [[0, 1^T], [-1, Q]], Q_ij = chi(a_i - a_j). As chi(-1) = -1, exchanging
    the rows of a and -a and negating all rows but the first turns it into this one.

    Rows i != l of M, d = a_l - a_i: the sum over x of chi(x) chi(x + d) is -1, the two entries put
    in place of chi(0) add -chi(d) - chi(-d) = 0, and the border adds 1. So the rows are orthogonal.
    """
    m = _character_matrix(p, k, sign=+1)
    m[m == 0] = -1
    return np.pad(m, ((1, 0), (1, 0)), constant_values=1)


def _paley_two(p: int, k: int) -> np.ndarray:
    """Paley II, order 2 (q + 1) with q = p^k = 1 mod 4; C, A and B are symmetric, and so is H.

        H = C (x) A + I (x) B,   C = [[0, 1^T], [1, Q]],   Q_ij = chi(a_i - a_j)
        A = [[1, 1], [1, -1]],   B = [[1, -1], [-1, -1]]

    C C^T = q I, A A^T = B B^T = 2 I and A B^T = -B A^T, so the cross terms of H H^T cancel.
    """
    c = np.pad(_character_matrix(p, k, sign=-1), ((1, 0), (1, 0)), constant_values=1)
    c[0, 0] = 0
    a = np.array([[1, 1], [1, -1]], np.int8)
    b = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(c, a) + np.kron(np.eye(len(c), dtype=np.int8), b)


# The field GF(p^k): element number e is the polynomial whose coefficients are the base-p digits
# of e, lowest first, modulo p and modulo x^k + low(x), `low` from `_irreducible`.


def _character_matrix(p: int, k: int, sign: int) -> np.ndarray:
    """int8 [q, q]: chi(a_i + sign a_j) over all elements a of GF(p^k), in the order 0 .. q - 1."""
    index = np.zeros((p**k, p**k), np.int64)
    for i, digit in enumerate(_digits(p, k).T):
        index += (digit[:, None] + sign * digit) % p * p**i
    return _quadratic_character(p, k)[index]


def _quadratic_character(p: int, k: int) -> np.ndarray:
    """chi: int8 [q], 0 at 0, +1 at the squares of GF(p^k), -1 elsewhere; by squaring everything."""
    digits, low = _digits(p, k), _irreducible(p, k)
    squares = np.zeros((p**k, 2 * k - 1), np.int64)
    for i in range(k):
        squares[:, i : i + k] += digits[:, i : i + 1] * digits
    for top in range(2 * k - 2, k - 1, -1):  # x^k = -low(x) lowers the degree
        squares[:, top - k : top] -= squares[:, top : top + 1] * low
        squares %= p
    chi = np.full(p**k, -1, np.int8)
    chi[squares[:, :k] % p @ p ** np.arange(k)] = 1
    chi[0] = 0
    return chi


def _digits(p: int, k: int) -> np.ndarray:
    """int64 [q, k]: the coefficients of every element of GF(p^k)."""
    return np.arange(p**k)[:, None] // p ** np.arange(k) % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """low, k coefficients, such that x^k + low(x) has no monic divisor of degree 1 .. k / 2."""
    divisors = [
        (*g, 1) for degree in range(1, k // 2 + 1) for g in product(range(p), repeat=degree)
    ]
    return next(
        low
        for low in product(range(p), repeat=k)
        if not any(_divides(g, (*low, 1), p) for g in divisors)
    )


def _divides(g: tuple[int, ...], f: tuple[int, ...], p: int) -> bool:
    """Whether the monic polynomial g divides f modulo p; coefficients are listed lowest first."""
    rest = list(f)
    while len(rest) >= len(g):
        lead = rest[-1]
        for i in range(1, len(g) + 1):
            rest[-i] = (rest[-i] - lead * g[-i]) % p
        rest.pop()
    return not any(rest)
