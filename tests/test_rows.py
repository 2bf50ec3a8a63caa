"""Rows of a product that have the same bits with any others."""

from pathlib import Path

import pytest
import torch
from helpers import assert_bitwise

from lowbit.ops.rows import rows_times

CPU = Path("/proc/cpuinfo")
MEASURED = CPU.exists() and "AuthenticAMD" in CPU.read_text()
ELSEWHERE = pytest.mark.xfail(not MEASURED, reason="measured on AMD's processors only")


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "dtype"),
    [
        (1, torch.float32),
        pytest.param(2, torch.float32, marks=ELSEWHERE),
        pytest.param(1, torch.float64, marks=ELSEWHERE),
        pytest.param(2, torch.float64, marks=ELSEWHERE),
    ],
)
@pytest.mark.parametrize(("K", "N"), [(64, 64), (576, 192)])
def test_a_row_has_its_bits_with_any_others(with_threads, threads, dtype, K, N):
    with_threads(threads)
    x, matrix = torch.randn(2, 130, K, dtype=dtype), torch.randn(N, K, dtype=dtype).T
    together = rows_times(x, matrix)
    for rows in [*range(1, 34), 63, 64, 65, 127, 128, 129]:
        assert_bitwise(rows_times(x[0, :rows], matrix), together[0, :rows])
        assert_bitwise(rows_times(x[:, :rows], matrix.expand(2, K, N)), together[:, :rows])


def test_of_no_rows():
    assert rows_times(torch.randn(3, 0, 8), torch.randn(8, 5)).shape == (3, 0, 5)
