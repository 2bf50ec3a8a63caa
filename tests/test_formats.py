"""formats: names and formats one to one, what a PackedTensor refuses, docs/formats.md held true."""

import itertools
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from helpers import assert_bitwise

from lowbit.errors import InputError
from lowbit.formats import (
    GRAMMAR,
    GROUP_SIZES,
    KNOWN_NAMES,
    PACKED_BITS,
    IntFormat,
    Layout,
    PackedTensor,
    QuantFormat,
)
from lowbit.ops import pack, to_layout, unpack

DOCUMENT = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
BITS = range(2, 9)


def valid_formats():
    """Every QuantFormat there is."""
    activations = [None, *(IntFormat(b, s) for b in BITS for s in (True, False))]
    caches = [None, *(IntFormat(b, symmetric=False) for b in BITS)]
    for b, symmetric, group_size, kv in itertools.product(
        BITS, (True, False), (None, *GROUP_SIZES), caches
    ):
        for activation in activations if symmetric else [None]:
            yield QuantFormat(IntFormat(b, symmetric, group_size), activation, kv)
            if b <= 4 and symmetric and group_size is not None and activation is not None:
                yield QuantFormat(IntFormat(b, symmetric, group_size, True), activation, kv)
    for kv in caches:
        yield QuantFormat(None, None, kv)
        yield QuantFormat(IntFormat(4), IntFormat(4), kv, IntFormat(8))


def test_parse_and_name_are_inverses():
    formats = list(valid_formats())
    names = [f.name for f in formats]
    two_level = 3 * 3 * 8 * 14  # bits, groups, caches, activations
    assert len(set(names)) == len(formats) == len(BITS) * 4 * 8 * (15 + 1) + two_level + 8 + 8
    assert [QuantFormat.parse(n) for n in names] == formats
    assert str(formats[0]) == formats[0].name


def test_every_name_the_grammar_spells():
    """Of all strings of the grammar's parts: a format of that name, or an error that shows it."""
    bits = ("2", "4", "8", "16", "1", "9", "04")
    parts = (bits, bits, ("", "kv4", "kv16", "kv1"), ("", "g32", "g128", "g16", "g0"))
    parsed = refused = 0
    suffixes = (("", "-wasym", "-wtwolevel"), ("", "-aasym"))
    for w, a, kv, g, wsuffix, aasym in itertools.product(*parts, *suffixes):
        name = f"w{w}a{a}{kv}{g}{wsuffix}{aasym}"
        try:
            assert QuantFormat.parse(name).name == name
            parsed += 1
        except InputError as error:
            assert str(error).startswith(f"unknown format {name!r}: expected {GRAMMAR}; ")
            refused += 1
    weights_only = 3 * 2 * 3 * 2  # w, kv, g, -wasym with a16
    quantized = 3 * 3 * 2 * 3 * 2  # w, a, kv, g, -aasym
    two_level = 2 * 3 * 2 * 2 * 2  # w, a, kv, g, -aasym
    expected = weights_only + quantized + two_level + 2
    assert (parsed, refused) == (expected, 7 * 7 * 4 * 5 * 6 - expected)


@pytest.mark.parametrize(
    "name,weight,activation,kv",
    [
        ("w4a4kv4", IntFormat(4), IntFormat(4), IntFormat(4, False)),
        ("w8a8", IntFormat(8), IntFormat(8), None),
        ("w2a16g128", IntFormat(2, True, 128), None, None),
        ("w4a16g64-wasym", IntFormat(4, False, 64), None, None),
        ("w3a8kv4g64-aasym", IntFormat(3, True, 64), IntFormat(8, False), IntFormat(4, False)),
        ("w16a16kv8", None, None, IntFormat(8, False)),
        ("w4a8g128-wtwolevel", IntFormat(4, True, 128, True), IntFormat(8), None),
        ("w2a4g32-wtwolevel-aasym", IntFormat(2, True, 32, True), IntFormat(4, False), None),
    ],
)
def test_names_by_example(name, weight, activation, kv):
    assert QuantFormat.parse(name) == QuantFormat(weight, activation, kv)


@pytest.mark.parametrize(
    "name,nearest",
    [
        ("w4a4vk4", "w4a4kv4"),
        ("W4A4", "w4a4"),
        ("w4a16-g128", "w4a16g128"),
        (" w8a8", "w8a8"),
        ("w4a4kv16", "w4a4"),
        ("w04a4", "w4a4"),
        ("w16a16g128", "w16a16"),
        ("w16a16-wtwolevel", "w16a16"),
    ],
)
def test_nearest_name(name, nearest):
    with pytest.raises(InputError, match=f"nearest known name is '{nearest}'$"):
        QuantFormat.parse(name)


