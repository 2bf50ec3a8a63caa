"""Every configuration of every Triton kernel, compiled for every architecture without a GPU.

It compiles, fits in shared memory, spills no register and holds the instructions it should.
"""

import importlib
import os
import re
import subprocess

import pytest

from lowbit.ops.dispatch import OPS

triton = pytest.importorskip("triton")

from lowbit.kernels.configs import CONFIGS  # noqa: E402

pytestmark = pytest.mark.slow

# sm_80 A100, sm_89 Ada, sm_90 Hopper, sm_100 Blackwell; bytes of shared memory a block may have
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Where kernels store floats: in bf16 rounded to nearest even, which the interpreter does not show
FLOAT_OUTPUTS = {"y", "y_ptr", "out", "out_ptr", "sum_ptr", "q_out_ptr"}
ALL = [pytest.param(c, id=f"{op}-{c.name}") for op, configs in CONFIGS.items() for c in configs]


def compile_config(config, capability: int):
    from triton.backends.compiler import GPUTarget

    module, function = config.kernel.split(":")
    kernel = getattr(importlib.import_module(f"lowbit.kernels.{module}"), function)
    signature = {name: config.arguments.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(k),): v for k, v in config.constants.items()}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in config.aligned
    }
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attrs)
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": config.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin: bytes, folder) -> int:
    """What the kernel keeps in thread-local memory; spilled registers are all it could be."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)))


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("config", ALL)
def test_compiles(config, capability, tmp_path):
    assert not os.environ.get("TRITON_INTERPRET")
    compiled = compile_config(config, capability)
    assert compiled.metadata.shared <= SHARED[capability]
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0
    ptx = compiled.asm["ptx"]
    for pattern in (*config.expects, *filter(None, (config.units.get(capability),))):
        assert re.search(pattern, ptx), pattern
    stored = {config.arguments.get(name) for name in FLOAT_OUTPUTS}
    if "*bf16" in stored and "parts" not in config.arguments:
        assert re.search(r"(cvt|add|sub|mul|fma)\.rn\.bf16", ptx)  # LLVM may compute in bf16
    for pattern in (*config.forbids, r"cvt\.rz\S*\.(bf16|f16)"):
        assert not re.search(pattern, ptx), pattern


def test_long_rotations_are_compiled_with_the_warps_they_are_launched_with():
    from lowbit.kernels.configs import _ORDERS
    from lowbit.kernels.hadamard import BLOCK, rotation_warps

    long = [o for o in _ORDERS.values() if o[1] * o[2] >= BLOCK]
    assert len(long) >= 8
    for base, base_pad, pow2, _, warps in long:
        assert warps == rotation_warps(base, base_pad * pow2), base


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_kernel_is_compiled(name):
    target = OPS[name].backends["triton"].target
    composed = {"kv_attention_quant"}  # it launches kernels of other ops
    assert (target is not None and name not in composed) == (name in CONFIGS)
