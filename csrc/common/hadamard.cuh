// SPDX-License-Identifier: Apache-2.0
// Rotation of a row by a Hadamard matrix, and its codes. The contract: lowbit/ops/hadamard.py.
//
// order = dense * 2^bits, so that a row is [blocks, dense, columns], columns = 2^bits * inner, and
//   H_order = H_dense (x) H_2^bits
// H_dense, +-1, is multiplied on matrix units, first: factors commute, and there x is exact as it
// is (common/hadamard_dense.cuh). The bits are butterflies, each wherever its two numbers are in
// one thread. With a dense factor, of which inner is 1 or there are no bits:
//   in fragments   strides 1, and 8, 16, 32 between groups of 8 neighbours
//   at the end     strides 2 and 4 within 8 neighbours, the largest among a thread's units
// Without:
//   low      strides 1, 2, 4 within the 8 neighbours that a thread loads          (inner 1)
//   first    the largest strides, among the kUnits loads of a thread
//   last     the others, after an exchange
#pragma once

#include "common/hadamard_dense.cuh"

namespace lowbit {

// ---- rotate and quantize a row -----------------------------------------------------------------
//
//   step 1  units from memory; without a dense factor low and first butterflies
//   step 2  exchange through shared memory, the dense factor before it
//   step 3  last butterflies, the range over the block
//   step 4  scale and zero point, then codes, 8 a thread and store
// A source gives a row of fp16 or bf16 (`type`) by load(to, start, places): of each of a thread's
// places, units of the row that begins at element `start`, the 8 elements as they are. Where
// kIsStaged it gives fp32, and computes a lot: in a loop that is not unrolled. It has fetch(at),
// which begins to load 8 elements, and finish(), which gives what was fetched and fetches the next;
// its rows begin `stride` elements apart.

// Where unit `unit` of a row of 16-bit elements lies.
__device__ __forceinline__ uint32_t raw_unit_at(const Rotation& r, uint32_t unit) {
  const uint32_t row = r.by_columns.quotient(unit);
  return row * (r.raw_pitch - r.groups) + unit;
}

// Step 1 of a staged source: all of the thread's units to shared memory, after `low_bits`.
template <int kUnits, class Source>
__device__ __forceinline__ void stage(const Source& source, int64_t start, const Rotation& r,
                                      const Strides& strides, int low_bits) {
  const Units<-1> units{strides};
  float4* slots = row_slots();
  typename Source::Raw raw;
  uint32_t first = units.first(0), offset = units.offset(0);
  bool has = units.has(0);
  if (has) source.fetch(raw, start + (first + offset) * kVector);
#pragma unroll 1
  for (int u = 1; has; ++u) {
    const uint32_t at = unit_at(r, first, offset);
    first = units.first(u), offset = units.offset(u);
    has = u < kUnits && units.has(u);
    float unit[1][kVector];
    source.finish(unit[0], raw, has, start + (first + offset) * kVector);
    low_butterflies(unit, low_bits);
    store_unit(slots, at, unit[0]);
  }
}

template <int kUnits, int kBits>
__device__ __forceinline__ void find_places(uint32_t (&places)[kUnits], const Units<kBits>& units) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) places[u] = units.unit(u);
}

// Steps 1 and 2 with a dense factor.
template <class Tile, class Source>
__device__ __forceinline__ void multiply_row(const Source& source, int64_t start,
                                             const uint32_t* __restrict__ signs,
                                             const Rotation& r) {
  if constexpr (Source::kIsStaged) {
    stage<Tile::kUnits>(source, start, r, r.last, 0);
  } else {
    uint32_t places[Tile::kUnits];
    uint4 raw[Tile::kUnits];
    const uint32_t units = r.length / kVector;
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
      places[u] = smaller(u * blockDim.x + threadIdx.x, units - 1);
    }
    source.load(raw, start, places);
    const uint32_t slots = slots_address();
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
      store_shared_16_if(u * blockDim.x + threadIdx.x < units,
                         slots + raw_unit_at(r, places[u]) * 16, raw[u]);
    }
    if (threadIdx.x == 0) {
      *reinterpret_cast<uint4*>(dynamic_smem() + kZerosOffset) = make_uint4(0, 0, 0, 0);
    }
  }
  sync_block();
  dense_factor<Tile, Source::kIsStaged>(signs, r, source.type == FloatType::kHalf);
  sync_block();
}

