"""QuantLinear: what its ops get, what it saves, what it refuses."""

import pytest
import torch
from packed import pack_weight

from lowbit.errors import InputError
from lowbit.formats import IntFormat, Layout, PackedTensor
from lowbit.nn import QuantLinear
from lowbit.nn.linear import check_same_input, shared_input
from lowbit.ops import dequantize, hadamard, int_gemm, quantize, weight_only_gemm
from lowbit.transforms.online import OnlineTransform

INT4, INT8, ASYM4 = IntFormat(4), IntFormat(8), IntFormat(4, symmetric=False)
HADAMARD, HARTLEY = OnlineTransform("hadamard", 12, 4), OnlineTransform("hartley", 3, 16)
N, K = 24, 96


def packed(format=INT4, seed=0):
    torch.manual_seed(seed)
    return pack_weight(torch.randn(N, K), format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transform", [None, HADAMARD, HARTLEY], ids=str)
@pytest.mark.parametrize("activation", [INT4, IntFormat(8, symmetric=False)], ids=str)
def test_quantized_input_is_one_gemm_over_codes(activation, transform, dtype):
    weight, bias = packed(), torch.randn(N)
    linear = QuantLinear.from_packed(weight, bias, activation, 0.9, transform, dtype)
    x = torch.randn(2, 5, K, dtype=dtype)
    y = linear(x)
    rotated = x.float()
    if transform is not None:
        rotated = hadamard(rotated, transform.order, transform.inner, transform.matrix)
    expected = int_gemm(quantize(rotated, activation, 0.9), weight, bias.to(dtype), dtype)
    assert y.dtype == dtype and y.shape == (2, 5, N)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize("transform", [None, HADAMARD, HARTLEY], ids=str)
def test_weight_only(transform):
    weight, bias = packed(IntFormat(3, False, 32)), torch.randn(N)
    linear = QuantLinear.from_packed(weight, bias, transform=transform)
    x = torch.randn(2, 5, K)
    rotated = x
    if transform is not None:
        rotated = hadamard(x, transform.order, transform.inner, transform.matrix)
    torch.testing.assert_close(linear(x), weight_only_gemm(rotated, weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(
        linear(x), torch.nn.functional.linear(rotated, dequantize(weight), bias)
    )


def test_shared_input_is_quantized_once():
    q, k = (QuantLinear.from_packed(packed(seed=s), None, INT8, 0.9, HADAMARD) for s in (0, 1))
    x = torch.randn(7, K)
    shared = shared_input(q, x)
    assert isinstance(shared, PackedTensor)
    assert torch.equal(q(shared), q(x)) and torch.equal(k(shared), k(x))
    weight_only = QuantLinear.from_packed(packed())
    assert shared_input(weight_only, x) is x
    assert shared_input(torch.nn.Linear(K, N), x) is x
    check_same_input("attention", q, k)
    other = QuantLinear.from_packed(packed(), None, INT8, 0.9, HARTLEY)
    with pytest.raises(InputError, match="attention that share an input must rotate"):
        check_same_input("attention", q, other)


@pytest.mark.parametrize(
    "format, scale_dtype",
    [(INT4, torch.float32), (IntFormat(4, True, 32), torch.float16), (ASYM4, torch.float32)],
    ids=str,
)
def test_state_dict_round_trip(format, scale_dtype):
    weight = packed(format)
    linear = QuantLinear.from_packed(weight, torch.randn(N))
    state = linear.state_dict()
    expected = {"codes", "scale", "bias"} | (set() if format.symmetric else {"zero_point"})
    assert set(state) == expected and state["scale"].dtype == scale_dtype
    assert state["codes"].shape == (N, K * format.storage_bits // 8)
    with torch.device("meta"):
        empty = QuantLinear(K, N, format, bias=True)
    assert all(p.is_meta and not p.requires_grad for p in empty.parameters())
    empty.load_state_dict(state, assign=True)
    x = torch.randn(3, K)
    assert torch.equal(empty(x), linear(x))
    assert linear.packed_weight.layout is Layout.ROW_MAJOR


def test_dtype_changes_never_touch_scales():
    linear = QuantLinear.from_packed(packed(), torch.randn(N), INT8)
    scale = linear.scale.clone()
    linear.to(torch.bfloat16)
    assert torch.equal(linear.scale, scale) and linear.scale.dtype == torch.float32
    assert linear.bias.dtype == linear.dtype == torch.bfloat16
    assert linear(linear.quantize_input(torch.randn(3, K))).dtype == torch.bfloat16
    assert linear.to("meta").scale.is_meta


def test_bad_input_is_named():
    with pytest.raises(InputError, match="group_size must divide the row length 96"):
        QuantLinear(K, N, IntFormat(4, True, 64))
    with pytest.raises(InputError, match="must divide in_features 96, got order 28 x inner 4"):
        QuantLinear(K, N, INT4, transform=OnlineTransform("hadamard", 28, 4))
    linear = QuantLinear(K, N, INT4)
    with pytest.raises(InputError, match="packed weight must be"):
        linear.assign(packed(INT8))
    narrowed = quantize(torch.randn(N, K), INT4, 1.0, Layout.ROW_MAJOR, torch.float16)
    with pytest.raises(InputError, match="torch.float32.*got.*torch.float16"):
        linear.assign(narrowed)
    with pytest.raises(ValueError, match="this layer is weight-only"):
        linear.quantize_input(torch.randn(3, K))


def test_backend_is_handed_to_the_ops():
    linear = QuantLinear.from_packed(packed(), None, INT4)
    linear.backend = "cuda"
    with pytest.raises(RuntimeError, match="'cuda' was asked for"):
        linear(torch.randn(3, K))


def test_repr_says_what_it_is():
    text = repr(QuantLinear.from_packed(packed(), None, ASYM4, transform=HADAMARD))
    assert "weight=int4, activation=int4-asym, rotation=hadamard(order=12, inner=4)" in text
