"""kv_append: RoPE against transformers and pair by pair, rotation against a dense H, the cache."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bitwise, assert_codes, assert_no_worse_than_torch, assert_registered
from kv_operands import FLOATS, ROTATED, SLOT, Inputs, exact_inputs, inputs, poisoned
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lowbit.formats import IntFormat, Layout
from lowbit.hadamard import hadamard_matrix
from lowbit.ops import KVPages, kv_append, quantize
from lowbit.ops.kv_append import CACHE, KV_APPEND
from lowbit.transforms.online import hartley_matrix

pytestmark = pytest.mark.usefixtures("seed")
BITS = (2, 3, 4, 6, 8)
HEAD_DIMS = (64, 80, 96, 128, 256)


def token(pages: KVPages, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the six tensors hold at `slot`."""
    return tuple(t.flatten(0, 1)[slot] for t in pages.tensors)


def quantized(x: torch.Tensor, bits: int, clip: float = 1.0) -> tuple[torch.Tensor, ...]:
    """(codes, scale, zero_point) as the cache keeps them."""
    format = IntFormat(bits, symmetric=False)
    t = quantize(x, format, clip, Layout.ROW_MAJOR, torch.float16)
    return t.codes, t.scale.squeeze(-1), t.zero_point.squeeze(-1)


def llama_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    y, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)
    return y


