"""Triton kv_attention. The contract is in lowbit/ops/kv_attention.py.

A row is one query head of one query. The heads of a KV head and the queries of a sequence follow
each other as rows, so that grouped heads share what is read. One program takes a tile of the rows
of a sequence and a KV head, and a split of the positions:

1. Find the sequence of the tile in query_start. The host reads no length: sequence b's tiles begin
   at number rows before it / tile + b, and a program in the gap that this leaves ends at once. So
   does one whose split, of a length that fills the device if a sequence fills its row of
   block_table, lies beyond its sequence. Rows of no sequence are one of length 0.
2. BLOCK_N positions at a time, up to the last that the tile sees: scores = q . (code - zero_point),
   times k_scale * scaling as a tile; online softmax in base 2; acc += (p * v_scale) . (code -
   zero_point). What a position has one number of is loaded one step ahead.
   A sliding window is for masks, and for where tiles and splits begin: at the first block in which
   any row of the tile, or any query of the sequence, sees something. Without one both begin at 0.
3. Of tokens that are given in full precision likewise, their columns by part as those of q are.
4. out = acc / sum of p. Of several splits: acc, sum and maximum in fp32, and combine_kernel adds
   those of a row in order.

A word is 16 bits: PER_WORD elements of a head. They are never interleaved: element e of every word
is a matrix of its own, to be multiplied with columns e, e + PER_WORD, .. of q, and of V it gives
these columns of out. Words lie in shared memory just as 16-bit floats would.

code - zero_point is exact in fp16 and bf16, and takes the subtraction that converting code takes
anyway: a float of m mantissa bits counts in steps of 1 from 2^m to 2^(m+1), so 2^m | code is the
number 2^m + code, and 2^m + zero_point is taken from it: with m = 10 in fp16, 7 in bf16, two codes
an instruction; with m = 23 in fp32 for fp32 q, and for 8-bit codes and bf16. Nothing large
cancels, and 0 stands where nothing was loaded. fp16 would lose a small p * v_scale: v_scale is
divided by `unit`, the largest power of two up to any v_scale so far.

Decode with 4 bits is bound by reading K and V, closely followed by issuing instructions (3.9 a
lane and element on sm_90, counted, not timed); prefill is bound by issuing them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import IntFormat
from lowbit.kernels.common import FP16_MAX, device_of, processors_of
from lowbit.kernels.tiles import attention_tile, head_words
from lowbit.ops.dispatch import interpreted

INTERPRETED = tl.constexpr(interpreted())  # it has no bf16 arithmetic: that is fp32 in it
WARPS_PER_PROCESSOR = 12  # what registers leave room for
SHORTEST_SPLIT = 128  # positions
MOST_SPLITS = 128
LONGEST_WINDOW = 2**29  # longer than any sequence
LOG2_E = 1.4426950408889634
TWO_23 = tl.constexpr(0x4B000000)  # the bits of 2^23
EXPONENT = tl.constexpr(0x7F800000)
TWICE_ONE = tl.constexpr(2 * 0x3F800000)  # twice the bits of 1.0
SEARCH = tl.constexpr(128)  # sequences looked at together
COMBINED = tl.constexpr(16)  # splits


@triton.jit
def tile_start(start, b, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Number of the first tile of sequence b. A tile that is one query leaves no gap."""
    return start if ROWS == HEADS else start * HEADS // ROWS + b


