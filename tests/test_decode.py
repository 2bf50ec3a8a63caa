"""Formats by phase: few rows weight-only on the weights of a model that quantizes its inputs."""

import copy

import pytest
import torch
from helpers import assert_bitwise, assert_same_logits
from models import tiny_config, tiny_llama, tiny_model, tiny_tokens
from packed import DECODING_FLOAT, launches_of, pack_weight, packed_llama, pretend_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig

import lowbit
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import FakeQuantLinear, to_fake
from lowbit.formats import IntFormat, Layout
from lowbit.nn import QuantLinear, fuse, set_decode, unfuse
from lowbit.nn.decode import DECODE_ROWS, Decode
from lowbit.nn.swap import set_backend
from lowbit.ops import hadamard, weight_only_gemm
from lowbit.transforms.online import OnlineTransform

# format -> the one that few rows run
FORMATS = {
    "w4a4kv4": "w4a16",
    "w4a8kv4": "w4a16",
    "w8a8": "w8a16",
    "w6a6kv3": "w6a16",
    "w4a4kv4-aasym": "w4a16",
    "w4a8kv4g32": "w4a16g32",
}
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_heads": 2, "num_kv_heads": 1}


class Ops(TorchDispatchMode):
    """Names of lowbit's ops that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lowbit":
            self.names.append(func._schema.name.removeprefix("lowbit::"))
        return func(*args, **(kwargs or {}))


def decoding(format: str = "w4a4kv4", rows: int = DECODE_ROWS, kind="hadamard", **sizes):
    model = packed_llama(format, kind, bias=True, **sizes)
    set_decode(model, FORMATS[format], rows)
    return model


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the last as a prompt, then of the last one, from the cache."""
    prompt = model(tokens[:, :-1], use_cache=True)
    last = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
    return torch.cat((prompt.logits, last.logits), 1)


# ---- one linear


@pytest.mark.parametrize("rotation", [None, OnlineTransform("hadamard", 96)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_are_rotated_and_not_quantized(bits, rotation):
    torch.manual_seed(0)
    weight = pack_weight(torch.randn(24, 96), IntFormat(bits))
    linear = QuantLinear.from_packed(weight, torch.randn(24), IntFormat(4), 1.0, rotation)
    for shape in ((1, 96), (5, 96), (2, 2, 96), (96,)):
        x = torch.randn(shape)
        quantized = linear(x)
        linear.decode_rows = 5
        rotated = x if rotation is None else hadamard(x, 96, 1, None)
        assert_bitwise(linear(x), weight_only_gemm(rotated, weight, linear.bias))
        residual = torch.randn(*shape[:-1], 24)
        assert_bitwise(linear(x, residual), linear(x) + residual)
        assert not torch.equal(linear(x), quantized)
        assert_bitwise(linear(linear.quantize_input(x)), quantized)
        linear.decode_rows = 0


def test_rows_are_those_of_all_sequences():
    linear = QuantLinear.from_packed(
        pack_weight(torch.randn(8, 96), IntFormat(4)), None, IntFormat(4)
    )
    linear.decode_rows = 6
    shapes = {(6, 96): False, (7, 96): True, (2, 3, 96): False, (2, 4, 96): True, (0, 96): True}
    for shape, quantizes in shapes.items():
        assert linear.quantizes(torch.empty(shape)) is quantizes, shape
    linear.decode_rows = 0
    assert linear.quantizes(torch.empty(1, 96)) and linear.quantizes(torch.empty(0, 96))


def test_one_graph_for_each_of_the_two():
    linear = QuantLinear.from_packed(
        pack_weight(torch.randn(8, 96), IntFormat(4)), None, IntFormat(4)
    )
    linear.decode_rows = 4
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 4, 5, 9):
        x = torch.randn(rows, 96)
        assert_bitwise(compiled(x), linear(x))


# ---- a model: packed, fused, simulated


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "hadamard", "hartley"])
@EACH_FORMAT
def test_packed_and_fake_give_the_same_bits(format, kind):
    packed, tokens = decoding(format, 48, kind), tiny_tokens(2, 24)
    quantized = packed_llama(format, kind, bias=True)(tokens).logits
    got = packed(tokens).logits
    assert not torch.equal(got, quantized)
    assert_bitwise(got, to_fake(packed)(tokens).logits)


@torch.no_grad()
@EACH_FORMAT
def test_prompts_are_as_they_were(format):
    """48 rows, and a limit of 47: the bits of a model without it, packed and simulated."""
    tokens, packed = tiny_tokens(2, 24), decoding(format, 47)
    expected = packed_llama(format, bias=True)(tokens).logits
    assert_bitwise(packed(tokens).logits, expected)
    assert_bitwise(fuse(copy.deepcopy(packed))(tokens).logits, expected)
    assert_bitwise(to_fake(packed)(tokens).logits, expected)


