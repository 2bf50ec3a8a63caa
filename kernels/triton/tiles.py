"""Which tile a kernel takes for a shape: data, nothing is tuned in a user's call.

The tables lie beside this file, gemm_tiles.csv and attention_tiles.csv, an entry a line. What an
entry is for (max_*) is chosen by hand; its tile, the columns in capitals and num_*, is written by
benchmarks/tune.py, which says in `measured` on what it was fastest: GPU, day, commit, shapes.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

ANY = float("inf")
PREDICTED = "not measured: predicted"
FOLDER = Path(__file__).parent
SMALLEST_BLOCK_M = 16  # of the matrix units; a GEMV has 1
STAGES, POWERS = range(1, 9), [1 << log2 for log2 in range(11)]


@dataclass(frozen=True)
class Tile:
    """A GEMM takes the first of its tiles that is for its M and N."""

    max_M: float
    max_N: float
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    measured: str = field(default=PREDICTED, compare=False)


@dataclass(frozen=True)
class AttentionTile:
    """Attention takes the first of its tiles that is for its rows of a sequence and its heads."""

    max_rows: float
    max_head_dim: float
    max_words: float  # of head_words
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    measured: str = field(default=PREDICTED, compare=False)

    @property
    def copies(self) -> int:
        """Threads to a position."""
        return max(32 * self.num_warps // self.BLOCK_N, 1)


FILES = {"gemm_tiles.csv": Tile, "attention_tiles.csv": AttentionTile}


def limit_names(kind: type) -> list[str]:
    """The fields that say what an entry is for, its rows first."""
    return [f.name for f in fields(kind) if f.name.startswith("max_")]


def tile_names(kind: type) -> list[str]:
    """The fields that are compiled into a kernel."""
    return [f.name for f in fields(kind) if f.type is int]


def check(name: str, table: Iterable):
    """Raises ValueError where an entry is none, or no shape reaches it, or the last is not for all
    that the others are for."""
    table = tuple(table)
    limits = [[getattr(t, limit) for limit in limit_names(type(t))] for t in table]
    for i, t in enumerate(table):
        for key in tile_names(type(t)):
            value, is_stages = getattr(t, key), key == "num_stages"
            if value not in (STAGES if is_stages else POWERS):
                kind = "from 1 to 8" if is_stages else "a power of two"
                raise ValueError(f"{name}: {key} must be {kind}, got {value!r}")
        if t.BLOCK_M < SMALLEST_BLOCK_M and not t.BLOCK_M == limits[i][0] == 1:
            raise ValueError(f"{name}: BLOCK_M must be at least {SMALLEST_BLOCK_M}, or 1 for a row")
        if any(all(a >= b for a, b in zip(e, limits[i], strict=True)) for e in limits[:i]):
            raise ValueError(f"{name}: entry {i} is for what an earlier one is for")
    if limits[-1] != [max(column) for column in zip(*limits, strict=True)]:
        raise ValueError(f"{name}: the last entry must be for all that the others are for")


def read(folder: Path = FOLDER) -> dict[str, tuple]:
    """Every table by its name."""
    tables: dict[str, list] = {}
    for file_name, kind in FILES.items():
        with (folder / file_name).open(newline="", encoding="utf-8") as file:
            for cells in csv.DictReader(file):
                tables.setdefault(cells.pop("table"), []).append(_entry(kind, cells))
    for name, table in tables.items():
        check(name, table)
    return {name: tuple(table) for name, table in tables.items()}


def _entry(kind: type, cells: dict[str, str]):
    measured = cells.pop("measured")
    sizes = {name: ANY if cell == "any" else int(cell) for name, cell in cells.items()}
    return kind(**sizes, measured=measured)


_TABLES = read()
INT_GEMM_TILES = _TABLES["INT_GEMM_TILES"]  # smaller ones where N is: more programs
# Groups need two accumulators: 128 x 128 spills on sm_89.
INT_GEMM_GROUPED_TILES = _TABLES["INT_GEMM_GROUPED_TILES"]
# Up to SPLIT_K_MAX_M rows K is split, in parts of SPLIT_K_MIN_COLUMNS at least, until there are
# SPLIT_K_PROGRAMS programs a multiprocessor; a second kernel adds the parts of a row.
SPLIT_K_MAX_M, SPLIT_K_MIN_COLUMNS, SPLIT_K_PROGRAMS = 64, 512, 4
ADD_PARTS_BLOCK_N = 512

# M = 1: a GEMV. Groups need two accumulators: with 128 x 128 they spill. fp32 x has no matrix
# units, and smaller tiles.
WEIGHT_ONLY_TILES = _TABLES["WEIGHT_ONLY_TILES"]
WEIGHT_ONLY_FP32_TILES = _TABLES["WEIGHT_ONLY_FP32_TILES"]

# Up to 16 rows: decode. One warp where the second product is a single 16 x 16 tile.
KV_ATTENTION_TILES = _TABLES["KV_ATTENTION_TILES"]
KV_ATTENTION_FP32_TILES = _TABLES["KV_ATTENTION_FP32_TILES"]


def head_words(head_dim: int, storage_bits: int) -> int:
    """16-bit words that the codes of a head take, padded to what a matrix product takes."""
    return max(1 << (head_dim * storage_bits // 16 - 1).bit_length(), 16)


def attention_tile(
    is_fp32: bool, rows: float, head_dim: int, words: int, has_new: bool = False
) -> AttentionTile:
    """has_new: k_new and v_new are given."""
    tile = next(
        t
        for t in (KV_ATTENTION_FP32_TILES if is_fp32 else KV_ATTENTION_TILES)
        if rows <= t.max_rows and head_dim <= t.max_head_dim and words <= t.max_words
    )
    if is_fp32 and has_new:  # rows of fp32 K and V spill with 4 warps
        tile = replace(tile, num_warps=max(tile.num_warps, 8))
    return tile
