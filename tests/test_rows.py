"""Rows of a product that have the same bits with any others."""

import pytest
import torch
from helpers import assert_bitwise

from lowbit.ops.rows import rows_times


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("K", "N"), [(64, 64), (576, 192)])
def test_a_row_has_its_bits_with_any_others(threads, dtype, K, N):
    x, matrix = torch.randn(2, 130, K, dtype=dtype), torch.randn(N, K, dtype=dtype).T
    together = rows_times(x, matrix)
    for rows in [*range(1, 34), 63, 64, 65, 127, 128, 129]:
        assert_bitwise(rows_times(x[0, :rows], matrix), together[0, :rows])
        assert_bitwise(rows_times(x[:, :rows], matrix.expand(2, K, N)), together[:, :rows])


def test_of_no_rows():
    assert rows_times(torch.randn(3, 0, 8), torch.randn(8, 5)).shape == (3, 0, 5)
