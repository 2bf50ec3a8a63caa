"""The tensors that cases are made of: random ones to time, exact ones to check.

Exact: small integers and powers of two, so that no sum is rounded in any order and all backends
must agree in every bit.
"""

import torch
from torch import Tensor

from lowbit.formats import GROUP_SCALE_MAX, IntFormat

NORMAL = "normal(0, 1)"
CODES = "codes uniform"
NORMAL_AND_CODES = f"{NORMAL}; {CODES}"
EXACT_LIMIT = 8  # |x| of exact inputs


def floats(shape: tuple[int, ...], dtype: torch.dtype, device, exact: bool) -> Tensor:
    if exact:
        return torch.randint(-EXACT_LIMIT, EXACT_LIMIT + 1, shape, device=device).to(dtype)
    return torch.randn(shape, device=device, dtype=dtype)


def random_bytes(shape: tuple[int, ...], device) -> Tensor:
    """uint8: packed codes of any width, each value of a code equally often."""
    return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)


def codes(shape: tuple[int, ...], format: IntFormat, device) -> Tensor:
    """One code per byte, uniform over the grid."""
    return torch.randint(
        format.qmin, format.qmax + 1, shape, device=device, dtype=format.code_dtype
    )


def scales(shape: tuple[int, ...], dtype: torch.dtype, device, exact: bool) -> Tensor:
    """exact: 1/8, 1/4 or 1/2."""
    if exact:
        return (2.0 ** torch.randint(-3, 0, shape, device=device)).to(dtype)
    return torch.rand(shape, device=device).add_(0.5).div_(64).to(dtype)


def weight(
    N: int, K: int, format: IntFormat, device, exact: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero_point) of a ROW_MAJOR weight [N, K], in the dtypes a checkpoint has."""
    groups = (N, format.num_groups(K))
    zero_point = None if format.symmetric else codes(groups, format, device)
    packed = random_bytes((N, K * format.storage_bits // 8), device)
    if format.two_level:
        scale = torch.randint(1, GROUP_SCALE_MAX + 1, groups, device=device, dtype=torch.uint8)
    else:
        scale = scales(groups, format.weight_scale_dtype, device, exact)
    return packed, scale, zero_point


def cache_bytes(tokens: int, num_kv_heads: int, head_dim: int, bits: int) -> int:
    """Bytes that K and V of so many tokens take: codes, a fp16 scale and a zero point a head."""
    return 2 * tokens * num_kv_heads * (head_dim * IntFormat(bits).storage_bits // 8 + 3)
