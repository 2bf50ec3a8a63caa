"""kv_append in CUDA: what test_kv_append_kernels.py does not ask of Triton too."""

import pytest
import torch
from helpers import assert_bitwise
from kv_operands import (
    ROTATED,
    SLOT,
    Inputs,
    assert_same,
    exact_inputs,
    inputs,
    narrowed,
    poisoned,
)

from lowbit.ops import KVPages, kv_append
from lowbit.ops.dispatch import NoBackendError
from lowbit.ops.kv_append import CUDA_HEAD_DIMS

pytestmark = [pytest.mark.emulate, pytest.mark.usefixtures("seed")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HEADS = [(64, 64), (64, 16), (80, 32), (80, 80), (96, 96), (96, 48), (128, 128), (128, 32),
         (256, 64), (256, 256)]  # fmt: skip


def test_every_head_dim_is_tested():
    assert {D for D, _ in HEADS} == set(CUDA_HEAD_DIMS)


@ROTATED
@DTYPES
@pytest.mark.parametrize(("D", "R"), HEADS)
def test_exact_inputs(D, R, dtype, rotate):
    """Sums are exact in fp32, whatever their order: the same bits."""
    x = narrowed(exact_inputs(D=D, R=R), dtype)
    assert_same("cuda", x, rotate=rotate, clip=0.9)
    assert_same("cuda", x, bits=8, rotate=rotate)


@DTYPES
@pytest.mark.parametrize(("D", "R"), HEADS[:6])
def test_random_inputs_without_a_rotation(D, R, dtype):
    """Without a rotation all is in the contract's order: the same bits."""
    x, slot = inputs(T=8, D=D, R=R, dtype=dtype), torch.arange(8)
    assert_same("cuda", x, slot)
    assert_same("cuda", x, slot, bits=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_angles_of_a_narrow_dtype(dtype):
    x = inputs(D=64, R=32, dtype=dtype)
    assert_same("cuda", x._replace(cos=x.cos.to(dtype), sin=x.sin.to(dtype)))


def test_reasons():
    x, pages = inputs(), poisoned()
    strided = [t.repeat_interleave(2, 1)[:, ::2] for t in pages.tensors]

    def refused(reason: str, x: Inputs, pages: KVPages, slot=SLOT, **options):
        with pytest.raises(NoBackendError, match=reason):
            kv_append(*x, slot, pages, **options, backend="cuda")

    refused("it computes in fp32, x is fp64", narrowed(x, torch.float64), pages)
    refused("packs codes of 4 or 8 bits, not of 3", x, poisoned(bits=3))
    refused("head_dim must be one of .*, it is 264", inputs(D=264), poisoned(D=264))
    refused("contiguous pages only, not those of k_codes, .* v_zero_", x, KVPages(*strided, 4))
    refused("by Hadamard matrices", x, pages, rotate=True, matrix=torch.eye(64))
    refused("a multiple of 16 elements, it turns 24", inputs(R=24), pages)
    refused("cos and sin must be of one dtype", x._replace(cos=x.cos.half()), pages)
    refused("cos and sin must be .* not fp64", x._replace(cos=x.cos.double(), sin=x.sin.double()),
            pages)  # fmt: skip
    apart = Inputs(*(t.transpose(0, 2).contiguous().transpose(0, 2) for t in x[:3]), *x[3:])
    refused("heads of q, k, v must be contiguous", apart, pages)
    odd = x._replace(q=torch.zeros(5, 4, 65)[..., :64])
    refused("heads of q must be .* multiples of 16 bytes", odd, pages)
    refused("slot must be contiguous", x, pages, torch.stack((SLOT, SLOT), 1)[:, 0])
    refused("clip must be at least", x, pages, clip=1e-7)
    assert_bitwise(pages.tensors, poisoned().tensors)
