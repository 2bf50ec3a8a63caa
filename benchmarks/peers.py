"""What the ops are compared with, each at its best setting; a peer that is absent has a reason.

Each function makes one: it returns what is timed, a call of no arguments, or the reason.

Weights and caches of peers are random and of the op's sizes; their numbers are not the op's, as
their formats differ.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Peer
from lowbit.hadamard import hadamard_matrix
from lowbit.ops.hadamard import split_order

E4M3 = torch.float8_e4m3fn
INNER_K_TILES = 8  # of torch's int4 matmul: the most it takes, and the fastest


def on_gpu(device: torch.device, capability: tuple[int, int] = (8, 0)) -> str | None:
    """None on a GPU of this compute capability or later, else the reason."""
    if device.type != "cuda":
        return "needs a CUDA device"
    here = torch.cuda.get_device_capability(device)
    if here < capability:
        return f"needs sm_{capability[0]}{capability[1]}, this is sm_{here[0]}{here[1]}"
    return None


def module(name: str) -> str | None:
    """None where a module is installed, else the reason."""
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def compiled(function: Callable, *args) -> Peer:
    """torch.compile of plain PyTorch: what a user has without a kernel."""
    reason = on_gpu(args[0].device)
    if reason is not None:
        return reason
    torch.compiler.reset()  # shapes are constants of a case, not something to generalize over
    run = torch.compile(function, dynamic=False)
    return lambda: run(*args)


def bf16_linear(M: int, N: int, K: int, device) -> Peer:
    x, w = (torch.randn(s, K, device=device, dtype=torch.bfloat16) for s in (M, N))
    return lambda: functional.linear(x, w)


def int_mm(M: int, N: int, K: int, device) -> Peer:
    """int8 x int8 -> int32: nothing is scaled or narrowed."""
    if M <= 16 or N % 8 or K % 8:
        return f"takes M > 16, N and K multiples of 8, got {M}, {N} and {K}"
    x, w = (torch.randint(-127, 128, (s, K), device=device, dtype=torch.int8) for s in (M, N))
    return lambda: torch._int_mm(x, w.T)


def fp8_mm(M: int, N: int, K: int, device) -> Peer:
    """e4m3 x e4m3 -> bf16, scaled per row and per column."""
    reason = on_gpu(device, (8, 9))
    if reason is not None:
        return reason
    if N % 16 or K % 16:
        return f"takes N and K that are multiples of 16, got {N} and {K}"
    x, w = (torch.randn(s, K, device=device).to(E4M3) for s in (M, N))
    scale_x, scale_w = torch.rand(M, 1, device=device), torch.rand(1, N, device=device)
    return lambda: torch._scaled_mm(
        x, w.T, scale_x, scale_w, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def int4_mm(M: int, N: int, K: int, group_size: int | None, device) -> Peer:
    """torch's own bf16 x int4 in groups."""
    reason = on_gpu(device)
    if reason is not None:
        return reason
    if group_size is None:
        return "takes groups of 32 to 256, not one scale a row"
    if N % 8 or K % (16 * INNER_K_TILES):
        return f"takes N % 8 = 0 and K % {16 * INNER_K_TILES} = 0, got {N} and {K}"
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    w = torch.randint(0, 256, (N, K // 2), device=device, dtype=torch.uint8)
    w = torch.ops.aten._convert_weight_to_int4pack(w, INNER_K_TILES)
    scale_and_zero = torch.randn(K // group_size, N, 2, device=device, dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, w, group_size, scale_and_zero)


def gemlite_weight_only(M: int, N: int, K: int, bits: int, group_size: int | None, device) -> Peer:
    """bf16 x grouped integers, its tiles searched for this very shape."""
    reason = on_gpu(device) or module("gemlite")
    if reason is not None:
        return reason
    if group_size is None or bits not in (2, 4, 8):
        return f"timed for groups of 2, 4 or 8 bits, got {bits} bits, group {group_size}"
    gemlite, helper = (importlib.import_module(m) for m in ("gemlite", "gemlite.helper"))
    gemlite.set_autotune("max")
    w = torch.randint(0, 1 << bits, (N, K), device=device, dtype=torch.uint8)
    scale = torch.rand(N, K // group_size, device=device, dtype=torch.bfloat16)
    zero = torch.full_like(scale, 1 << (bits - 1))
    kind = helper.A16Wn(device=str(device), dtype=torch.bfloat16)
    linear = kind.from_weights(w, scale, zero, bits, group_size)
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    return lambda: linear(x)


def gemlite_w8a8(M: int, N: int, K: int, device) -> Peer:
    """bf16 x, quantized to int8 per row in the call, times int8; tiles searched for this shape."""
    reason = on_gpu(device) or module("gemlite")
    if reason is not None:
        return reason
    gemlite, helper = (importlib.import_module(m) for m in ("gemlite", "gemlite.helper"))
    gemlite.set_autotune("max")
    w = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    linear = helper.A8W8_int8_dynamic(device=str(device)).from_weights(w)
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    return lambda: linear(x)


def rotation(x: Tensor, order: int, inner: int) -> Callable[[Tensor], Tensor]:
    """x -> x rotated as hadamard does, in x's dtype: a matrix product for each Kronecker factor."""
    base, power = split_order(order, None)
    half = 1 << (power.bit_length() - 1) // 2
    factors = [n for n in (base, half, power // half) if n > 1]
    matrices = [(hadamard_matrix(n) * n**-0.5).to(x.device, x.dtype) for n in factors]

    def run(x: Tensor) -> Tensor:
        y, distance = x, inner
        for matrix in reversed(matrices):
            n = len(matrix)
            blocks = y.reshape(-1, n) if distance == 1 else y.reshape(-1, n, distance)
            y = blocks @ matrix if distance == 1 else matrix.T @ blocks
            distance *= n
        return y.view(x.shape)

    return run


def in_factors(x: Tensor, order: int, inner: int) -> Peer:
    rotate = rotation(x, order, inner)
    return lambda: rotate(x)


def fast_hadamard(x: Tensor, order: int, inner: int, then: Callable = lambda y: y) -> Peer:
    """fast-hadamard-transform over blocks of `order`, and what follows it."""
    name = "fast_hadamard_transform"
    reason = on_gpu(x.device) or module(name)
    if reason is not None:
        return reason
    if inner > 1:
        return "rotates neighbours, not elements at a distance"
    base, power = split_order(order, None)
    kernels = {1: "", 12: "_12N", 20: "_20N", 28: "_28N", 40: "_40N"}
    if base not in kernels or power > 32768:
        return f"has no order {order} = {base} x {power}"
    transform = getattr(importlib.import_module(name), f"hadamard_transform{kernels[base]}")
    blocks, factor = x.view(-1, order), order**-0.5
    return lambda: then(transform(blocks, factor).view(x.shape))


def sdpa(
    batch: int,
    queries: int,
    context: int,
    heads: tuple[int, int, int],
    device,
    backend: SDPBackend,
    group_as_rows: bool = False,
) -> Peer:
    """torch's attention over a dense bf16 cache; heads: (num_q_heads, num_kv_heads, D).

    One query of each sequence, or as many as the context has tokens, then causal. group_as_rows:
    the query heads of a KV head are given as so many queries of one head, so that its K and V are
    read once.
    """
    reason = on_gpu(device)
    if reason is not None:
        return reason
    num_q_heads, num_kv_heads, head_dim = heads
    options = {"device": device, "dtype": torch.bfloat16}
    q = torch.randn(batch, num_q_heads, queries, head_dim, **options)
    k, v = torch.randn(2, batch, num_kv_heads, context, head_dim, **options)
    enable_gqa = num_q_heads != num_kv_heads and not group_as_rows
    if group_as_rows:
        q = q.view(batch, num_kv_heads, -1, head_dim)

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=queries > 1, enable_gqa=enable_gqa
            )

    return run
