// SPDX-License-Identifier: Apache-2.0
// What GEMMs share: the order of their tiles, and those by mma.sync the search for the tile of y
// and the split of K that take the least time, the memory of a split and which of its blocks ends
// it.
#pragma once

#include "common/launch.h"
#include "common/outputs.cuh"
#include "common/ptx.cuh"

namespace lowbit {

constexpr int kTokenTiles = 8;  // neighbours in M that share weights in L2
constexpr int kMaxSplits = 32;  // of K

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

struct TilePlace {
  int m, n;  // in tiles
};

// Where the tiles lie: kTokenTiles neighbours in M and all of N follow each other, M fastest, so
// that those computed at one time read few rows of x and few channels of w.
__device__ __forceinline__ TilePlace place_of(int tile, int tiles_m, int tiles_n) {
  const int first = tile / (kTokenTiles * tiles_n) * kTokenTiles;
  const int width = smaller(tiles_m - first, kTokenTiles);
  const int within = tile % (kTokenTiles * tiles_n);
  return {first + within % width, within / width};
}

// What a block computes.
struct Work {
  int m0, n0;         // its first token and channel
  int tile;           // its index among those of one split
  int stage, stages;  // the first of K, and how many
};

// Of a GEMM with tiles of kChannels x kTokens and stages of kStageK columns.
template <class G>
__device__ __forceinline__ Work work_of(int M, int N, int K, int stages_per_split) {
  const int tile = blockIdx.x;
  const TilePlace place = place_of(tile, ceil_div(M, G::kTokens), ceil_div(N, G::kChannels));
  const int stage = blockIdx.y * stages_per_split;
  const int stages = ceil_div(K, G::kStageK) - stage;
  return {place.m * G::kTokens, place.n * G::kChannels, tile, stage,
          smaller(stages, stages_per_split)};
}

// Whether all other blocks of a tile's split of K have written their sums, which the last one to
// come here then sees. `arrived` counts them, `flag` is shared memory.
__device__ __forceinline__ bool is_last(int* arrived, int splits, int* flag) {
  sync_block();
  if (threadIdx.x == 0) {  // a fence of one thread covers what it has seen of the others
    fence_device();
    *flag = atomic_add(arrived, 1);
    fence_device();
  }
  sync_block();
  return *flag == splits - 1;
}

// ---- on the host

// visit(an object, its index) for each type of a tuple; the index is known when it is compiled.
template <class Types, class Visit, size_t... kIndices>
void for_each(Visit visit, std::index_sequence<kIndices...>) {
  (visit(std::tuple_element_t<kIndices, Types>(), std::integral_constant<int, kIndices>()), ...);
}

template <class Types, class Visit>
void for_each(Visit visit) {
  for_each<Types>(visit, std::make_index_sequence<std::tuple_size_v<Types>>());
}

struct TilePlan {
  int tile, tiles;  // index among the types of tiles, and how many cover y
  int splits, stages_per_split;
};

// The tile and the split of K with the shortest time(tile, its index, how many cover y, splits,
// stages of each), tried from the smallest tile on. stages_of(tile, its index): of all K; 0: there
// is no such kernel.
template <class Tiles, class StagesOf, class Time>
TilePlan fastest_plan(int64_t M, int64_t N, StagesOf stages_of, Time time) {
  TilePlan best = {};
  int64_t shortest = INT64_MAX;
  int tokens_before = 0;
  for_each<Tiles>([&](auto tile, int index) {
    const int stages = stages_of(tile, index);
    if (stages == 0 || tokens_before >= M) return;  // a smaller tile holds all tokens
    tokens_before = tile.kTokens;
    const int64_t tiles = ceil_div<int64_t>(M, tile.kTokens) * ceil_div<int64_t>(N, tile.kChannels);
    for (int splits = 1; splits <= kMaxSplits && splits <= stages; ++splits) {
      const int of_split = ceil_div(stages, splits);
      if (ceil_div(stages, of_split) != splits) continue;  // as fewer splits do
      const int64_t here = time(tile, index, tiles, splits, of_split);
      if (here < shortest) {
        shortest = here;
        best = {index, static_cast<int>(tiles), splits, of_split};
      }
    }
  });
  return best;
}

template <class Tiles>
std::string describe_plan(const TilePlan& plan) {
  std::string name;
  for_each<Tiles>([&](auto tile, int index) {
    if (index == plan.tile) name = tile.name();
  });
  return text(name, ": ", plan.tiles, " tiles x ", plan.splits, " splits of ",
              plan.stages_per_split, " stages");
}

// Where blocks of a split K leave their sums of kChannels x kTokens, and count those that have:
// nothing where K is whole.
template <class G>
struct SplitMemory {
  std::optional<Tensor> sums, arrivals;

  SplitMemory(const TilePlan& plan, ScalarType type, const Tensor& like) {
    if (plan.splits == 1) return;
    sums = new_empty(like, {plan.tiles, plan.splits, G::kChannels * G::kTokens}, type);
    const std::vector<int64_t> sizes{plan.tiles};
    arrivals = torch::stable::new_zeros(like, sizes, ScalarType::Int);
  }

  int4* workspace() const { return sums ? pointer<int4>(*sums) : nullptr; }
  int* counters() const { return arrivals ? pointer<int>(*arrivals) : nullptr; }
};

}  // namespace lowbit