@triton.jit
def find(tile, query_start, seq_lens, T, B, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of the sequence of a tile: b, its first query, queries, length, and its first tile."""
    b = 0
    for first in range(1, B + 1, SEARCH):
        other = first + tl.arange(0, SEARCH)
        start = tl.load(query_start + other, mask=other <= B, other=0)
        before = tile_start(start, other, HEADS, ROWS) <= tile
        b += tl.sum((before & (other <= B)).to(tl.int32), axis=0)
    start = tl.load(query_start + b)
    end = tl.load(query_start + b + 1, mask=b < B, other=T)
    length = tl.load(seq_lens + b, mask=b < B, other=0)
    return b, start, end - start, length, tile_start(start, b, HEADS, ROWS)


@triton.jit
def load_each(x, at, valid, COPIES: tl.constexpr):
    """[BLOCK_N] of x, 0 where not valid. With COPIES there is a number for every thread to load:
    fewer would be loaded by all threads that use them, once for every use."""
    if COPIES == 1:
        numbers = tl.load(x + at, mask=valid, other=0)
    else:
        at = tl.broadcast_to(at[:, None], [at.shape[0], COPIES])
        numbers = tl.max(tl.load(x + at, mask=valid[:, None], other=0), axis=1)
    return numbers


@triton.jit
def finite(scale):
    """fp32; nan where it is not finite."""
    scale = scale.to(tl.float32)
    return tl.where(tl.abs(scale) <= FP16_MAX, scale, float("nan"))


@triton.constexpr_function
def has_asm(BITS, dtype):
    """2^m | code, in a 16-bit float of m mantissa bits, must be the number 2^m + code."""
    return not INTERPRETED and dtype.primitive_bitwidth == 16 and (BITS < 8 or dtype == tl.float16)


@triton.constexpr_function
def expand_asm(part, BITS, dtype):
    """PTX for two words $1: code number `part` of each, OR 2^m (step 2), plus $2."""
    name, power, one = {
        tl.float16: ("f16x2", 0x6400, 0x3C00),  # 1024
        tl.bfloat16: ("bf16x2", 0x4300, 0x3F80),  # 128
    }[dtype]
    power, one, mask = (f"{x * 0x10001:#x}" for x in (power, one, 2**BITS - 1))
    return (
        f"{{ .reg .b32 t, one; mov.b32 one, {one}; shr.u32 t, $1, {part * BITS}; "
        f"lop3.b32 t, t, {mask}, {power}, 0xEA; "  # (t & mask) | power
        f"fma.rn.{name} $0, t, one, $2; }}"
    )


@triton.jit
def shifted(zero_point, BITS: tl.constexpr, dtype: tl.constexpr):
    """What `centered` adds: -(2^m + zero_point), m = 23 in fp32."""
    number = zero_point.to(tl.float32)
    if has_asm(BITS, dtype):
        number = (-(1024.0 if dtype == tl.float16 else 128.0) - number).to(dtype)
    else:
        number = -8388608.0 - number
    return number


@triton.jit
def load_tokens(
    start, end, pages, kv_head, num_kv_heads, k_scale, k_zero_point, v_scale, v_zero_point,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """What is one number a token, of BLOCK_N positions: its place in the cache, scales, zeros."""
    position = start + tl.arange(0, BLOCK_N)
    valid = position < end
    page = load_each(pages, position // PAGE_SIZE, valid, COPIES)
    at = (page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE) * num_kv_heads + kv_head
    return (
        at,
        load_each(k_scale, at, valid, COPIES),
        load_each(k_zero_point, at, valid, COPIES),
        load_each(v_scale, at, valid, COPIES),
        load_each(v_zero_point, at, valid, COPIES),
    )


@triton.jit
def centered(packed, zero_point, part: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """[BLOCK_N, WORDS]: code - zero_point of code number `part` of every word."""
    if has_asm(BITS, dtype):
        number = tl.inline_asm_elementwise(
            expand_asm(part, BITS, dtype),
            "=r,r,r",
            [packed, tl.broadcast_to(zero_point[:, None], packed.shape)],
            dtype=zero_point.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        code = (packed.to(tl.int32) >> (part * BITS)) & (2**BITS - 1)
        number = (code | TWO_23).to(tl.float32, bitcast=True) + zero_point[:, None]
    return number.to(dtype)


@triton.jit
def here(x):
    """Scalar x, unknown to the compiler before this point: after a loop, what is computed of it is
    not kept in registers through the loop. Triton 3.9 spilled it."""
    if not INTERPRETED:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
    return x


@triton.jit
def first_seen(seen, window, BLOCK_N: tl.constexpr):
    """Where the block begins that has the first of the `seen` positions up to a query's own that
    its window leaves."""
    first = 0
    if window is not None:
        first = tl.maximum(seen - window, 0) // BLOCK_N * BLOCK_N
    return first


@triton.jit
def sees(position, end, seen, seen_here, window):
    """[BLOCK_M, BLOCK_N]: whether rows, which see so many positions, see those before `end`.
    seen_here is the smaller of the two; with a window rows keep one number, for registers."""
    if window is None:
        mask = position[None, :] < seen_here[:, None]
    else:
        # from where the window begins; 2^30 is behind any
        column = tl.where(position < end, position + window, 1 << 30)
        from_begin = (column[None, :] - seen[:, None]).to(tl.uint32, bitcast=True)
        mask = from_begin < window.to(tl.uint32)
    return mask


@triton.jit
def find_rows(
    first_row, queries, num_kv_heads,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of the rows of a tile: query, place among those of the tile's first query, validity."""
    local = tl.arange(0, BLOCK_M)
    query = (first_row + local) // HEADS
    row = (query - first_row // HEADS) * (num_kv_heads * HEADS) + (first_row + local) % HEADS
    return query, row, (local < ROWS) & (query < queries)


@triton.jit
def inverse(unit):
    """1 / unit for powers of two."""
    bits = TWICE_ONE - unit.to(tl.int32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def soften(scores, top, total):
    """Online softmax: p, what is before times shrink, and the new maximum and sum."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that saw nothing so far
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    return p, shrink, new_top, total * shrink + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["T", "B", "P", "window"])  # one kernel for all calls of a model
def kv_attention_kernel(
    q,  # [T, num_kv_heads, HEADS, HEAD_DIM]
    k_codes,  # [num_pages, PAGE_SIZE, num_kv_heads, HEAD_DIM / PER_WORD]
    k_scale,  # [num_pages, PAGE_SIZE, num_kv_heads]
    k_zero_point,
    v_codes,
    v_scale,
    v_zero_point,
    block_table,  # [B, P]
    seq_lens,  # [B]
    query_start,  # [B + 1]
    k_new,  # None; or [T, num_kv_heads, HEAD_DIM]
    v_new,
    cached_lens,  # None; or [B]
    out,  # as q; or fp32 [splits, *q.shape], not divided by the sum
    row_max,  # None; or fp32 [splits, T, num_kv_heads, HEADS]: the largest score
    row_sum,  # None; or of p
    T,
    B,
    P,
    num_kv_heads,
    split_length,  # whole blocks of BLOCK_N
    factor,  # scaling * log2(e)
    window,  # None; or how many positions a query sees
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # of a tile, the others of BLOCK_M are padding
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,  # of a head, and padding
    COPIES: tl.constexpr,  # threads / BLOCK_N
):
    PER_WORD: tl.constexpr = 16 // BITS
    HEAD_WORDS: tl.constexpr = HEAD_DIM // PER_WORD
    SPLIT: tl.constexpr = row_max is not None
    NEW: tl.constexpr = k_new is not None
    IN_FP32: tl.constexpr = INTERPRETED and q.dtype.element_ty == tl.bfloat16
    dtype: tl.constexpr = tl.float32 if IN_FP32 else q.dtype.element_ty

    # Step 1: late queries see most, and go first.
    last_tile = tl.num_programs(0) // num_kv_heads - 1
    tile = last_tile - tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    b, first, queries, length, b_tile = find(tile, query_start, seq_lens, T, B, HEADS, ROWS)
    first_row = (tile - b_tile) * ROWS
    if first_row >= queries * HEADS:
        return
    last_query = tl.minimum((first_row + ROWS - 1) // HEADS, queries - 1)
    before = length - queries + 1  # + query: how much a query sees
    split = first_seen(before, window, BLOCK_N) + tl.program_id(1) * split_length
    begin = tl.maximum(split, first_seen(before + first_row // HEADS, window, BLOCK_N))
    end = tl.minimum(before + last_query, split + split_length)
    if SPLIT and begin >= end:
        return
    cached, pages_end = length, end
    if NEW:
        cached = tl.maximum(tl.load(cached_lens + b, mask=b < B, other=0), length - queries)
        pages_end = tl.minimum(end, cached)

    query, row, row_valid = find_rows(first_row, queries, num_kv_heads, HEADS, ROWS, BLOCK_M)
    first_query = first_row // HEADS
    tile_row = (first + first_query).to(tl.int64) * num_kv_heads * HEADS + kv_head * HEADS
    seen = length - queries + query + 1
    word = tl.arange(0, WORDS)
    word_valid = word < HEAD_WORDS
    # Transposed, to share no address with the store.
    at = row[None, :] * HEAD_DIM + (word * PER_WORD)[:, None]
    mask = row_valid[None, :] & word_valid[:, None]
    q_parts = ()
    acc = ()
    for part in tl.static_range(PER_WORD):
        columns = tl.load(q + tile_row * HEAD_DIM + at + part, mask=mask, other=0.0)
        q_parts += (tl.trans(columns).to(dtype),)
        acc += (tl.zeros([BLOCK_M, WORDS], tl.float32),)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    unit = tl.full([1], 2.0**-24, tl.float32)

    # Step 2
    pages = block_table + b.to(tl.int64) * P
    in_pages = tl.minimum(seen, cached)
    tokens = load_tokens(
        begin, pages_end, pages, kv_head, num_kv_heads,
        k_scale, k_zero_point, v_scale, v_zero_point, PAGE_SIZE, BLOCK_N, COPIES,
    )  # fmt: skip
    for start in range(begin, pages_end, BLOCK_N):
        head, key_scale, key_zero, value_scale, value_zero = tokens
        tokens = load_tokens(
            start + BLOCK_N, pages_end, pages, kv_head, num_kv_heads,
            k_scale, k_zero_point, v_scale, v_zero_point, PAGE_SIZE, BLOCK_N, COPIES,
        )  # fmt: skip
        position = start + tl.arange(0, BLOCK_N)
        valid = position < pages_end
        codes_at = head[:, None] * HEAD_WORDS + word[None, :]
        codes_mask = valid[:, None] & word_valid[None, :]

        k = tl.load(k_codes + codes_at, mask=codes_mask, other=0)
        zero_point = shifted(key_zero, BITS, dtype)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in tl.static_range(PER_WORD):
            numbers = tl.trans(centered(k, zero_point, part, BITS, dtype))
            scores = tl.dot(q_parts[part], numbers, scores, input_precision="ieee")
        scores *= (finite(key_scale) * factor)[None, :]
        seen_here = sees(position, pages_end, seen, in_pages, window)
        scores = tl.where(seen_here, scores, float("-inf"))

        p, shrink, top, total = soften(scores, top, total)
        scale = finite(value_scale)
        if dtype == tl.float16:
            largest = tl.max(tl.where(scale == scale, tl.abs(scale), 0.0), axis=0, keep_dims=True)
            power = (largest.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
            new_unit = tl.maximum(unit, power)
            scale *= inverse(new_unit)
            shrink *= unit * inverse(new_unit)
            unit = new_unit
        v = tl.load(v_codes + codes_at, mask=codes_mask, other=0)
        zero_point = shifted(value_zero, BITS, dtype)
        weight = (p * scale[None, :]).to(dtype)
        new_acc = ()
        for part in tl.static_range(PER_WORD):
            numbers = centered(v, zero_point, part, BITS, dtype)
            scaled = acc[part] * shrink[:, None]
            new_acc += (tl.dot(weight, numbers, scaled, input_precision="ieee"),)
        acc = new_acc

    # Step 3
    if NEW:
        own = first + queries - length  # the row of position 0
        in_split = tl.minimum(seen, end)
        for start in range(tl.maximum(begin, cached), end, BLOCK_N):
            position = start + tl.arange(0, BLOCK_N)
            new_row = (own + position).to(tl.int64) * num_kv_heads + kv_head
            new_at = new_row[:, None] * HEAD_DIM + (word * PER_WORD)[None, :]
            new_mask = (position < end)[:, None] & word_valid[None, :]
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for part in tl.static_range(PER_WORD):
                numbers = tl.load(k_new + new_at + part, mask=new_mask, other=0.0).to(dtype)
                numbers = tl.trans(numbers)
                scores = tl.dot(q_parts[part], numbers, scores, input_precision="ieee")
            seen_here = sees(position, end, seen, in_split, window)
            scores = tl.where(seen_here, scores * factor, float("-inf"))
            p, shrink, top, total = soften(scores, top, total)
            if dtype == tl.float16:
                new_unit = tl.maximum(unit, 1.0)
                p *= inverse(new_unit)
                shrink *= unit * inverse(new_unit)
                unit = new_unit
            weight = p.to(dtype)
            new_acc = ()
            for part in tl.static_range(PER_WORD):
                numbers = tl.load(v_new + new_at + part, mask=new_mask, other=0.0).to(dtype)
                scaled = acc[part] * shrink[:, None]
                new_acc += (tl.dot(weight, numbers, scaled, input_precision="ieee"),)
            acc = new_acc

    # Step 4
    first_row = here(first_row)
    query, row, row_valid = find_rows(first_row, queries, num_kv_heads, HEADS, ROWS, BLOCK_M)
    seen = length - queries + query + 1
    at = row[:, None] * HEAD_DIM + (word * PER_WORD)[None, :]
    mask = row_valid[:, None] & word_valid[None, :]
    if dtype != tl.float16:
        unit = tl.full([1], 1.0, tl.float32)
    if SPLIT:
        tile_row += tl.program_id(1).to(tl.int64) * T * num_kv_heads * HEADS
        tl.store(row_max + tile_row + row, top, mask=row_valid)
        tl.store(row_sum + tile_row + row, total, mask=row_valid)
        factor_out = tl.broadcast_to(unit, [BLOCK_M])
    else:
        factor_out = tl.div_rn(tl.broadcast_to(unit, [BLOCK_M]), total)
    for part in tl.static_range(PER_WORD):
        y = tl.where((seen > 0)[:, None], acc[part] * factor_out[:, None], 0.0)
        tl.store(out + tile_row * HEAD_DIM + at + part, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "B", "window"])
def combine_kernel(
    partial,  # fp32 [splits, T, num_q_heads, HEAD_DIM]
    row_max,  # fp32 [splits, T, num_q_heads]
    row_sum,
    seq_lens,
    query_start,
    out,  # [T, num_q_heads, HEAD_DIM]
    T,
    B,
    num_q_heads,
    split_length,
    window,  # None; or how many positions a query sees
    BLOCK_N: tl.constexpr,  # of the splits
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two that is enough
    BLOCK_D: tl.constexpr,
):
    """One program a row: the splits in which it sees something, all others are not written."""
    row = tl.program_id(0)
    t = row // num_q_heads
    _, first, queries, length, _ = find(t, query_start, seq_lens, T, B, 1, 1)
    before = length - queries + 1
    seen = tl.maximum(before + t - first, 0)
    begin = first_seen(before, window, BLOCK_N)
    used = tl.cdiv(tl.maximum(seen - begin, 0), split_length)
    first_split = 0
    if window is not None:
        first_split = (tl.maximum(seen - window, begin) - begin) // split_length

    all_splits = tl.arange(0, SPLITS)
    at = all_splits.to(tl.int64) * T * num_q_heads + row
    valid = (all_splits >= first_split) & (all_splits < used)
    top = tl.load(row_max + at, mask=valid, other=float("-inf"))
    highest = tl.max(top, axis=0)
    factor = tl.where(valid, tl.exp2(top - highest), 0.0)
    total = tl.sum(factor * tl.load(row_sum + at, mask=valid, other=0.0), axis=0)

    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first_split, used, COMBINED):
        split = start + tl.arange(0, COMBINED)
        split_row = split.to(tl.int64) * T * num_q_heads + row
        used_now = split < used
        split_top = tl.load(row_max + split_row, mask=used_now, other=float("-inf"))
        weight = tl.where(used_now, tl.exp2(split_top - highest), 0.0)
        mask = used_now[:, None] & (d < HEAD_DIM)[None, :]
        part = tl.load(partial + split_row[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * weight[:, None], axis=0)
    y = tl.where(used > 0, acc * tl.div_rn(tl.full([1], 1.0, tl.float32), total), 0.0)
    at = row.to(tl.int64) * HEAD_DIM + d
    tl.store(out + at, y.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def splits_of(warps: int, block_n: int, max_length: int, device: torch.device) -> tuple[int, int]:
    """(splits, positions of each) of max_length positions, if each takes so many warps.

    A split is whole blocks of positions: the kernel masks what a row does not see, no split's end.
    """
    shortest = max(SHORTEST_SPLIT, block_n)
    wanted = min(triton.cdiv(WARPS_PER_PROCESSOR * processors_of(device), warps), MOST_SPLITS)
    length = triton.cdiv(max_length, wanted)
    length = max(triton.cdiv(length, shortest), 1) * shortest
    return max(triton.cdiv(max_length, length), 1), length


def kv_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cached_lens: Tensor | None,
    bits: int,
    scaling: float,
    window: int,
) -> Tensor:
    (T, num_q_heads, head_dim), (B, P) = q.shape, block_table.shape
    _, page_size, num_kv_heads, _ = k_codes.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0 or B == 0:
        return out.zero_()
    heads = num_q_heads // num_kv_heads
    bits = IntFormat(bits).storage_bits
    words = head_words(head_dim, bits)
    rows = heads * T / B  # of a sequence, on average
    tile = attention_tile(q.dtype == torch.float32, rows, head_dim, words, k_new is not None)
    one_query = T <= B and heads <= tile.BLOCK_M  # a query and a tile, if all sequences have one
    tile_rows = heads if one_query else tile.BLOCK_M
    count = T if one_query else T * heads // tile_rows + B + 1
    programs = max(triton.cdiv(T * heads, tile_rows), min(T, B)) * num_kv_heads  # that are busy
    warps = programs * tile.num_warps
    longest, window = P * page_size, min(window, LONGEST_WINDOW)
    if window:  # of a sequence with all T queries, from the beginning of a block
        longest = min(longest, window + T + tile.BLOCK_N)
    splits, split_length = splits_of(warps, tile.BLOCK_N, longest, q.device)
    partial, row_max, row_sum = out, None, None
    if splits > 1:
        partial = q.new_empty((splits, *q.shape), dtype=torch.float32)
        row_max, row_sum = q.new_empty((2, splits, T, num_q_heads), dtype=torch.float32)
    k_codes, v_codes = (t.contiguous().view(torch.int16) for t in (k_codes, v_codes))
    read = (q, k_codes, k_scale, k_zero_point, v_codes, v_scale, v_zero_point, block_table)
    lengths = (seq_lens.contiguous(), query_start.contiguous())
    new = (t if t is None else t.contiguous() for t in (k_new, v_new, cached_lens))
    with device_of(q):
        kv_attention_kernel[(count * num_kv_heads, splits)](
            *(t.contiguous() for t in read),
            *lengths,
            *new,
            *(partial, row_max, row_sum),
            *(T, B, P, num_kv_heads, split_length, scaling * LOG2_E, window or None),
            HEAD_DIM=head_dim,
            BITS=bits,
            PAGE_SIZE=page_size,
            HEADS=heads,
            ROWS=tile_rows,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            WORDS=words,
            COPIES=tile.copies,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if splits > 1:
            combine_kernel[(T * num_q_heads,)](
                *(partial, row_max, row_sum, *lengths, out),
                *(T, B, num_q_heads, split_length, window or None),
                BLOCK_N=tile.BLOCK_N,
                HEAD_DIM=head_dim,
                SPLITS=triton.next_power_of_2(splits),
                BLOCK_D=triton.next_power_of_2(head_dim),
            )
    return out