@pytest.mark.parametrize(
    "name,reason",
    [
        ("w16a4", "a format that quantizes activations must quantize weights too"),
        ("w4a4-wasym", "-wasym needs 16-bit activations"),
        (
            "w4a16g32-wtwolevel",
            "-wtwolevel needs quantized activations: its scales are for int_gemm",
        ),
        ("w4a8-wtwolevel", "two-level scales need .* in groups, got 4 bits, .* group None"),
        ("w8a8g32-wtwolevel", "two-level scales need .* at most 4 bits in groups, got 8 bits"),
        ("w4a16g16", r"group must be one of \(32, 64, 128\), got 16"),
        ("w9a16", r"bits must be in 2\.\.8, got 9"),
        ("w4a1", r"bits must be in 2\.\.8, got 1"),
        ("w4a4kv9", r"bits must be in 2\.\.8, got 9"),
    ],
)
def test_reason(name, reason):
    with pytest.raises(InputError, match=f"unknown format '{name}'.*{reason}"):
        QuantFormat.parse(name)


NOT_NAMES = ["", "w4", "a4", "kv4", "w4a4kv", "w4a4 ", "w4a4\n", "wa", "💡"]
NOT_NAMES += ["w4a8g32-wasym-wtwolevel", "w4a8g32-aasym-wtwolevel"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_not_a_name(name):
    with pytest.raises(InputError, match=re.escape(f"unknown format {name!r}: expected {GRAMMAR}")):
        QuantFormat.parse(name)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: IntFormat(1), r"bits must be in 2\.\.8, got 1"),
        (lambda: IntFormat(16), r"bits must be in 2\.\.8, got 16"),
        (lambda: IntFormat(4, True, 0), "group_size must be None or positive, got 0"),
        (lambda: IntFormat(4, False, 32, True), "need symmetric codes .* symmetric=False"),
        (lambda: IntFormat(4, True, 24).num_groups(64), "divide the row length 64, got 24"),
        (lambda: QuantFormat(IntFormat(4, True, 48)), "group must be one of .* got 48"),
        (lambda: QuantFormat(IntFormat(4), IntFormat(4, True, 32)), "they have no group size"),
        (lambda: QuantFormat(None, IntFormat(4)), "must quantize weights too"),
        (lambda: QuantFormat(None, None, IntFormat(4)), "the KV cache is asymmetric"),
        (lambda: QuantFormat(None, None, IntFormat(4, False, 64)), "one group per token and head"),
    ],
)
def test_invalid_formats(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize("bits", BITS)
def test_int_format(bits):
    signed, unsigned = IntFormat(bits), IntFormat(bits, symmetric=False)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    assert (signed.code_dtype, unsigned.code_dtype) == (torch.int8, torch.uint8)
    for format in (signed, unsigned):
        info = torch.iinfo(format.code_dtype)
        assert info.min <= format.qmin and format.qmax <= info.max
        assert format.storage_bits == (bits if bits in PACKED_BITS else 8)
    assert IntFormat(bits, group_size=32).num_groups(96) == 3 and signed.num_groups(96) == 1


def packed_tensor(**changes) -> PackedTensor:
    """int4 [2, 8] asymmetric in groups of 4, packed, with `changes`."""
    fields = {
        "codes": torch.zeros(2, 4, dtype=torch.uint8),
        "scale": torch.ones(2, 2, dtype=torch.float16),
        "zero_point": torch.zeros(2, 2, dtype=torch.uint8),
        "format": IntFormat(4, False, 4),
        "layout": Layout.ROW_MAJOR,
        "shape": torch.Size((2, 8)),
    }
    return PackedTensor(**(fields | changes))


TWO_LEVEL = {
    "format": IntFormat(4, True, 4, True),
    "scale": torch.ones(2, 2, dtype=torch.uint8),
    "zero_point": None,
}


FRAGMENT = {
    "format": IntFormat(4, True, 4),
    "zero_point": None,
    "layout": Layout.FRAGMENT,
    "codes": torch.zeros(1, 1, 2048, dtype=torch.uint8),
}


def test_packed_tensor_is_frozen_and_counts_its_bytes():
    t = packed_tensor()
    assert t.nbytes == 2 * 4 + 2 * 2 * 2 + 2 * 2
    with pytest.raises(FrozenInstanceError):
        t.layout = Layout.BYTES
    two_level = packed_tensor(**TWO_LEVEL, channel_scale=torch.ones(2, 1))
    assert two_level.nbytes == 2 * 4 + 2 * 2 + 2 * 4
    in_bytes = packed_tensor(codes=torch.zeros(2, 8, dtype=torch.uint8), layout=Layout.BYTES)
    assert in_bytes.nbytes == 2 * 8 + 2 * 2 * 2 + 2 * 2


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"layout": Layout.BYTES}, r"codes must have shape \(2, 8\), got \(2, 4\)"),
        ({"shape": torch.Size((2, 16))}, r"codes must have shape \(2, 8\), got \(2, 4\)"),
        ({"format": IntFormat(4, False)}, r"scale must have shape \(2, 1\), got \(2, 2\)"),
        ({"format": IntFormat(4, False, 3)}, "group_size must divide the row length 8, got 3"),
        ({"format": IntFormat(4, True, 4)}, "exactly when the format is symmetric, .*True"),
        ({"zero_point": None}, "exactly when .*symmetric=False and zero_point False"),
        ({"zero_point": torch.zeros(2, 1)}, r"zero_point must have shape \(2, 2\), got \(2, 1\)"),
        ({"channel_scale": torch.ones(2, 1)}, "must have shape None: two_level=False, got .2, 1."),
        (TWO_LEVEL, r"channel_scale must have shape \(2, 1\): two_level=True, got None"),
        (TWO_LEVEL | {"channel_scale": torch.ones(2)}, r"must have shape \(2, 1\).*, got \(2,\)"),
        (
            {"layout": Layout.FRAGMENT},
            "'fragment' is for symmetric weights .*symmetric=False, 4 st",
        ),
        (
            {**FRAGMENT, "codes": torch.zeros(1, 2048, dtype=torch.uint8)},
            r"codes must have shape \(1, 1, 2048\), got \(1, 2048\)",
        ),
        (
            {**FRAGMENT, "shape": torch.Size((1, 2, 8))},
            r"for symmetric weights \[N, K\] of 4 or 8 stored bits, got shape \(1, 2, 8\)",
        ),
        ({**FRAGMENT, "format": IntFormat(3, True, 4)}, "of 4 or 8 stored bits, .* 3 stored bits"),
        (
            {**FRAGMENT, "format": IntFormat(6, True, 4), "layout": Layout.FRAGMENT_INT4},
            "'fragment_int4' is for symmetric weights .* of 4 stored bits, .* 8 stored bits",
        ),
        (
            {**FRAGMENT, "layout": Layout.FRAGMENT_FLOAT, "shape": torch.Size((1, 2, 8))},
            r"'fragment_float' is for weights \[N, K\] of 2, 3, 4 or 8 stored bits, .*\(1, 2, 8\)",
        ),
        (
            {"format": IntFormat(3, False, 4), "shape": torch.Size((2, 4))},
            "a packed row must fill whole bytes, got 4 codes of 3 bits",
        ),
    ],
)
def test_packed_tensor_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        packed_tensor(**changes)


