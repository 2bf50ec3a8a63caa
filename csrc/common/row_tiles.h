// SPDX-License-Identifier: Apache-2.0
// Kernels whose rows lie in registers: the tiles that hold rows, launches, and the registry.
//
// An op names its kernels as
//
//   struct Kernels {
//     template <class T, class Tile>  // a float type, a RowTile
//     static auto of() { return &op_kernel<T, Tile>; }
//   };
#pragma once

#include "common/launch.h"
#include "common/quantizer.cuh"

namespace lowbit {

// A row belongs to kThreads threads, which hold kVectors vectors each: a warp, kWarpRows of them a
// block, or a block. Its warps share kWarpBytes each.
template <int kThreads_, int kVectors_, int kWarpRows, int kWarpBytes>
struct RowTile {
  static constexpr int kThreads = kThreads_, kVectors = kVectors_;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kWarps == 1 ? kWarpRows : 1;  // of a block
  static constexpr int kBlock = kThreads * kRows;
  static constexpr int kLongest = kThreads * kVectors * kVector;
  static constexpr int kSmemBytes = kWarps * kWarpBytes;
  static_assert(kBlock <= 1024, "a block has at most 1024 threads");
};

template <class... Tiles>
struct RowTiles {};  // in ascending order of the rows they hold

// Launches the kernel of T and of the first tile that holds a row; `arguments` are the kernel's.
template <class T, class Kernels, class... Tiles, class... Arguments>
void launch_rows(const char* op, RowTiles<Tiles...>, int device, int64_t rows, int64_t length,
                 const Arguments&... arguments) {
  const auto launch_with = [&](auto tile) {
    using Tile = decltype(tile);
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(rows, Tile::kRows));
    launch({op, text("rows=", rows, " length=", length), device, dim3(blocks), Tile::kBlock,
            Tile::kSmemBytes},
           Kernels::template of<T, Tile>(), arguments...);
    return true;
  };
  const bool found = ((length <= Tiles::kLongest && launch_with(Tiles())) || ...);
  check(found, op, ": rows of ", length, " are too long for its kernels");
}

template <class Kernels, class T, class Tile>
void register_row_kernel(const char* op, const char* dtype) {
  static const std::string name = text(dtype, "_", Tile::kThreads, "x", Tile::kVectors);
  register_kernel({op, name.c_str(), reinterpret_cast<const void*>(Kernels::template of<T, Tile>()),
                   Tile::kBlock, Tile::kSmemBytes, 80, 120});
}

// Every tile for every float type; returns true.
template <class Kernels, class... Tiles>
bool register_row_kernels(const char* op, RowTiles<Tiles...>) {
  ((register_row_kernel<Kernels, float, Tiles>(op, "fp32"),
    register_row_kernel<Kernels, __half, Tiles>(op, "fp16"),
    register_row_kernel<Kernels, __nv_bfloat16, Tiles>(op, "bf16")),
   ...);
  return true;
}

}  // namespace lowbit
