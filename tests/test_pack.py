"""pack: every byte value and every code, against np.unpackbits and Python integers."""

import numpy as np
import pytest
import torch
from helpers import assert_bitwise, assert_registered, poison

from lowbit.formats import PACKED_BITS, IntFormat, Layout
from lowbit.ops import pack, quantize, to_layout, unpack
from lowbit.ops.pack import PACK, UNPACK

REAL_ROWS = (576, 1536)
CODES_PER_WORD = {2: 4, 3: 8, 4: 2, 8: 1}
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
BITS = pytest.mark.parametrize("bits", PACKED_BITS)


def random_codes(shape, bits: int, signed: bool) -> torch.Tensor:
    format = IntFormat(bits, symmetric=signed)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(format.qmin, format.qmax + 1, shape, generator=generator)
    return codes.to(format.code_dtype)


def unpack_bits(packed: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Code i is bits [i * b, (i + 1) * b) of the row's bit string, lowest first."""
    string = np.unpackbits(packed, axis=-1, bitorder="little").astype(np.int64)
    fields = string.reshape(*packed.shape[:-1], -1, bits)
    codes = fields @ (1 << np.arange(bits))
    return codes - (fields[..., -1] << bits) if signed else codes


@SIGNED
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_byte(bits, signed):
    packed = torch.arange(256, dtype=torch.uint8).view(256, 1)
    codes = unpack(packed, bits, signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert np.array_equal(codes.numpy(), unpack_bits(packed.numpy(), bits, signed))
    assert_bitwise(pack(codes, bits), packed)


@SIGNED
def test_every_pair_of_bytes_in_three(signed):
    """3 bits: codes straddle bytes 0-1 and 1-2, so all pairs of each, the third byte random."""
    pairs = torch.arange(1 << 16, dtype=torch.int32)
    pairs = torch.stack([pairs & 0xFF, pairs >> 8], -1).to(torch.uint8)
    third = torch.randint(256, (1 << 16, 1), generator=torch.Generator().manual_seed(0))
    packed = torch.cat([torch.cat([pairs, third], -1), torch.cat([third, pairs], -1)])
    packed = packed.to(torch.uint8)
    codes = unpack(packed, 3, signed)
    assert np.array_equal(codes.numpy(), unpack_bits(packed.numpy(), 3, signed))
    assert_bitwise(pack(codes, 3), packed)


@SIGNED
@BITS
def test_every_code_in_every_place(bits, signed):
    """One code of a word at a time, the others 0, against shifts of Python integers."""
    format, per_word = IntFormat(bits, symmetric=signed), CODES_PER_WORD[bits]
    for code in range(format.qmin, format.qmax + 1):
        codes = torch.diag(torch.full((per_word,), code)).to(format.code_dtype)
        packed = pack(codes, bits)
        for place in range(per_word):
            word = (code & (2**bits - 1)) << place * bits
            assert bytes(packed[place].tolist()) == word.to_bytes(per_word * bits // 8, "little")
        assert_bitwise(unpack(packed, bits, signed), codes)


@SIGNED
@BITS
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 24), *((2, K) for K in REAL_ROWS)], ids=str)
def test_round_trip(bits, signed, shape):
    codes = random_codes(shape, bits, signed)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8) and packed.is_contiguous()
    assert_bitwise(unpack(packed, bits, signed), codes)