EXAMPLE = re.compile(r"^ +(\d) bits (a?symmetric) +codes +([-\d ]+?) +bytes +([0-9a-f ]+)$", re.M)
EXAMPLES = EXAMPLE.findall(DOCUMENT)


def test_document_has_an_example_of_every_width():
    expected = {(str(b), s) for b in PACKED_BITS for s in ("symmetric", "asymmetric")}
    assert {e[:2] for e in EXAMPLES} == expected and len(EXAMPLES) == len(expected)


@pytest.mark.parametrize("bits,symmetry,codes,hexadecimal", EXAMPLES)
def test_worked_example(bits, symmetry, codes, hexadecimal):
    format = IntFormat(int(bits), symmetry == "symmetric")
    codes = torch.tensor([int(c) for c in codes.split()], dtype=format.code_dtype)
    packed = torch.tensor(list(bytes.fromhex(hexadecimal)), dtype=torch.uint8)
    assert_bitwise(pack(codes, format.bits), packed)
    assert_bitwise(unpack(packed, format.bits, format.symmetric), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_drawing(bits):
    """Every drawn bit: code i with only bit j set sets exactly the bit where i.j is drawn."""
    drawing = re.search(
        rf"^{bits} bits, (\d) codes? in (\d) .*?\n\n.*?\n(.*?)\n\n", DOCUMENT, re.S | re.M
    )
    num_codes, num_bytes = int(drawing[1]), int(drawing[2])
    cells = [line.split()[2:] for line in drawing[3].splitlines()]
    assert len(cells) == num_bytes and all(len(row) == 8 for row in cells)
    assert sorted(sum(cells, [])) == [f"{i}.{j}" for i in range(num_codes) for j in range(bits)]
    for byte, row in enumerate(cells):
        for bit, cell in zip(range(7, -1, -1), row, strict=True):
            i, j = (int(n) for n in cell.split("."))
            codes = torch.zeros(num_codes, dtype=torch.uint8)
            codes[i] = 1 << j
            expected = torch.zeros(num_bytes, dtype=torch.uint8)
            expected[byte] = 1 << bit
            assert_bitwise(pack(codes, bits), expected)


FRAGMENTS = [
    (Layout.FRAGMENT, 8),
    (Layout.FRAGMENT, 4),
    (Layout.FRAGMENT_INT4, 4),
    (Layout.FRAGMENT_FLOAT, 8),
    (Layout.FRAGMENT_FLOAT, 4),
]


def weight_of(codes: torch.Tensor, bits: int) -> PackedTensor:
    """Symmetric codes [N, K], one per byte, of scale 1."""
    scale = torch.ones(codes.shape[0], 1)
    return PackedTensor(codes, scale, None, IntFormat(bits), Layout.BYTES, codes.shape)


@pytest.mark.parametrize("layout, bits", FRAGMENTS)
def test_drawing_of_a_kernel_layout(layout, bits):
    """Every drawn code, alone in a tile, sets its nibble or byte where it is drawn, all else 0."""
    drawing = re.search(rf"^{layout.value}, {bits} bits:\n\n.*?\n(.*?)\n\n", DOCUMENT, re.S | re.M)
    start, drawn = None, set()
    for line in drawing[1].splitlines():
        label, cells = re.fullmatch(r" +(byte \d+,? ?\w*|low) +(\d+\.\d+ .*)", line).groups()
        start = int(label.split()[1].rstrip(",")) if label.startswith("byte") else start
        shift = 4 if label.endswith("high") else 0
        assert (bits == 4) == label.endswith(("high", "low"))
        cells = cells.replace("|", "").split()
        assert len(cells) == 16
        for at, cell in enumerate(cells, start):
            row, column = map(int, cell.split("."))
            codes = torch.zeros(64, 64, dtype=torch.int8)
            codes[row, column] = -1
            expected = torch.zeros(1, 1, 512 * bits, dtype=torch.uint8)
            expected[0, 0, at] = (2**bits - 1) << shift
            assert_bitwise(to_layout(weight_of(codes, bits), layout).codes, expected)
            drawn.add(cell)
    assert len(drawn) >= 80


def rules_of_layouts() -> dict[tuple[str, str], list[str]]:
    """(layout, codes) -> formulas of byte, row and column."""
    table = DOCUMENT.split("| layout | codes | byte")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {(name.strip("`"), width): rest for name, width, *rest in rows}


def value(formula: str, **names) -> int:
    formula = formula.replace("mod", "%").replace("/", "//")
    return eval(re.sub(r"(\w) (?=[\w(])", r"\1 * ", formula), {}, names)  # 2 a: 2 * a


@pytest.mark.parametrize("layout, bits", FRAGMENTS)
def test_rule_of_a_kernel_layout(layout, bits):
    """The table's formulas, evaluated for every byte of a tile, give each of its codes once."""
    rules = rules_of_layouts()
    byte, row, column = rules[layout.value, f"{bits} bits"]
    if row == "the same":
        row = rules["fragment", "8 bits"][1]
    if column == "the same":
        column = rules["fragment", "8 bits"][2]
    shifts = {
        m[1]: (m[0] == "high") * 4 for m in re.findall(r"(high|low)(?: nibble)?: (\w = \d)", byte)
    }

    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 64), dtype=torch.int8)
    expected, seen = torch.zeros(512 * bits, dtype=torch.uint8), set()
    for r, half, g, t, w, b in itertools.product(*map(range, (4, 2, 8, 4, 4, 4))):
        names = {"r": r, "s": half, "h": half, "g": g, "t": t, "w": w, "b": b, "lane": 4 * g + t}
        i, j = value(row, **names), value(column, **names)
        shift = next((v for k, v in shifts.items() if k.endswith(str(half))), 0)
        at = value(byte.split(",")[0], **names)
        expected[at] |= (int(codes[i, j]) & (2**bits - 1)) << shift
        seen.add((i, j))
    assert len(seen) == 64 * 64
    assert_bitwise(to_layout(weight_of(codes, bits), layout).codes, expected.view(1, 1, -1))


