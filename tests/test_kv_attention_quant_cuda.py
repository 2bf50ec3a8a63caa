"""kv_attention_quant in CUDA: the bits of CUDA's kv_attention, then quantize or hadamard_quant."""

import emulator
import pytest
import torch
from helpers import assert_bitwise
from test_kv_attention_quant import (
    RAGGED,
    ROTATIONS,
    Call,
    assert_same,
    attention_call,
    new_tokens,
    op_arguments,
    two_ops,
)

from lowbit.formats import IntFormat, Layout
from lowbit.ops.kv_attention_quant import KV_ATTENTION_QUANT

pytestmark = pytest.mark.emulate
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

# A split is at least 256 positions, and up to 8 are added as the row is rotated. The emulator's 4
# SMs take 12 tiles: of one KV head and 3 or 4 sequences 3 splits.
SPLITS = ((530, 1), (256, 1), (0, 1), (17, 1))
BATCHES = {
    "a split": ((37, 1), (0, 1), (20, 1)),
    "splits": SPLITS,
    "splits of prefill": ((300, 40),),
    "splits of a mixture": ((513, 2), (5, 5), (0, 0), (0, 2)),
    "prefill": ((50, 50),),
}


def check(call: Call, *rest, **new):
    return assert_same(call, *rest, **new, backend="cuda")


def stand_for(num_sms: int):
    """A device of so many SMs, where the emulator is one."""
    if not torch.cuda.is_available():
        emulator.stand_for(90, num_sms)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_batch(batch, dtype):
    call = attention_call(batch, dtype, Hq=4, Hkv=1, unowned=1)
    got = check(call, IntFormat(4), 4, 64, None, 0.9, Layout.ROW_MAJOR)
    start = call[4].tolist()
    nothing = [start[b] for b, (length, queries) in enumerate(batch) if queries > length]
    for row in (*nothing, -1):
        assert got.scale[row] == 2.0**-24 and not got.codes[row].any()


@DTYPES
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_new_tokens_in_full_precision(batch, dtype):
    call = attention_call(batch, dtype, Hq=4, Hkv=1, unowned=1)
    check(call, IntFormat(8), 4, 64, new=new_tokens(call))


@pytest.mark.parametrize("window", [20, 260])
@pytest.mark.parametrize("batch", [*BATCHES.values(), ((900, 2), (600, 1))], ids=str)
def test_a_sliding_window(batch, window):
    """Where it is in splits, the first ones of a row are not those of the sequence."""
    call = attention_call(batch, torch.bfloat16, Hq=4, Hkv=1, unowned=1)
    check(call, IntFormat(8), 4, 64, window=window)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("order", "inner"), ROTATIONS)
@pytest.mark.parametrize("batch", [RAGGED, SPLITS], ids=["a split", "splits"])
def test_every_rotation(batch, order, inner, symmetric):
    call = attention_call(batch, Hkv=1)
    for bits, layout in ((4, Layout.ROW_MAJOR), (4, Layout.BYTES), (8, Layout.BYTES)):
        check(call, IntFormat(bits, symmetric), order, inner, None, 1.0, layout)


# Hq, Hkv, D and the rotations: dense factors of 12 to 344, so that each tile takes some; a row too
# long to be added as it is rotated
HEADS = {
    (3, 1, 64): [(192, 1)],
    (9, 1, 64): [(0, 1), (576, 1), (64, 1)],
    (12, 2, 80): [(12, 80), (960, 1)],
    (7, 1, 128): [(896, 1), (128, 1)],
    (8, 1, 128): [(1024, 1), (8, 128)],
    (16, 1, 256): [(4096, 1), (16, 256)],
    (28, 4, 128): [(3584, 1), (28, 128)],
    (40, 8, 128): [(5120, 1), (40, 128)],
    (43, 1, 256): [(11008, 1)],
    (56, 8, 256): [(14336, 1)],
    (72, 1, 256): [(256, 1)],
    (5, 1, 16): [(16, 1)],
    (1, 1, 96): [(96, 1)],
}


@DTYPES
@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_every_size(sizes, dtype):
    Hq, Hkv, D = sizes
    stand_for(4 * Hkv)
    call = attention_call(((300, 1), (20, 1)), dtype, Hq, Hkv, D)
    for order, inner in HEADS[sizes]:
        check(call, IntFormat(4), order, inner, None, 0.9)


@pytest.mark.parametrize("heads", range(1, 9))
def test_every_group_of_heads(heads):
    stand_for(8)
    call = attention_call(((300, 1), (20, 1)), torch.bfloat16, 2 * heads, 2, bits=8, page_size=7)
    check(call, IntFormat(4), 64)


@pytest.mark.parametrize(("D", "splits"), [(16, 7), (16, 8), (128, 8), (128, 9)])
def test_many_splits(D, splits):
    """8 are added as the row is rotated, not more; and of heads of 16, as the weights of 8 would
    not fit where the row will be, 7."""
    stand_for(64)
    call = attention_call(((256 * splits - 16, 1),), Hq=2, Hkv=1, D=D)
    check(call, IntFormat(4), 2 * D)


def test_exact_rows_are_the_references():
    """Attention to one token, integers, and its rotation are exact in every backend."""
    for batch in (((1, 1),) * 3, ((300, 1), (1, 1), (1, 1))):
        call = attention_call(batch, torch.bfloat16, Hkv=1)
        call[1].v_scale.fill_(1.0)
        rest = (call, IntFormat(4, False), 256)
        got, expected = check(*rest), two_ops(*rest, backend="reference")
        for name in ("codes", "scale", "zero_point"):
            assert_bitwise(getattr(got, name)[1:], getattr(expected, name)[1:])


@pytest.mark.parametrize("rotation", [(0, 1), (64, 1), (256, 1)])
@pytest.mark.parametrize("batch", [((37, 1), (20, 1)), ((300, 1), (270, 1))], ids=str)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_not_finite(value, batch, rotation):
    call = attention_call(batch, Hkv=1)
    call[1].v_scale[call[2][1, 0].long(), 3, 0] = float(value)
    got = check(call, IntFormat(4, False), *rotation)
    assert got.scale.isnan().flatten().tolist() == [False, True]
    assert not got.codes[1].any()


def test_no_rows_and_no_sequences():
    check(attention_call(((5, 0),)), IntFormat(4), 64)
    q, pages, _, _, _, scaling = attention_call(((4, 1),), unowned=2)
    none, start = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    got = check((q, pages, none, none[:, 0], start, scaling), IntFormat(4), 64)
    assert got.scale.shape == (3, 1) and not got.codes.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(13, 4, 64)}, "the CUDA kernel takes fp16 and bf16, q is torch.float32"),
        ({"matrix": torch.eye(4)}, "it rotates by Hadamard matrices, not by a matrix given"),
        ({"bits": 2, "packed": True}, "it packs codes of 4 or 8 bits, not of 2"),
        ({"order": 64, "inner": 4}, "inner must be 1 or a multiple of 8, it is 4"),
    ],
)
def test_reasons(change, reason):
    with pytest.raises(RuntimeError, match=f"cuda: {reason}"):
        KV_ATTENTION_QUANT(*op_arguments(**change), backend="cuda")