@BITS
def test_vector_empty_and_strided(bits):
    """No leading dimension, no row, an odd storage offset, an odd row stride, transposed codes."""
    codes = random_codes((48, 17), bits, signed=True)
    flat = codes.flatten()[1:49]
    assert_bitwise(unpack(pack(flat, bits), bits, True), flat)
    for start in range(3):
        rows = codes[start : start + 1, :16]
        assert_bitwise(unpack(pack(rows, bits), bits, True), rows)
    assert_bitwise(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    packed = pack(codes.T, bits)
    columns = packed.T.contiguous().T  # the same numbers, column by column
    assert_bitwise(unpack(columns, bits, True), codes.T.contiguous())
    assert pack(codes[:0, :16], bits).shape == (0, 2 * bits)
    assert unpack(packed[:0], bits, True).shape == (0, 48)


@BITS
def test_result_is_not_a_view_of_the_argument(bits):
    codes = random_codes((2, 8), bits, signed=False)
    packed = pack(codes, bits)
    before = packed.clone()
    codes.zero_()
    assert_bitwise(packed, before)
    again = unpack(packed, bits, False)
    packed.zero_()
    assert_bitwise(pack(again, bits), before)


def test_pack_takes_codes_modulo_two_to_the_bits():
    codes = torch.arange(-128, 128).to(torch.int8)
    assert_bitwise(unpack(pack(codes, 4), 4, False), (codes & 15).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_to_layout_and_back(bits, symmetric):
    """5, 6 and 7 bits have no dense packing: they keep one byte each, also in ROW_MAJOR."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(bits))
    in_bytes = quantize(x, IntFormat(bits, symmetric))
    packed = to_layout(in_bytes, Layout.ROW_MAJOR)
    assert packed.codes.shape[-1] == 64 * (bits if bits in PACKED_BITS else 8) // 8
    assert_bitwise(packed, quantize(x, IntFormat(bits, symmetric), layout=Layout.ROW_MAJOR))
    assert_bitwise(to_layout(packed, Layout.BYTES), in_bytes)
    assert to_layout(packed, Layout.ROW_MAJOR) is packed


@BITS
def test_registered(bits):
    codes = random_codes((3, 24), bits, signed=True)
    assert_registered(PACK, codes, bits)
    assert_registered(UNPACK, pack(codes, bits), bits, True)


U8 = torch.zeros(2, 10, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: pack(U8, 5), r"pack: bits must be one of \(2, 3, 4, 8\), got 5"),
        (lambda: pack(U8.float(), 4), r"pack: codes must be int8 or uint8 .* got torch.float32"),
        (lambda: pack(U8[0, 0], 4), r"pack: codes must be int8 or uint8 \[\.\.\., K\], .* \(\)"),
        (lambda: pack(U8, 3), "pack: the row length must be a multiple of 8 to pack 3-bit.* 10"),
        (lambda: pack(U8[:, :6], 2), "the row length must be a multiple of 4 to pack 2-bit .* 6"),
        (lambda: pack(U8[:, :7], 4), "the row length must be a multiple of 2 to pack 4-bit .* 7"),
        (lambda: unpack(U8, 6, True), r"unpack: bits must be one of \(2, 3, 4, 8\), got 6"),
        (lambda: unpack(U8.char(), 4, True), "unpack: packed must be uint8, got torch.int8"),
        (lambda: unpack(U8, 3, True), r"the row must be a multiple of 3 bytes .* \(2, 10\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


INTERPRET = pytest.mark.interpret


@INTERPRET
@SIGNED
@BITS
def test_triton_every_byte_and_edges_of_blocks(bits, signed):
    """All bytes in a row of three orders; rows that end in the middle of a program and at its end;
    a transposed argument, and none."""
    byte = torch.arange(256, dtype=torch.uint8)
    every = torch.stack([byte, byte * 37, byte.flip(0) * 101], -1).view(1, 768)
    for packed in (every, every.view(2, 3, 128)[:, 1:, 8:80], every.view(64, 12).T[:, :48]):
        with poison():
            codes = unpack(packed, bits, signed, backend="triton")
        assert_bitwise(codes, unpack(packed, bits, signed, backend="reference"))
        with poison():
            again = pack(codes, bits, backend="triton")
        assert_bitwise(again, packed.contiguous())
    codes = random_codes((1, 1024 + 8), bits, signed).T.contiguous().T
    assert_bitwise(pack(codes, bits, backend="triton"), pack(codes, bits, backend="reference"))
    assert pack(codes[:0], bits, backend="triton").shape == (0, 1032 * bits // 8)
    assert unpack(every[:0], bits, signed, backend="triton").shape == (0, 768 * 8 // bits)


@INTERPRET
@BITS
def test_triton_takes_codes_modulo_two_to_the_bits(bits):
    codes = torch.arange(-128, 128).to(torch.int8)
    assert_bitwise(pack(codes, bits, backend="triton"), pack(codes, bits, backend="reference"))