@EACH_FORMAT
def test_a_token_after_a_prompt(format):
    """Its prompt quantized, the token not: packed, fused and simulated."""
    packed, tokens = decoding(format, 2), tiny_tokens(2, 24)
    got, plain = logits_of(packed, tokens), logits_of(packed_llama(format, bias=True), tokens)
    assert_bitwise(got[:, :-1], plain[:, :-1])
    assert (got[:, -1] != plain[:, -1]).any()
    assert_bitwise(logits_of(fuse(copy.deepcopy(packed)), tokens), got)
    assert_bitwise(logits_of(unfuse(fuse(copy.deepcopy(packed))), tokens), got)
    simulated = logits_of(to_fake(packed), tokens)
    torch.testing.assert_close(simulated, got, rtol=0, atol=1e-4)  # another order of keys


def test_nearer_to_full_precision():
    tokens, exact = tiny_tokens(1, 8), tiny_llama(bias=True)
    model = packed_llama("w8a4", bias=True)
    with torch.no_grad():
        expected = exact(tokens).logits
        before = (model(tokens).logits - expected).norm()
        set_decode(model, "w8a16")
        assert (model(tokens).logits - expected).norm() < before


@pytest.mark.parametrize("recipe", ["flatquant-rtn", "duarot-rtn"])
def test_rotations_in_front_of_every_linear(recipe):
    short = {"flatquant-rtn": "flattening.epochs=1", "duarot-rtn": "training.steps=1"}
    method = lowbit.recipes.overridden(lowbit.RECIPES[recipe], [short[recipe]])
    calibration, tokens = tiny_tokens(8, 32), tiny_tokens(2, 12)
    model = lowbit.quantize(tiny_llama(), method, "w4a4kv4", calibration, progress=False)
    set_decode(model, "w4a16", 24)
    expected = logits_of(model, tokens)
    assert_bitwise(logits_of(fuse(copy.deepcopy(model)), tokens), expected)
    torch.testing.assert_close(logits_of(to_fake(model), tokens), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("format", ["w4a4kv4", "w8a8kv8"])
def test_padded_batches_generate_the_same_tokens(format):
    packed = packed_llama(format)
    set_decode(packed, f"{format[:2]}a16", 3)
    tokens = tiny_tokens(3, 12)
    prompt = {"attention_mask": torch.ones(3, 12).tril(9).flip(1).long(), "max_new_tokens": 12}
    prompt |= {"do_sample": False, "pad_token_id": 0}
    with Ops() as seen:
        expected = packed.generate(tokens, **prompt)
    assert {"int_gemm", "weight_only_gemm"} <= set(seen.names)
    assert torch.equal(fuse(copy.deepcopy(packed)).generate(tokens, **prompt), expected)
    assert torch.equal(to_fake(packed).generate(tokens, **prompt), expected)


@torch.no_grad()
def test_launches_of_a_decoding_layer(monkeypatch):
    """Beside its two norms: torch has a kernel for one on a GPU, and several here."""
    monkeypatch.setattr("lowbit.nn.fused.rms_norm", lambda x, *_: x)
    model = packed_llama(num_layers=2)
    set_decode(model, "w4a16")
    tokens = tiny_tokens(1, 9)
    cache = fuse(model)(tokens[:, :-1], use_cache=True).past_key_values
    seen = launches_of(model.model.layers[1])
    model(tokens[:, -1:], past_key_values=cache)
    assert tuple(seen.names) == DECODING_FLOAT


# ---- what it leaves alone, and what it refuses


def test_loaded_and_saved(tmp_path):
    model = packed_llama(bias=True)
    lowbit.save(model, tmp_path / "m")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for fused in (True, False):
        loaded = lowbit.load(tmp_path / "m", fused=fused, decode="w4a16", decode_rows=3)
        assert loaded.lowbit_decode == Decode("w4a16", 3)
        linears = [m for m in loaded.modules() if isinstance(m, QuantLinear)]
        assert {m.decode_rows for m in linears} == {3}
        assert all("float up to 3 rows" in repr(m) for m in linears)
        assert_bitwise(list(loaded.state_dict().values()), list(expected.values()))
        lowbit.save(loaded, tmp_path / "again", overwrite=True)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    assert lowbit.load(tmp_path / "m", decode="w4a16").lowbit_decode.rows == DECODE_ROWS
    plain = lowbit.load(tmp_path / "m")
    assert plain.lowbit_decode is None and "rows" not in repr(plain)
    with pytest.raises(InputError, match="decode_rows needs decode, such as 'w4a16', got 3 alone"):
        lowbit.load(tmp_path / "m", decode_rows=3)
    with pytest.raises(InputError, match="decode must be 'w4a16', .* got 'w8a16'"):
        lowbit.load(tmp_path / "m", decode="w8a16")


def test_set_and_unset():
    model, tokens = packed_llama(), tiny_tokens(1, 5)
    expected = logits_of(model, tokens)
    set_decode(fuse(model), "w4a16")
    assert not torch.equal(logits_of(model, tokens), expected)
    set_decode(model, None)
    assert_bitwise(logits_of(model, tokens), expected)


@pytest.mark.parametrize(
    ("format", "decode", "rows", "message"),
    [
        ("w4a4kv4", "w8a16", 8, "decode must be 'w4a16', the weights of w4a4kv4 .* got 'w8a16'"),
        ("w4a4kv4", "w4a16kv4", 8, "decode must be 'w4a16', .* got 'w4a16kv4'"),
        ("w4a4kv4", "w4a16g32", 8, "decode must be 'w4a16', .* got 'w4a16g32'"),
        ("w4a8g32", "w4a16", 8, "decode must be 'w4a16g32', the weights of w4a8g32"),
        ("w4a4kv4", "w4a4", 8, "decode must be 'w4a16', .* got 'w4a4'"),
        (
            "w4a16g32",
            "w4a16g32",
            8,
            "decode must be None for a model whose linears do not quantize",
        ),
        ("w4a8g32-wtwolevel", "w4a16g32", 8, "None for integer group scales, .* got 'w4a16g32'"),
        ("w4a4kv4", "w4a16", 0, "decode_rows must be at least 1, got 0"),
        ("w4a4kv4", "w4a16", -1, "decode_rows must be at least 1, got -1"),
    ],
)
def test_refused(format, decode, rows, message):
    model = packed_llama(format)
    with pytest.raises(InputError, match=message):
        set_decode(model, decode, rows)
    assert model.lowbit_decode is None
    assert {m.decode_rows for m in model.modules() if isinstance(m, QuantLinear)} == {0}


def test_experts_are_refused():
    config = tiny_config(MixtralConfig, num_local_experts=4, sliding_window=None)
    model = lowbit.quantize(tiny_model(config), "rtn", "w4a4", progress=False)
    with pytest.raises(InputError, match="None for a model of experts, .* got 'w4a16'"):
        set_decode(model, "w4a16")


def test_a_simulation_is_refused():
    with pytest.raises(InputError, match="decode must be None for a model whose linears"):
        set_decode(to_fake(packed_llama()), "w4a16")


# ---- kernels


@torch.no_grad()
@pytest.mark.parametrize(
    "format, sm, layout",
    [("w4a4kv4", 90, Layout.FRAGMENT), ("w4a4kv4", 80, Layout.FRAGMENT_INT4)]
    + [("w8a8", 80, Layout.FRAGMENT)],
)
def test_one_layout_serves_both(format, sm, layout, monkeypatch):
    model = decoding(format, 2, **SIZES).bfloat16()
    tokens = tiny_tokens(2, 9)
    expected = logits_of(model, tokens)
    calls = pretend_cuda(monkeypatch, sm)
    set_backend(model, None)
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {m.layout for m in linears} == {layout}
    calls.clear()
    assert_bitwise(logits_of(model, tokens), expected)
    assert {w_layout for w_layout, _ in calls} == {layout}
    with pytest.raises(
        InputError, match="decode needs a kernel .*: the CUDA kernel takes x of fp16"
    ):
        model.float()


def test_refused_where_a_kernel_lacks_the_product(monkeypatch):
    """And then as if it had not been asked for."""
    model = packed_llama(**SIZES)
    pretend_cuda(monkeypatch, 90)
    set_backend(model, None)
    with pytest.raises(InputError, match="takes x of fp16 or bf16, got torch.float32"):
        set_decode(model, "w4a16")
    linear = model.model.layers[0].mlp.up_proj
    assert linear.layout is Layout.FRAGMENT and linear.decode_rows == 0
    assert model.lowbit_decode is None


@torch.no_grad()
@pytest.mark.interpret
@pytest.mark.parametrize("format", ["w4a4kv4", "w8a8kv8", "w4a8kv4g32"])
def test_on_triton(format):
    model, tokens = packed_llama(format, **SIZES), tiny_tokens(2, 9)
    set_decode(model, f"{format[:2]}a16" + ("g32" if "g32" in format else ""), 2)
    set_backend(fuse(model), "reference")
    expected = logits_of(model, tokens)
    set_backend(model, "triton")
    assert_same_logits(logits_of(model, tokens), expected)


def test_simulated_linear_dequantizes():
    linear = decoding("w4a8kv4g32", 4).model.layers[0].mlp.down_proj
    x = torch.randn(4, linear.in_features)
    torch.testing.assert_close(FakeQuantLinear(linear)(x), linear(x), rtol=0, atol=1e-6)