def rope_by_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Elements j and j + R / 2 of a head turn by one angle; the rest stay."""
    y, half = x.clone(), cos.shape[-1] // 2
    for j in range(half):
        a, b = x[..., j], x[..., j + half]
        y[..., j] = a * cos[:, j : j + 1] - b * sin[:, j : j + 1]
        y[..., j + half] = b * cos[:, j + half, None] + a * sin[:, j + half, None]
    return y


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_full_rope_is_that_of_transformers(bits, D):
    x, pages = inputs(D=D), poisoned(D=D, bits=bits)
    assert_bitwise(kv_append(*x, SLOT, pages), llama_rope(x.q, x.cos, x.sin))
    k = llama_rope(x.k, x.cos, x.sin)
    assert_bitwise(token(pages, SLOT), (*quantized(k, bits), *quantized(x.v, bits)))


@pytest.mark.parametrize(("D", "R"), [(64, 64), (64, 2), (80, 32), (96, 48), (128, 64)])
def test_partial_rope_pair_by_pair(D, R):
    x, pages = exact_inputs(D=D, R=R), poisoned(D=D)
    assert_bitwise(kv_append(*x, SLOT, pages), rope_by_pairs(x.q, x.cos, x.sin))
    k = rope_by_pairs(x.k, x.cos, x.sin)
    assert_bitwise(token(pages, SLOT), (*quantized(k, 4), *quantized(x.v, 4)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [64, 256])
def test_head_rotation_is_exact_on_integers(D, bits):
    x, pages = exact_inputs(D=D), poisoned(D=D, bits=bits)
    H = hadamard_matrix(D).float() / D**0.5
    q, k = (llama_rope(t, x.cos, x.sin) @ H for t in (x.q, x.k))
    assert_bitwise(kv_append(*x, SLOT, pages, rotate=True), q)
    assert_bitwise(token(pages, SLOT), (*quantized(k, bits), *quantized(x.v, bits)))


@pytest.mark.parametrize("given", [False, True], ids=["hadamard", "matrix"])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_rotation_against_a_dense_matrix(D, given):
    x, pages = inputs(T=8, D=D), poisoned(D=D, bits=8)
    R = hartley_matrix(D) if given else hadamard_matrix(D).double() / D**0.5
    matrix = R.float() if given else None
    slot = torch.arange(8)
    got = kv_append(*x, slot, pages, rotate=True, matrix=matrix)
    q, k = (llama_rope(t, x.cos, x.sin) for t in (x.q, x.k))
    R32 = R.float()
    # torch's dense product of a small row is now and then luckier than the factors: 2 ulp of 1.
    assert_no_worse_than_torch(got, q @ R32, q.double() @ R32.double(), floor=2.0**-22)
    codes, *ranges = token(pages, slot)[:3]
    expected = quantize(k @ R32, IntFormat(8, False), scale_dtype=torch.float16)
    assert_codes((codes, *(t.unsqueeze(-1) for t in ranges)), expected)


def test_rotation_leaves_query_key_products_unchanged():
    x = inputs(T=8, Hq=2, Hkv=2, D=80, R=32, dtype=torch.float64)
    slot, pages = torch.full((8,), -1), poisoned(D=80)

    def products(**rotation):
        q = kv_append(*x, slot, pages, **rotation)
        k = kv_append(x.k, x.k, x.v, x.cos, x.sin, slot, pages, **rotation)
        return torch.einsum("ihd,jhd->hij", q, k)

    plain = products()
    for matrix in (None, hartley_matrix(80)):
        turned = products(rotate=True, matrix=matrix)
        torch.testing.assert_close(turned, plain, rtol=0, atol=1e-12 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", FLOATS)
@ROTATED
def test_nothing_is_narrowed_before_it_is_quantized(rotate, dtype):
    x, pages = inputs(dtype=dtype), poisoned(bits=8)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wide = Inputs(*(t.to(compute) for t in x))
    wide_pages = poisoned(bits=8)
    expected = kv_append(*wide, SLOT, wide_pages, rotate).to(dtype)
    assert_bitwise(kv_append(*x, SLOT, pages, rotate), expected)
    assert_bitwise(pages.tensors, wide_pages.tensors)


@pytest.mark.parametrize("clip", [0.5, 0.95])
def test_clip(clip):
    x, pages = exact_inputs(), poisoned()
    kv_append(*x, SLOT, pages, clip=clip)
    k = llama_rope(x.k, x.cos, x.sin)
    assert_bitwise(token(pages, SLOT), (*quantized(k, 4, clip), *quantized(x.v, 4, clip)))


@ROTATED
def test_only_the_named_slots_change(rotate):
    x, pages = inputs(), poisoned()
    slot = torch.tensor([-1, 9, -7, 3, -(2**40)])
    everywhere, stored = poisoned(), slot >= 0
    q = kv_append(*x, SLOT, everywhere, rotate)
    assert_bitwise(kv_append(*x, slot, pages, rotate), q)
    expected = poisoned()
    for out, t in zip(expected.tensors, token(everywhere, SLOT), strict=True):
        out.flatten(0, 1)[slot[stored]] = t[stored]
    assert_bitwise(pages.tensors, expected.tensors)


def test_token_by_token_is_the_same_as_at_once():
    x, one, many = inputs(), poisoned(), poisoned()
    q = kv_append(*x, SLOT, one)
    steps = [kv_append(*(t[i : i + 1] for t in x), SLOT[i : i + 1], many) for i in range(len(SLOT))]
    assert_bitwise(torch.cat(steps), q)
    assert_bitwise(many.tensors, one.tensors)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (9, 3), (8, 1), (4, 4)])
def test_heads(Hq, Hkv):
    x, pages = exact_inputs(Hq=Hq, Hkv=Hkv), poisoned(Hkv)
    assert_bitwise(kv_append(*x, SLOT, pages), llama_rope(x.q, x.cos, x.sin))
    k = llama_rope(x.k, x.cos, x.sin)
    assert_bitwise(token(pages, SLOT), (*quantized(k, 4), *quantized(x.v, 4)))


def test_no_tokens():
    x, pages = inputs(T=0), poisoned()
    assert kv_append(*x, SLOT[:0], pages, rotate=True).shape == (0, 4, 64)
    assert_bitwise(pages.tensors, poisoned().tensors)


def test_inputs_are_left_alone_and_q_out_is_new():
    x, pages = inputs(), poisoned()
    kept = Inputs(*(t.clone() for t in x))
    kv_append(*x, SLOT, pages, rotate=True).zero_()
    kv_append(*x, SLOT, pages).zero_()
    assert_bitwise(x, kept)


def test_cache_of_one_layer_inside_a_larger_tensor():
    x, apart = inputs(), poisoned()
    layers = [torch.stack((t, t), 1) for t in poisoned().tensors]  # [num_pages, 2, page_size, ...]
    kv_append(*x, SLOT, KVPages(*(t[:, 1] for t in layers), bits=4))
    kv_append(*x, SLOT, apart)
    assert_bitwise([t[:, 1] for t in layers], apart.tensors)
    assert_bitwise([t[:, 0] for t in layers], poisoned().tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_head_is_stored_as_nan(value):
    x, pages, clean = inputs(), poisoned(), poisoned()
    kv_append(*x, SLOT, clean)
    x.v[1, 0, 5] = value
    kv_append(*x, SLOT, pages)
    *_, codes, scale, zero_point = token(pages, SLOT)
    assert scale[1, 0].isnan() and not codes[1, 0].any() and not zero_point[1, 0]
    expected = token(clean, SLOT)[3:]
    for t in expected:
        t[1, 0] = 0
    assert_bitwise((codes, scale.nan_to_num(0), zero_point), expected)


def test_slot_past_the_cache_is_refused():
    with pytest.raises(IndexError, match="out of bounds"):
        kv_append(*inputs(), SLOT + 1, poisoned())


def test_pages():
    pages = KVPages.allocate(5, 16, 3, 64, 3)
    assert (pages.num_pages, pages.page_size, pages.num_kv_heads) == (5, 16, 3)
    assert pages.k_codes.shape == (5, 16, 3, 24) and pages.v_scale.shape == (5, 16, 3)
    assert pages.nbytes == 2 * 5 * 16 * 3 * (24 + 2 + 1)
    assert not any(t.any() for t in pages.tensors)
    with pytest.raises(ValueError, match="row length must be a multiple of 8 to pack 3-bit codes"):
        KVPages.allocate(5, 16, 3, 20, 3)
    with pytest.raises(ValueError, match=r"bits must be in 2\.\.8, got 16"):
        KVPages.allocate(5, 16, 3, 64, 16)


def op_arguments(rotate: bool = False) -> dict:
    x, pages = inputs(), poisoned()
    cache = dict(zip(CACHE, pages.tensors, strict=True))
    rest = {"matrix": None, "rotate": rotate, "bits": 4, "clip": 1.0}
    return x._asdict() | {"slot": SLOT} | cache | rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 256)}, r"q must have shape \[T, num_q_heads, head_dim\]"),
        ({"q": torch.zeros(5, 4, 64).int()}, "q must be .* got torch.int32"),
        ({"q": torch.zeros(5, 3, 64)}, r"k_codes must have shape .* dividing 3, got \(3, 4, 2"),
        ({"k": torch.zeros(5, 4, 64)}, r"k must be torch.float32 of shape \(5, 2, 64\)"),
        ({"v": torch.zeros(5, 2, 64).half()}, r"v must be torch.float32 of shape \(5, 2, 64\)"),
        ({"cos": torch.zeros(5, 63)}, r"cos must have shape \[5, R\], R even and at most 64"),
        ({"cos": torch.zeros(5, 66)}, r"cos must have shape \[5, R\], R even and at most 64"),
        ({"sin": torch.zeros(4, 64)}, r"sin must have shape \[5, R\], R even and at most 64"),
        ({"sin": torch.zeros(5, 32)}, "cos and sin must have one shape"),
        ({"slot": SLOT.int()}, r"slot must be int64 of shape \[5\], got torch.int32"),
        ({"slot": SLOT[:4]}, r"slot must be int64 of shape \[5\]"),
        ({"k_codes": torch.zeros(3, 4, 32)}, r"k_codes must have shape \[num_pages, page_size"),
        ({"k_codes": torch.zeros(3, 4, 0, 32)}, r"k_codes must have shape .* got \(3, 4, 0, 32"),
        ({"k_codes": torch.zeros(3, 4, 2, 32)}, "k_codes must be torch.uint8"),
        ({"bits": 8}, r"k_codes must be torch.uint8 of shape \(3, 4, 2, 64\)"),
        ({"k_scale": torch.zeros(3, 4, 2)}, r"k_scale must be torch.float16 of shape \(3, 4, 2\)"),
        ({"v_zero_point": torch.zeros(3, 4, 1)}, "v_zero_point must be torch.uint8 of shape"),
        ({"bits": 9}, r"bits must be in 2\.\.8, got 9"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\], got 0"),
        ({"matrix": torch.eye(64)}, "matrix must be None when rotate is False"),
        ({"rotate": True, "matrix": torch.eye(32)}, r"matrix must be floating point \[64, 64\]"),
    ],
)
def test_wrong_argument(change, message):
    with pytest.raises(ValueError, match=f"kv_append: {message}"):
        KV_APPEND(*(op_arguments() | change).values())


def test_head_dim_without_a_hadamard_matrix():
    x = inputs(D=72)._replace(cos=torch.ones(5, 72), sin=torch.zeros(5, 72))
    with pytest.raises(ValueError, match="no Hadamard matrix of order 18"):
        y = Inputs(*(t[..., :18] for t in x))
        kv_append(*y, SLOT, poisoned(D=18), rotate=True)


def test_backend_that_cannot_says_so():
    pages = poisoned()
    with pytest.raises(RuntimeError, match="cuda: RoPE must turn a multiple of 16 elements"):
        kv_append(*inputs(R=2), SLOT, pages, backend="cuda")
    assert_bitwise(pages.tensors, poisoned().tensors)


@pytest.mark.parametrize("matrix", [None, torch.eye(64)], ids=["hadamard", "matrix"])
def test_registered(matrix):
    assert_registered(KV_APPEND, *(op_arguments(rotate=True) | {"matrix": matrix}).values())


def test_pages_are_frozen():
    with pytest.raises(AttributeError):
        poisoned().bits = 8
    assert replace(poisoned(), bits=8).bits == 8
