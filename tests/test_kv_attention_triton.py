"""kv_attention in Triton: what test_kv_attention_kernels.py does not ask of CUDA too."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise
from kv_operands import (
    Batch,
    attend,
    attention_arguments,
    check_attention,
    random_cache,
    random_q,
)
from torch import Tensor

from lowbit.ops.kv_attention import KV_ATTENTION

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("seed")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype(dtype):
    check_attention("triton", Batch(((7, 7), (0, 0), (133, 3))), dtype, 4, 2)


def test_operands_that_are_not_contiguous():
    batch = Batch(((40, 2), (33, 1)))
    cache, q = random_cache(batch, 1), random_q(batch, 2).half()
    expected = attend(q, cache, batch, backend="triton")
    moved = cache.block_table.T.contiguous().T
    lengths = torch.stack((cache.seq_lens, cache.seq_lens), 1)[:, 0]
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(t.is_contiguous() for t in (moved, lengths, q))
    apart = replace(cache, block_table=moved, seq_lens=lengths)
    assert_bitwise(attend(q, apart, batch, backend="triton"), expected)


@pytest.mark.parametrize("block_n", [16, 128, 256])
def test_splits_are_whole_blocks(block_n):
    # The kernel masks no end of a split.
    from lowbit.kernels.kv_attention import splits_of

    for max_length in (1, 129, 5000):
        splits, length = splits_of(4, block_n, max_length, torch.device("cpu"))
        assert length % block_n == 0
        assert (splits - 1) * length < max_length <= splits * length


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, 2), (torch.float16, 4), (torch.float16, 8)]
    + [(torch.bfloat16, 2), (torch.bfloat16, 4)], ids=str,
)  # fmt: skip
def test_inline_assembly_on_every_word(dtype, bits):
    # The interpreter has none: done here by hand, with the constants that it holds.
    import triton.language as tl

    from lowbit.kernels.kv_attention import expand_asm

    def pair(number: str) -> Tensor:
        half = int(number, 16) & 0xFFFF
        assert int(number, 16) == half * 0x10001
        return torch.tensor([half], dtype=torch.int32)

    word = torch.arange(2**16, dtype=torch.int32)
    zero_point = torch.tensor([0, 1, 2 ** (bits - 1), 2**bits - 1])
    power = 1024 if dtype == torch.float16 else 128
    addend = -(power + zero_point.to(dtype))
    assert (addend == -(power + zero_point)).all()
    for part in range(16 // bits):
        asm = expand_asm(part, bits, getattr(tl, str(dtype).removeprefix("torch.")))
        form = (
            r"{ .reg .b32 t, one; mov.b32 one, (\w+); shr.u32 t, \$1, (\d+); "
            r"lop3.b32 t, t, (\w+), (\w+), 0xEA; fma.rn.b?f16x2 \$0, t, one, \$2; }"
        )
        one, shift, mask, bit = re.fullmatch(form, asm).groups()
        assert pair(one).to(torch.int16).view(dtype) == 1
        float_bits = ((word >> int(shift)) & pair(mask)) | pair(bit)
        got = float_bits.to(torch.int16).view(dtype)[:, None] + addend
        expected = (word >> (bits * part) & (2**bits - 1))[:, None] - zero_point
        assert_bitwise(got, expected.to(dtype))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": torch.float64}, "computes in fp32, q is fp64"),
        ({"bits": 3}, "packed in 2, 4 or 8 bits, bits is 3"),
        ({"bits": 8, "D": 258}, "a head_dim up to 256 .* got 258 of 8 bits"),
        ({"bits": 4, "D": 2}, "whole 16-bit words, got 2 of 4 bits"),
        ({"D": 256, "new": True}, "takes k_new of fp32 in a head_dim up to 128 .*, got 256"),
    ],
)
def test_reasons(given, reason):
    with pytest.raises(RuntimeError, match=f"triton: the Triton kernel .*{reason}"):
        KV_ATTENTION(*attention_arguments(**given).values(), backend="triton")