# Parts of codes of fragment_float -> stored bits, and which of them are in this part.
PARTS = {"2 bits": (2, 3), "3 bits, the lower two": (3, 3), "3 bits, the highest": (3, 4)}


def code_of(part: int, bits: int) -> int:
    """The symmetric code whose bits are `part`."""
    return part - (1 << bits) if part >> (bits - 1) else part


@pytest.mark.parametrize("title", PARTS)
def test_drawing_of_parts_of_bytes(title):
    """Every drawn code, alone in a tile with only the bits of this part, sets them where drawn."""
    bits, part = PARTS[title]
    drawing = re.search(rf"^fragment_float, {title}:\n\n.*?\n(.*?)\n\n", DOCUMENT, re.S | re.M)
    start, drawn = None, set()
    for line in drawing[1].splitlines():
        label, cells = re.fullmatch(
            r" +((?:byte \d+, )?bits? [\d ]*\d) +(\d+\.\d+ .*)", line
        ).groups()
        start = int(re.match(r"byte (\d+)", label)[1]) if label.startswith("byte") else start
        lowest = int(label.split()[-1])
        assert label.endswith(f"bits {lowest + 1} {lowest}" if part == 3 else f"bit {lowest}")
        cells = cells.replace("|", "").split()
        assert len(cells) == 16
        for at, cell in enumerate(cells, start):
            row, column = map(int, cell.split("."))
            codes = torch.zeros(64, 64, dtype=torch.int8)
            codes[row, column] = code_of(part, bits)
            expected = torch.zeros(1, 1, 512 * bits, dtype=torch.uint8)
            expected[0, 0, at] = (part // (part & -part)) << lowest
            layout = Layout.FRAGMENT_FLOAT
            assert_bitwise(to_layout(weight_of(codes, bits), layout).codes, expected)
            drawn.add((cell, at, lowest))
    assert len(drawn) >= 128


@pytest.mark.parametrize("bits", [2, 3])
def test_rule_of_planes(bits):
    """The formulas of all parts of a code together, for every byte of a tile."""
    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 64), dtype=torch.int8)
    expected, rules = torch.zeros(512 * bits, dtype=torch.uint8), rules_of_layouts()
    for title, (_, part) in ((t, p) for t, p in PARTS.items() if p[0] == bits):
        (byte, bit), row, column = (
            re.split(r", bits? ", rules["fragment_float", title][0].removesuffix(" and + 1")),
            *rules["fragment_float", title][1:],
        )
        words, steps = (2, 2) if part == 3 else (1, 4)
        seen = set()
        for r, h, g, t, w, s, b in itertools.product(*map(range, (4, 2, 8, 4, words, steps, 4))):
            names = {"r": r, "h": h, "g": g, "t": t, "w": w, "s": s, "b": b, "lane": 4 * g + t}
            i, j = value(row, **names), value(column, **names)
            here = (int(codes[i, j]) & part) // (part & -part)
            expected[value(byte, **names)] |= here << value(bit, **names)
            seen.add((i, j))
        assert len(seen) == 64 * 64
    assert_bitwise(
        to_layout(weight_of(codes, bits), Layout.FRAGMENT_FLOAT).codes, expected.view(1, 1, -1)
    )


def test_document_states_the_grammar_and_the_known_names():
    assert f"    {GRAMMAR}\n" in DOCUMENT
    table = DOCUMENT.split("## Names of model formats")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", table, re.M)
    assert tuple(row[0] for row in rows) == KNOWN_NAMES
    for name, weights, activations, kv in rows:
        format = QuantFormat.parse(name)
        w, a = format.weight, format.activation
        group = "channel" if w.group_size is None else w.group_size
        container = ", in bytes" if w.storage_bits != w.bits else ""
        assert weights == f"int{w.bits} per {group}{container}"
        assert activations == ("model's dtype" if a is None else f"int{a.bits} per token")
        assert kv == ("model's dtype" if format.kv is None else f"{format.kv.bits} bits")
    for name in re.findall(r"`(w\d+a\d+[^`]*)`", table):
        assert QuantFormat.parse(name).name == name