// Steps 1 and 2 without one; the row's end is in x where nothing is exchanged.
template <class Tile, class Source>
__device__ __forceinline__ void first_butterflies(float (&x)[Tile::kUnits][kVector],
                                                  const Source& source, int64_t start,
                                                  const Rotation& r) {
  constexpr int kUnits = Tile::kUnits;
  float4* slots = row_slots();
  if constexpr (Source::kIsStaged) {
    stage<kUnits>(source, start, r, r.first, r.low_bits);
    sync_block();  // past the end a thread takes what is another's
  } else {
    uint32_t places[kUnits];
    with_bits<Tile::kUnitBits>(r.first.bits, [&](auto bits) {
      find_places(places, Units<decltype(bits)::value>{r.first});
    });
    uint4 raw[kUnits];
    source.load(raw, start, places);
    widen_units(x, raw, source.type);
    low_butterflies(x, r.low_bits);
  }
  if (!Source::kIsStaged || r.first.bits > 0 || !r.exchange) {
    with_bits<Tile::kUnitBits>(r.first.bits, [&](auto bits) {
      const Units<decltype(bits)::value> units{r.first};
      if constexpr (Source::kIsStaged) {
        load_units(x, r, units);
        if (r.exchange) sync_block();
      }
      strided_stages<decltype(bits)::value>(x);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (r.exchange && units.has(u)) {
          store_unit(slots, unit_at(r, units.first(u), units.offset(u)), x[u]);
        }
      }
    });
  }
  if (r.exchange) sync_block();
}

// Step 3 after the exchange.
template <class Tile>
__device__ __forceinline__ void last_butterflies(float (&x)[Tile::kUnits][kVector],
                                                 const Rotation& r) {
  with_bits<Tile::kUnitBits>(r.last.bits, [&](auto bits) {
    const Units<decltype(bits)::value> units{r.last};
    load_units(x, r, units);
    if (Tile::kM > 0 && r.mixed) low_stages<1, 3>(x);
    strided_stages<decltype(bits)::value>(x);
  });
}

template <class Tile, class Source>
__device__ __forceinline__ void rotate_and_quantize(const Source& source,
                                                    const uint32_t* __restrict__ signs,
                                                    uint8_t* __restrict__ codes,
                                                    void* __restrict__ scales,
                                                    uint8_t* __restrict__ zero_points,
                                                    const Rotation& r, const IntGrid& grid) {
  constexpr int kUnits = Tile::kUnits;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * r.length;
  int64_t from = start;
  if constexpr (Source::kIsStaged) from = blockIdx.x * source.stride;
  float x[kUnits][kVector];

  // steps 1 and 2
  if constexpr (Tile::kM > 0) {
    multiply_row<Tile>(source, from, signs, r);
  } else {
    first_butterflies<Tile>(x, source, from, r);
  }

  // step 3; a warp past the end of the row has nothing to do
  const bool busy = threadIdx.x / kWarp * kWarp < r.last.groups;
  Range range;  // before the factor: rounding keeps the order
  if (busy) {
    if (Tile::kM > 0 || r.exchange) last_butterflies<Tile>(x, r);
    if (grid.symmetric) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) range.include_magnitude(x[u][i]);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) range.include(x[u][i]);
      }
    }
  }
  range = reduce_range(range, reinterpret_cast<Range*>(dynamic_smem()));
  range.lo = mul_rn(range.lo, r.factor), range.hi = mul_rn(range.hi, r.factor);

  // step 4
  Scale scale = scale_of(range, grid);
  if (threadIdx.x == 0) store_scale(scales, zero_points, blockIdx.x, scale, grid);
  if (!busy) return;
  scale.factor *= r.factor;
  codes += grid.packed ? start / 2 : start;
  uint32_t places[kUnits];  // again, as they would take registers until here
  with_bits<Tile::kUnitBits>(
      r.last.bits, [&](auto bits) { find_places(places, Units<decltype(bits)::value>{r.last}); });
  if (quotients_fit(grid)) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) store_vector_codes<false>(codes, places[u], x[u], scale, grid);
  } else {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) store_vector_codes<true>(codes, places[u], x[u], scale, grid);
  }
}

}  // namespace lowbit
