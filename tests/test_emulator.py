"""The emulator itself: it computes what the PTX ISA's tables say, and finds kernels that are wrong.

The tables are written out here once more, from the ISA ("Matrix fragments for mma.m16n8k32" and its
siblings, "Register fragments for wgmma.mma_async.m64nNk32"), not taken from csrc.
"""

import ctypes
import subprocess

import emulator
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

PROGRAMS = r"""
#include <stdexcept>
#include <string>
#include "common/wgmma.cuh"
using namespace lowbit;

template <class Body>
static std::string run_block(int threads, int smem_bytes, Body body) {
  try {
    emulator::run({dim3(1), dim3(threads), 1, smem_bytes}, body);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "ok";
}

extern "C" const char* mistake(int which) {
  static std::string text;
  text = run_block(64, 2048, [=] {
    uint8_t* smem = dynamic_smem();
    const uint32_t barrier = smem_address(smem + 1024);
    static const uint4 source = {1, 2, 3, 4};
    if (which == 0 && threadIdx.x < 32) sync_block();
    if (which == 1) {
      if (threadIdx.x % 2) shuffle_xor(1, 1);
      else sync_warp();
    }
    if (which == 2) cp_async_16(smem_address(smem), &source), cp_async_commit();
    if (which == 3) load_shared_16(smem_address(smem) + 8);
    if (which == 4) load_shared_16(smem_address(smem) + 2048);
    if (which >= 5) {  // one thread copies, all read: with the wait left out, or not
      if (threadIdx.x == 0) mbarrier_init(barrier, 1);
      sync_block();
      if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, 16);
        bulk_load(smem_address(smem), &source, 16, barrier);
      }
      if (which == 6) mbarrier_wait(barrier, 0);
      if (load_shared_16(smem_address(smem)).w != 4) throw std::runtime_error("poison");
    }
  });
  return text.c_str();
}

// d[lane][4] += of registers a[lane][4], b[lane][2]
extern "C" void mma(int bits, bool is_unsigned, int32_t* d, const uint32_t* a, const uint32_t* b) {
  run_block(32, 16, [=] {
    const int lane = threadIdx.x;
    auto& ds = reinterpret_cast<int32_t(&)[4]>(d[4 * lane]);
    const auto& as = reinterpret_cast<const uint32_t(&)[4]>(a[4 * lane]);
    const auto& bs = reinterpret_cast<const uint32_t(&)[2]>(b[2 * lane]);
    if (bits == 8) is_unsigned ? mma_s8<true>(ds, as, bs) : mma_s8<false>(ds, as, bs);
    if (bits == 4) is_unsigned ? mma_s4<true>(ds, as, bs) : mma_s4<false>(ds, as, bs);
  });
}

// d[thread][8] = of a[thread][4] and 16 rows of 128 bytes, swizzled, columns 32 .. 63
extern "C" void wgmma(int32_t* d, const uint32_t* a, const uint8_t* rows) {
  run_block(128, 2048, [=] {
    uint8_t* smem = dynamic_smem();
    for (int i = threadIdx.x; i < 2048; i += 128) smem[i] = rows[i];
    sync_block();
    int32_t sums[8];
    wgmma_s8<16, false>(sums, reinterpret_cast<const uint32_t(&)[4]>(a[4 * threadIdx.x]),
                        wgmma_descriptor(smem_address(smem) + 32), false);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < 8; ++i) d[8 * threadIdx.x + i] = sums[i];
  });
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "programs.cpp").write_text(PROGRAMS)
    include = ("-I", emulator.ROOT / "csrc", "-I", emulator.cuda_include())
    sources = (folder / "programs.cpp", emulator.ROOT / "csrc/emulator/runtime.cpp")
    flags = [f for f in emulator.FLAGS.split() if "TORCH" not in f]
    out = folder / "programs.so"
    subprocess.run(["g++", *flags, "-shared", *include, *sources, "-o", out], check=True)
    library = ctypes.CDLL(str(out))
    library.mistake.restype = ctypes.c_char_p
    return library


MISTAKES = [  # what is said of mistake(0), mistake(1), ...
    "deadlock: 32 threads in bar.sync",
    "other lanes of the group are in",
    "did not wait for",
    "ld.shared.v4: shared address 8 is not aligned",
    "ld.shared.v4: shared address 2048 + 16 is past 2048",
    "poison",
    "ok",
]


@pytest.mark.parametrize("which", range(len(MISTAKES)))
def test_mistakes_are_found(programs, which):
    assert MISTAKES[which] in programs.mistake(which).decode()


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def registers(elements: np.ndarray, bits: int) -> np.ndarray:
    """uint32 of [..., 32 / bits] integers, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    words = (elements.astype(np.int64).astype(np.uint64) & np.uint64((1 << bits) - 1)) << shifts
    return np.bitwise_or.reduce(words, -1).astype(np.uint32)


@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mma(programs, bits, is_unsigned):
    K, per = {4: (64, 8), 8: (32, 4)}[bits]
    random, half = np.random.default_rng(0), 1 << (bits - 1)
    A = random.integers(-half, half, (16, K))
    B = random.integers(0, 2 * half, (K, 8)) - (0 if is_unsigned else half)
    a, b = np.zeros((32, 4, per), int), np.zeros((32, 2, per), int)
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for e in range(4 * per):  # a_e of the ISA
            row = group if e < per or 2 * per <= e < 3 * per else group + 8
            column = thread * per + e % per + (K // 2 if e >= 2 * per else 0)
            a[lane, e // per, e % per] = A[row, column]
        for e in range(2 * per):
            row = thread * per + e % per + (K // 2 if e >= per else 0)
            b[lane, e // per, e % per] = B[row, group]
    d = np.ones((32, 4), np.int32)
    operands = registers(a, bits), registers(b, bits)
    programs.mma(bits, is_unsigned, pointer(d), *map(pointer, operands))
    expected = A @ B + 1
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (0 if i < 2 else 8), 2 * (lane & 3) + (i & 1)
            assert d[lane, i] == expected[row, column]


def test_wgmma(programs):
    random = np.random.default_rng(0)
    A, X = random.integers(-128, 128, (64, 32)), random.integers(-128, 128, (16, 128))
    a = np.zeros((128, 4, 4), int)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            for e in range(4):
                row = 16 * warp + lane // 4 + 8 * (i % 2)
                a[thread, i, e] = A[row, 4 * (lane % 4) + e + 16 * (i // 2)]
    swizzled = np.zeros((16, 8, 16), np.uint8)  # rows of 8 pieces of 16 bytes
    for row in range(16):
        for piece in range(8):
            values = X[row, 16 * piece : 16 * piece + 16].astype(np.int8).view(np.uint8)
            swizzled[row, piece ^ (row % 8)] = values
    d = np.zeros((128, 8), np.int32)
    words = registers(a, 8)
    programs.wgmma(pointer(d), pointer(words), pointer(swizzled))
    expected = A @ X[:, 32:64].T
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            assert d[thread, i] == expected[row, 8 * (i // 4) + 2 * (lane % 4) + i % 2]
