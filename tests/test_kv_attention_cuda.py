"""kv_attention in CUDA: what test_kv_attention_kernels.py does not ask of Triton too."""

import re

import pytest
import sass
import torch
from helpers import assert_bitwise
from kv_operands import (
    Batch,
    assert_is_torchs,
    attend,
    attention_arguments,
    check_attention,
    random_cache,
    random_q,
)

from lowbit.ops.kv_attention import KV_ATTENTION

pytestmark = [pytest.mark.emulate, pytest.mark.usefixtures("seed")]


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**60])
def test_queries_of_any_size(size):
    # bf16 has fp32's range, matrix units get fp16: rows are brought there, each by a power of two.
    batch = Batch(((70, 3),))
    cache = random_cache(batch, 1)
    q = random_q(batch, 4, dtype=torch.bfloat16)
    q[1] *= 2.0**-9
    expected = attend(q, cache, batch, 0.125, "cuda")
    assert_bitwise(attend(q * size, cache, batch, 0.125 / size, "cuda"), expected)
    assert_is_torchs(expected, q, cache, batch)


def test_many_sequences():
    """More than a warp looks at together; some without queries."""
    batch = Batch(tuple((5 + 3 * (b % 7), b % 3) for b in range(70)))
    check_attention("cuda", batch, Hq=2, Hkv=1)
    check_attention("cuda", Batch(tuple((4 + b % 9, 1) for b in range(70))), Hq=2, Hkv=1)


@pytest.mark.parametrize(
    ("given", "q", "reason"),
    [
        ({}, torch.zeros(3, 9, 64), "takes fp16 and bf16, q is torch.float32"),
        ({"bits": 3}, None, "packed in 4 or 8 bits, bits is 3"),
        ({"D": 72}, None, "a multiple of 16 up to 256, got 72"),
        ({"D": 272}, None, "a multiple of 16 up to 256, got 272"),
        ({}, torch.zeros(3, 9, 128).half()[..., ::2], "reads contiguous tensors"),
    ],
)
def test_reasons(given, q, reason):
    arguments = attention_arguments(**given, dtype=torch.float16)
    arguments |= {} if q is None else {"q": q}
    with pytest.raises(RuntimeError, match=f"cuda: the CUDA kernel .*{reason}"):
        KV_ATTENTION(*arguments.values(), backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_machine_code(architecture):
    """Products of fp16, summed in fp32; codes transposed as they are loaded; copies past L1."""
    seen = 0
    for name, code in sass.kernels_sass(sass.built()[0], architecture).items():
        if "kv_attention_kernel<" in name:
            assert set(re.findall(r"HMMA[.\w]*", code)) == {"HMMA.16816.F32"}, name
            assert {"LDSM.16.M88.4", "LDSM.16.MT88.4"} <= set(re.findall(r"LDSM[.\w]*", code)), name
            assert "LDGSTS.E.BYPASS" in code, name
            seen += 1
    assert (
        seen == 18
    )  # 2 widths of codes, 3 sizes of heads, decode and prefill without and with new
