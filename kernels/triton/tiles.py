"""Which tile a kernel takes for a shape: data only, nothing is tuned in a user's call.

benchmarks/tune.py measures what these tables are edited from.
"""

from dataclasses import dataclass

ANY = float("inf")


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


INT_GEMM_TILES = (
    Tile(16, ANY, 16, 32, 256, 4, 4),
    Tile(64, ANY, 64, 64, 128, 4, 3),
    Tile(ANY, 1024, 64, 64, 128, 4, 3),  # more programs where N is small
    Tile(ANY, ANY, 128, 128, 128, 8, 3),
)
# Groups need two accumulators: 128 x 128 spills on sm_89.
INT_GEMM_GROUPED_TILES = (*INT_GEMM_TILES[:-1], Tile(ANY, ANY, 128, 64, 128, 8, 3))
# Up to SPLIT_K_MAX_M rows K is split, in parts of SPLIT_K_MIN_COLUMNS at least, until there are
# SPLIT_K_PROGRAMS programs a multiprocessor; a second kernel adds the parts of a row.
SPLIT_K_MAX_M, SPLIT_K_MIN_COLUMNS, SPLIT_K_PROGRAMS = 64, 512, 4
ADD_PARTS_BLOCK_N = 512

# M = 1: a GEMV. Groups need two accumulators: with 128 x 128 they spill. fp32 x has no matrix
# units, and smaller tiles.
WEIGHT_ONLY_TILES = (
    Tile(1, ANY, 1, 16, 256, 4, 3),
    Tile(16, ANY, 16, 64, 128, 4, 4),
    Tile(64, ANY, 64, 64, 64, 4, 3),
    Tile(ANY, 1024, 64, 64, 64, 4, 3),
    Tile(ANY, ANY, 128, 64, 64, 8, 3),
)
WEIGHT_ONLY_FP32_TILES = (
    Tile(1, ANY, 1, 16, 256, 4, 3),
    Tile(ANY, ANY, 32, 64, 32, 8, 3),
)


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

    @property
    def copies(self) -> int:
        """Threads to a position."""
        return max(32 * self.num_warps // self.BLOCK_N, 1)


# Up to 16 rows: decode. One warp where the second product is a single 16 x 16 tile.
KV_ATTENTION_TILES = (
    AttentionTile(16, 64, 16, 16, 64, 1, 2),
    AttentionTile(16, 128, 16, 16, 32, 1, 2),
    AttentionTile(16, 256, 32, 16, 128, 4, 2),
    AttentionTile(16, 128, 64, 16, 64, 4, 2),
    AttentionTile(16, 256, 64, 16, 32, 4, 2),
    AttentionTile(16, 256, 128, 16, 32, 4, 3),
    AttentionTile(64, 128, 64, 64, 32, 4, 2),
    AttentionTile(ANY, 128, 32, 128, 64, 8, 2),
    AttentionTile(ANY, 128, 64, 64, 32, 4, 2),
    AttentionTile(ANY, 256, 128, 32, 32, 4, 2),
)
KV_ATTENTION_FP32_TILES = (
    AttentionTile(ANY, 64, 32, 16, 32, 4, 2),
    AttentionTile(ANY, 128, 64, 16, 16, 4, 2),
    AttentionTile(ANY, 256, 128, 16, 32, 8, 2),
)


def head_words(head_dim: int, storage_bits: int) -> int:
    """16-bit words that the codes of a head take, padded to what a matrix product takes."""
    return max(1 << (head_dim * storage_bits // 16 - 1).bit_length(), 16)


def attention_tile(is_fp32: bool, rows: float, head_dim: int, words: int) -> AttentionTile:
    return next(
        t
        for t in (KV_ATTENTION_FP32_TILES if is_fp32 else KV_ATTENTION_TILES)
        if rows <= t.max_rows and head_dim <= t.max_head_dim and words <= t.max_words
    )
