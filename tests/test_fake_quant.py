"""The simulation against the packed model, bit for bit, and against the textbook formula."""

import copy

import pytest
import torch
from helpers import assert_bitwise
from models import tiny_llama, tiny_tokens
from packed import pack_weight, packed_llama
from transformers import DynamicCache

from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import FakeQuantLinear, fake_quantize, rotate, to_fake
from lowbit.formats import IntFormat
from lowbit.hadamard import hadamard_matrix
from lowbit.nn import QuantLinear
from lowbit.nn.online_map import OnlineMap
from lowbit.ops import dequantize, quantize
from lowbit.transforms.online import OnlineTransform

FORMATS = ["w4a4kv4", "w4a8kv4", "w8a8", "w4a16g32", "w3a16g32-wasym", "w4a8kv4g32"]
FORMATS += ["w4a4kv4-aasym", "w6a6kv3", "w16a16kv4", "w4a8g32-wtwolevel"]
GRIDS = [IntFormat(bits, symmetric) for bits in (2, 3, 4, 6, 8) for symmetric in (True, False)]


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("kind", [None, "hadamard", "hartley"])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_packed_and_fake_give_the_same_bits(format, kind, clip):
    packed, ids = packed_llama(format, kind, clip, bias=True), tiny_tokens(2, 48)
    got = packed(ids).logits
    assert_bitwise(got, to_fake(packed)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "hadamard", "hartley"])
@pytest.mark.parametrize("format", [f for f in FORMATS if not f.startswith("w16")])
def test_linear_is_the_textbook_one(format, kind):
    """Dense rotation, both operands dequantized, one product, in fp64: what papers write down.

    fp32 sums of 96 products differ by 1e-6; a code that flips moves its row by one step.
    """
    linear = packed_llama(format, kind, bias=True).model.layers[0].mlp.down_proj
    x = torch.randn(400, linear.in_features, generator=torch.Generator().manual_seed(3))
    got, y = FakeQuantLinear(linear)(x), x.double()
    if kind is not None:
        y = y @ linear.transform.dense()
    if linear.activation_format is not None:
        y = fake_quantize(y, linear.activation_format)
    weight = dequantize(linear.packed_weight, torch.float64)
    expected = y @ weight.T + linear.bias.double()
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 2e-6 and (error > 2e-6).float().mean() <= 0.01


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clip", [1.0, 0.83])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_formula_is_the_quantizer(grid, clip, scale_dtype):
    """Bit for bit: both divide by the stored scale and round half to even."""
    torch.manual_seed(0)
    x = torch.randn(500, 64) * torch.logspace(-3, 3, 500)[:, None]
    x[0], x[1, 1:], x[2] = 0, 0, x[2].abs()
    expected = dequantize(quantize(x, grid, clip, scale_dtype=scale_dtype))
    got = fake_quantize(x, grid, clip, scale_dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "transform",
    [OnlineTransform("hadamard", 12, 8), OnlineTransform("hadamard", 96), None]
    + [OnlineTransform("hartley", 9, 16), OnlineTransform("hartley", 24)],
    ids=str,
)
def test_rotation_is_the_dense_product(transform):
    K = 96 if transform is None or transform.order % 9 else 144
    x = torch.randn(20, K)
    expected = x.double()
    if transform is not None:
        blocks = expected.unflatten(-1, (-1, transform.order, transform.inner))
        expected = torch.einsum("...ai,ab->...bi", blocks, transform.dense()).flatten(-3)
    rotation = None if transform is None else OnlineMap(transform)
    torch.testing.assert_close(rotate(x, rotation).double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("transform", [None, OnlineTransform("hadamard", 64)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_is_identical_on_exact_inputs(bits, transform):
    """Integers at scale 1, and weights at a power of two: every fp32 sum is exact in any order."""
    torch.manual_seed(0)
    grid = IntFormat(bits)
    x = torch.randint(grid.qmin + 1, grid.qmax + 1, (30, 64)).float()
    x[:, 0] = grid.qmax
    if transform is not None:  # H / 8 has entries of 1/8: x H^T / 8 is exact, and rotates back to x
        x = x @ hadamard_matrix(64).float().T / 8
    weight = torch.randint(-7, 8, (24, 64)) * 0.25
    weight[:, 0] = 7 * 0.25
    linear = QuantLinear.from_packed(
        pack_weight(weight, IntFormat(4)), torch.randn(24), grid, 1.0, transform
    )
    assert torch.equal(FakeQuantLinear(linear)(x), linear(x))


@torch.no_grad()
def test_codes_of_inputs_agree():
    """Codes within a step on 1e-4 of elements of those of the dense rotation in fp64."""
    torch.manual_seed(0)
    for transform in (OnlineTransform("hadamard", 96), OnlineTransform("hartley", 96)):
        grid = IntFormat(4)
        linear = QuantLinear.from_packed(pack_weight(torch.randn(8, 96), grid), None, grid)
        linear.rotation = OnlineMap(transform)
        x = torch.randn(4000, 96)
        packed = linear.quantize_input(x)
        dense = (x.double() @ transform.dense()).float()
        got, step = fake_quantize(dense, grid), packed.scale
        steps = ((got - dequantize(packed)) / step).abs()
        assert steps.max() < 1.001 and (steps > 1e-3).float().mean() < 1e-4


@torch.no_grad()
def test_ordinary_modules_and_caches_again():
    packed = packed_llama("w4a4kv4", bias=True)
    original = copy.deepcopy(packed)
    ids = tiny_tokens(2, 20)
    expected = original(ids).logits
    fake = to_fake(packed)
    assert fake is packed
    plain, block = tiny_llama().model.layers[0], fake.model.layers[0]
    assert type(block.self_attn) is type(plain.self_attn) and type(block.mlp) is type(plain.mlp)
    assert isinstance(block.mlp.up_proj, FakeQuantLinear)
    assert not any(p.is_meta for p in fake.parameters())
    out = fake(ids)
    assert type(out.past_key_values) is DynamicCache
    cache = DynamicCache()
    parts = [fake(part, past_key_values=cache).logits for part in ids.split((13, 7), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), out.logits, rtol=0, atol=1e-4)
    # the copy keeps its own hook, cache and implementation
    assert torch.equal(original(ids).logits, expected)
    assert type(original(ids).past_key_values).__name__ == "QuantKVCache"


@torch.no_grad()
def test_padded_batches_generate_the_same_tokens():
    packed = packed_llama("w8a8kv8")
    ids, mask = tiny_tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = packed.generate(ids, **options)
    assert torch.equal(to_fake(packed).generate(ids, **options), expected)


def test_a_float_model_is_refused():
    with pytest.raises(InputError, match="needs a packed model"):
        to_fake(tiny_llama())
