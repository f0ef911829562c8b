// Matmuls of a thread block. A warp computes a tile of the result, and an epilogue runs while the tile is in registers.
//
// Accessors describe the operands. word(i, k) is the register word of row i of A, or of column i of B, at depth k.
// Buffers are padded (cuda_plan.h), so tiles need no bounds checks. Results beyond the rows and columns are computed
// and dropped; elements beyond the depth are zero.
#pragma once

#include "plugins/kernels/cuda_device.cuh"

namespace titans::kernels::cuda {

// The depth of one word, and of one matrix instruction.
template <class V>
inline constexpr int kWordDepth = sizeof(float) / sizeof(V);
template <class V>
inline constexpr int kStepDepth = 8 * kWordDepth<V>;

template <class V, class Accessor>
__device__ Word<V> make_word(const Accessor& accessor, int i, int k) {
  if constexpr (kWordDepth<V> == 1) {
    return accessor(i, k);
  } else {
    return pack_pair(to_value<V>(accessor(i, k)), to_value<V>(accessor(i, k + 1)));
  }
}

// Element (i, k) at data[i * stride + k].
template <class T>
struct AlongRows {
  const T* data;
  int stride;
  __device__ float operator()(int i, int k) const { return to_float(data[i * stride + k]); }
  template <class V>
  __device__ Word<V> word(int i, int k) const {
    if constexpr (sizeof(T) == 2 && sizeof(V) == 2) {
      return *reinterpret_cast<const std::uint32_t*>(data + i * stride + k);  // strides and depths are even
    } else {
      return make_word<V>(*this, i, k);
    }
  }
};

// Element (i, k) at data[k * stride + i].
template <class T>
struct AlongColumns {
  const T* data;
  int stride;
  __device__ float operator()(int i, int k) const { return to_float(data[k * stride + i]); }
  template <class V>
  __device__ Word<V> word(int i, int k) const {
    if constexpr (sizeof(T) == 2 && sizeof(V) == 2) {
      return pack_pair(data[k * stride + i], data[(k + 1) * stride + i]);
    } else {
      return make_word<V>(*this, i, k);
    }
  }
};

// Multiplies another accessor's elements by a factor per depth.
template <class Of>
struct ScaledAlongDepth {
  Of of;
  const float* factor;
  __device__ float operator()(int i, int k) const { return of(i, k) * factor[k]; }
  template <class V>
  __device__ Word<V> word(int i, int k) const {
    return make_word<V>(*this, i, k);
  }
};

inline constexpr int kTileRows = 32;
inline constexpr int kTileColumns = 16;

// A warp's tile of the result, in float32 registers.
struct Tile {
  static constexpr int kM = kTileRows / 16, kN = kTileColumns / 8;
  float v[kM][kN][4] = {};

  // Adds A B over depths [0, depth), rounded up to whole instructions.
  template <class V, class A, class B>
  __device__ void add(int row, int column, int depth, const A& a, const B& b) {
    const int g = lane_index() / 4, t = lane_index() % 4 * kWordDepth<V>;
#pragma unroll 2
    for (int k = t; k < depth + t; k += kStepDepth<V>) {
      Word<V> words_a[kM][4], words_b[kN][2];
      load_a<V>(words_a, row + g, k, a);
      load_b<V>(words_b, column + g, k, b);
      multiply<V>(words_a, words_b);
    }
  }

  // Adds A B to this tile and A C to the other; A is loaded once.
  template <class V, class A, class B, class C>
  __device__ void add_pair(Tile& other, int row, int column, int depth, const A& a, const B& b, const C& c) {
    const int g = lane_index() / 4, t = lane_index() % 4 * kWordDepth<V>;
    for (int k = t; k < depth + t; k += kStepDepth<V>) {
      Word<V> words_a[kM][4], words_b[kN][2], words_c[kN][2];
      load_a<V>(words_a, row + g, k, a);
      load_b<V>(words_b, column + g, k, b);
      load_b<V>(words_c, column + g, k, c);
      multiply<V>(words_a, words_b);
      other.multiply<V>(words_a, words_c);
    }
  }

  // Calls use(row, column, value, value of the other tile) for each element that this thread holds.
  template <class Use>
  __device__ void each_with(const Tile& other, int row, int column, const Use& use) const {
    const int g = lane_index() / 4, t = lane_index() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          use(row + m * 16 + i / 2 * 8 + g, column + n * 8 + i % 2 + t, v[m][n][i], other.v[m][n][i]);
        }
      }
    }
  }
  template <class Use>
  __device__ void each(int row, int column, const Use& use) const {
    each_with(*this, row, column, [&](int i, int j, float value, float) { use(i, j, value); });
  }

  // Replaces each element by use(row, value, value of the other tile).
  template <class Use>
  __device__ void combine(int row, const Tile& other, const Use& use) {
    const int g = lane_index() / 4;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[m][n][i] = use(row + m * 16 + i / 2 * 8 + g, v[m][n][i], other.v[m][n][i]);
      }
    }
  }

 private:
  template <class V, class A>
  static __device__ void load_a(Word<V> (&words)[kM][4], int i, int k, const A& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        words[m][part] = a.template word<V>(i + m * 16 + part % 2 * 8, k + part / 2 * 4 * kWordDepth<V>);
      }
    }
  }
  template <class V, class B>
  static __device__ void load_b(Word<V> (&words)[kN][2], int i, int k, const B& b) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int part = 0; part < 2; ++part) words[n][part] = b.template word<V>(i + n * 8, k + part * 4 * kWordDepth<V>);
    }
  }
  template <class V>
  __device__ void multiply(const Word<V> (&a)[kM][4], const Word<V> (&b)[kN][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply_add<V>(v[m][n], a[m], b[n]);
    }
  }
};

// Calls body(row, column) for each tile of a result. Tiles are dealt out to the warps.
template <class Body>
__device__ void each_tile(int rows, int columns, const Body& body) {
  const int across = (columns + kTileColumns - 1) / kTileColumns;
  const int tiles = (rows + kTileRows - 1) / kTileRows * across;
  for (int tile = warp_index(); tile < tiles; tile += kWarps) {
    body(tile / across * kTileRows, tile % across * kTileColumns);
  }
}

// Calls use(row, column, value) for each element of A B with row < rows and column < columns.
template <class V, class A, class B, class Use>
__device__ void multiply(int rows, int columns, int depth, const A& a, const B& b, const Use& use) {
  each_tile(rows, columns, [&](int row, int column) {
    Tile tile;
    tile.add<V>(row, column, depth, a, b);
    tile.each(row, column, [&](int i, int j, float value) {
      if (i < rows && j < columns) use(i, j, value);
    });
  });
}

}  // namespace titans::kernels::cuda
