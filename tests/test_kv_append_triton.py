"""kv_append in Triton: what test_kv_append_kernels.py does not ask of CUDA too."""

import pytest
import torch
from helpers import assert_bitwise
from kv_operands import SLOT, Inputs, assert_same, exact_inputs, inputs, narrowed, poisoned

from lowbit.ops import KVPages, kv_append
from lowbit.ops.dispatch import NoBackendError

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("seed")]
# every kind of base, no base, padding of either, pairs, all of a head turned and nearly nothing
HEADS = [(64, 64), (80, 32), (96, 2), (128, 128), (256, 64), (20, 20), (2, 2)]


@pytest.mark.parametrize(("D", "R"), HEADS)
def test_exact_inputs(D, R):
    """bf16 only where nothing is rounded: the interpreter truncates."""
    x, bits = exact_inputs(D=D, R=R), 4 if D > 2 else 8
    assert_same("triton", narrowed(x, torch.bfloat16), bits=bits)
    assert_same("triton", narrowed(x, torch.float16), bits=bits, rotate=True, clip=0.9)
    matrix = torch.randint(-3, 4, (D, D))
    assert_same("triton", x, bits=bits, rotate=True, matrix=matrix.bfloat16())
    x = x._replace(cos=x.cos.double(), sin=x.sin.bfloat16())
    assert_same("triton", x, bits=bits, rotate=True, matrix=matrix.double().T)


def test_reasons():
    x, pages = inputs(), poisoned()
    strided = [t.repeat_interleave(2, 1)[:, ::2] for t in pages.tensors]

    def refused(reason: str, x: Inputs, pages: KVPages, **options):
        with pytest.raises(NoBackendError, match=reason):
            kv_append(*x, SLOT, pages, **options, backend="triton")

    refused("it computes in fp32, x is fp64", narrowed(x, torch.float64), pages)
    refused("does not pack 3-bit codes", x, poisoned(bits=3))
    refused("head_dim must be at most 256, it is 264", inputs(D=264), poisoned(D=264))
    refused("contiguous pages only, not those of k_codes, .* v_zero_", x, KVPages(*strided, 4))
    assert_bitwise(pages.tensors, poisoned().tensors)
