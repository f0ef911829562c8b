// CachedAttention on an NVIDIA GPU. A thread block computes a tile of queries of one head and goes over the columns
// that any of them sees: persistent rows, rows of the cache, and new rows of the call. It keeps the largest score and
// the sum of each query as it goes (online softmax), so any number of columns fits. All arithmetic is float32.
//
// A new row may take the place of a row in the ring that an earlier query still sees. So a second launch writes the
// rings when all queries are answered. A call of one row has no such query, and its blocks write the row themselves.
#include "plugins/kernels/cached_attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_node.cuh"

namespace titans::kernels::cached_attention {
namespace {

using cuda::Four;
using cuda::kThreads;
using cuda::kWarps;
using cuda::kWarpSize;

// Queries of a block, for calls of few and of many rows. A thread has one column's scores of four of them.
inline constexpr int kFewQueries = 4, kManyQueries = 16, kQueriesOfThread = 4;
template <int kQueries>
inline constexpr int kColumns = kThreads * kQueriesOfThread / kQueries;  // of a step
inline constexpr int kDepth = 32;                                        // elements of the keys in shared memory
inline constexpr int kSlice = kThreads;                                  // elements of y of a block, at most
inline constexpr std::int64_t kMostWidth = 1024;

// The operands and sizes of one call. `increments` and the indices may be null.
struct Call {
  const float *q, *k, *v;
  float *keys, *values, *y;
  const std::int64_t *position, *increments;
  cuda::StreamIndices indices;
  std::int32_t* status;
  int heads, width, groups, persistent;
  std::int64_t rows, ring, window, segment;
  Rotary rotary;
  Origin origin;
  int tiles, slices, lanes;  // tiles of queries, slices of y; lanes: threads for one column of a slice
  float scale;

  __device__ std::int64_t first_visible(std::int64_t number) const {
    std::int64_t first = window > 0 && number >= window ? number - window + 1 : 0;
    if (segment > 0) {
      const std::int64_t begin = number - number % segment;
      first = begin > first ? begin : first;
    }
    return first;
  }
  // The number in units of which a row is rotated. Only its lower 32 bits matter.
  __device__ std::uint32_t place(std::int64_t number) const {
    return static_cast<std::uint32_t>(origin == Origin::kSegment ? number % segment : number);
  }
  __device__ std::int64_t query(int stream, int t, int head) const {
    return ((static_cast<std::int64_t>(stream) * indices.tokens + t) * heads + head) * width;
  }
  __device__ std::int64_t new_row(int stream, int group, std::int64_t t, int head) const {
    return (((static_cast<std::int64_t>(stream) * groups + group) * indices.tokens + t) * heads + head) * width;
  }
  __device__ std::int64_t cache(int stream, int head) const {
    return (indices.slot(stream) * heads + head) * rows * width;
  }
  __device__ std::int64_t ring_row(int group, std::int64_t number) const {
    return persistent + group * ring + number % ring;
  }
};

// Element d of a query or a new key after rotation.
__device__ float rotated(const Call& call, const float* row, int d, std::uint32_t place) {
  if (call.rotary == Rotary::kNone) return row[d];
  const int half = call.width / 2;
  const bool halves = call.rotary == Rotary::kHalves;
  const int pair = halves ? (d < half ? d : d - half) : d / 2;
  const bool second = halves ? d >= half : d % 2 != 0;
  const float a = row[halves ? pair : 2 * pair], b = row[halves ? pair + half : 2 * pair + 1];
  float sine, cosine;
  cuda::sine_and_cosine(place * static_cast<std::uint32_t>(call.increments[pair]), sine, cosine);
  return second ? b * cosine + a * sine : a * cosine - b * sine;
}

// The status of a stream, for all threads of the block.
__device__ int wrong_operand(const Call& call, int stream) {
  constexpr std::int64_t kLast = 0x7FFFFFFFFFFFFFFF, kTurn = std::int64_t{1} << 32;
  const int tokens = call.indices.tokens;
  // The number of the row after the last one must not overflow.
  if (call.position[stream] < 0 || call.position[stream] > kLast - (tokens > 1 ? tokens : 1)) {
    return status_word(StatusOf::kCachedAttention, kPosition);
  }
  if (call.increments != nullptr) {
    bool outside = false;
    for (int d = cuda::thread_index(); d < call.width / 2; d += kThreads) {
      outside = outside || call.increments[d] < 0 || call.increments[d] >= kTurn;
    }
    if (cuda::any_in_block(outside)) return status_word(StatusOf::kCachedAttention, kIncrements);
  }
  return cuda::wrong_index(call.indices, stream);
}

// The queries of a block, and the columns that any of them sees. Columns are the persistent rows, then the rows of each
// group from `oldest` to the last query's.
struct Tile {
  int stream, head, slice;
  int first, count;  // rows of the call
  std::int64_t position, number, oldest, span, columns;
  const float *keys, *values;  // of the head's cache
};

// What a block has in shared memory.
template <int kQueries>
struct Shared {
  static constexpr int kAcross = kColumns<kQueries>, kStride = kDepth + 1;

  Four* queries;  // width x kQueries, rotated and scaled
  Four* weights;  // columns x kQueries: scores, then their exponentials; -1 if hidden
  float* part;    // columns x kStride of the keys; at the end, sums of the parts
  const float **key, **value;
  std::uint32_t* place;     // of a new key
  int *is_new, *from, *to;  // the column is seen by queries [from, to) of the tile
  float *most, *sum, *factor;

  __device__ Shared(std::byte* at, int width) {
    const auto take = [&](auto*& field, int count) {
      field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(at);
      at += static_cast<std::size_t>(count) * sizeof(*field);
    };
    take(queries, width * kQueries / 4);
    take(weights, kAcross * kQueries / 4);
    take(key, kAcross);
    take(value, kAcross);
    take(part, part_floats());
    take(place, kAcross);
    take(is_new, kAcross);
    take(from, kAcross);
    take(to, kAcross);
    take(most, kQueries);
    take(sum, kQueries);
    take(factor, kQueries);
  }
  __device__ static constexpr int part_floats() {
    return kAcross * kStride > kThreads * kQueries ? kAcross * kStride : kThreads * kQueries;
  }
  // The bytes that the constructor takes.
  static std::size_t bytes(std::int64_t width) {
    constexpr std::size_t kPart = kAcross * kStride > kThreads * kQueries ? kAcross * kStride : kThreads * kQueries;
    return sizeof(float) * (static_cast<std::size_t>(width) * kQueries + kAcross * kQueries + kPart + 3 * kQueries) +
           kAcross * (2 * sizeof(float*) + 4 * sizeof(int));
  }
  __device__ float& weight(int column, int query) const {
    return reinterpret_cast<float*>(weights)[column * kQueries + query];
  }
};

// Describes column `index` of the tile for the step, in slot `c`. A column after the last is seen by no query.
template <int kQueries>
__device__ void describe_column(const Call& call, const Tile& tile, const Shared<kQueries>& s, int c,
                                std::int64_t index) {
  s.from[c] = 0;
  s.to[c] = index < tile.columns ? tile.count : 0;
  s.is_new[c] = 0;
  s.place[c] = 0;
  s.key[c] = tile.keys;
  s.value[c] = tile.values;
  if (index >= tile.columns) return;
  if (index < call.persistent) {
    s.key[c] += index * call.width;
    s.value[c] += index * call.width;
    return;
  }
  const std::int64_t in_groups = index - call.persistent;
  const int group = static_cast<int>(in_groups / tile.span);
  const std::int64_t number = tile.oldest + in_groups % tile.span;
  // The query of row `number` is the first that sees it. Window and segment end that.
  if (number > tile.number) s.from[c] = static_cast<int>(number - tile.number);
  std::int64_t to = tile.count;
  const std::int64_t at_query = number - tile.number;
  if (call.window > 0 && at_query + call.window < to) to = at_query + call.window;
  if (call.segment > 0 && at_query + call.segment - number % call.segment < to) {
    to = at_query + call.segment - number % call.segment;
  }
  s.to[c] = static_cast<int>(to);
  if (number >= tile.position) {
    const std::int64_t at = call.new_row(tile.stream, group, number - tile.position, tile.head);
    s.key[c] = call.k + at;
    s.value[c] = call.v + at;
    s.is_new[c] = 1;
    s.place[c] = call.place(number);
  } else {
    const std::int64_t at = call.ring_row(group, number) * call.width;
    s.key[c] += at;
    s.value[c] += at;
  }
}

// The scores of a step's columns. Keys pass through shared memory, kDepth elements at a time.
template <int kQueries>
__device__ void compute_scores(const Call& call, const Shared<kQueries>& s) {
  constexpr int kAcross = kColumns<kQueries>;
  const int column = cuda::thread_index() % kAcross, four = cuda::thread_index() / kAcross;
  float scores[kQueriesOfThread] = {};
  for (int begin = 0; begin < call.width; begin += kDepth) {
    const int depth = call.width - begin < kDepth ? call.width - begin : kDepth;
    cuda::sync_block();  // the part is read until here
    const int d = cuda::lane_index();
#pragma unroll 4
    for (int c = cuda::warp_index(); c < kAcross; c += kWarps) {
      float element = 0.0F;
      if (d < depth && s.from[c] < s.to[c]) {
        element = s.is_new[c] != 0 ? rotated(call, s.key[c], begin + d, s.place[c]) : s.key[c][begin + d];
      }
      s.part[c * Shared<kQueries>::kStride + d] = element;
    }
    cuda::sync_block();
    const float* key = s.part + column * Shared<kQueries>::kStride;
    for (int i = 0; i < depth; ++i) {
      const Four query = s.queries[(begin + i) * (kQueries / 4) + four];
#pragma unroll
      for (int j = 0; j < kQueriesOfThread; ++j) scores[j] += query.v[j] * key[i];
    }
  }
  s.weights[column * (kQueries / 4) + four] = {{scores[0], scores[1], scores[2], scores[3]}};
}

// Turns the scores of a step into exponentials, and sets each query's largest score, sum and factor. The factor scales
// what was summed up before. A warp has a query.
template <int kQueries>
__device__ void advance_softmax(const Shared<kQueries>& s) {
  constexpr int kAcross = kColumns<kQueries>;
  for (int query = cuda::warp_index(); query < kQueries; query += kWarps) {
    const auto seen = [&](int c) { return s.from[c] <= query && query < s.to[c]; };
    const float before = s.most[query];
    float most = before;
    for (int c = cuda::lane_index(); c < kAcross; c += kWarpSize) {
      const float score = s.weight(c, query);
      if (seen(c) && score > most) most = score;
    }
    most = cuda::max_over_warp(most);
    float sum = 0.0F;
    for (int c = cuda::lane_index(); c < kAcross; c += kWarpSize) {
      float weight = -1.0F;
      if (seen(c)) {
        const float score = s.weight(c, query);
        weight = score == -cuda::infinity() ? 0.0F : cuda::exponential(score - most);
        sum += weight;
      }
      s.weight(c, query) = weight;
    }
    sum = cuda::sum_over_warp(sum);
    if (cuda::lane_index() == 0) {
      const float factor = before == most ? 1.0F : cuda::exponential(before - most);
      s.most[query] = most;
      s.factor[query] = factor;
      s.sum[query] = s.sum[query] * factor + sum;
    }
  }
}

// Adds a step's values to the thread's element of y, for each query. Hidden values may be NaN, so they are not
// multiplied by 0.
template <int kQueries>
__device__ void add_values(const Shared<kQueries>& s, int d, bool inside, int part, int parts, float (&y)[kQueries]) {
#pragma unroll
  for (int i = 0; i < kQueries; ++i) y[i] *= s.factor[i];
  if (!inside) return;
#pragma unroll 4
  for (int c = part; c < kColumns<kQueries>; c += parts) {
    if (s.from[c] >= s.to[c]) continue;
    const float value = s.value[c][d];
#pragma unroll
    for (int four = 0; four < kQueries / 4; ++four) {
      const Four weights = s.weights[c * (kQueries / 4) + four];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(weights.v[j] < 0.0F)) y[four * 4 + j] += weights.v[j] * value;
      }
    }
  }
}

template <int kQueries>
__device__ void answer(const Call& call, const Tile& tile, const Shared<kQueries>& s) {
  for (int i = cuda::thread_index(); i < kQueries * call.width; i += kThreads) {
    const int query = i / call.width, d = i % call.width;
    float element = 0.0F;
    if (query < tile.count) {
      const float* row = call.q + call.query(tile.stream, tile.first + query, tile.head);
      element = rotated(call, row, d, call.place(tile.number + query)) * call.scale;
    }
    reinterpret_cast<float*>(s.queries)[d * kQueries + query] = element;
  }
  if (cuda::thread_index() < kQueries) {
    s.most[cuda::thread_index()] = -cuda::infinity();
    s.sum[cuda::thread_index()] = 0.0F;
  }
  const int begin = tile.slice * kSlice, size = call.width - begin < kSlice ? call.width - begin : kSlice;
  const int lane = cuda::thread_index() % call.lanes, part = cuda::thread_index() / call.lanes;
  const int parts = kThreads / call.lanes;
  float y[kQueries] = {};
  for (std::int64_t column = 0; column < tile.columns; column += kColumns<kQueries>) {
    cuda::sync_block();  // the previous step is done
    for (int c = cuda::thread_index(); c < kColumns<kQueries>; c += kThreads) {
      describe_column(call, tile, s, c, column + c);
    }
    compute_scores(call, s);
    cuda::sync_block();
    advance_softmax(s);
    cuda::sync_block();
    add_values(s, begin + lane, lane < size, part, parts, y);
  }
#pragma unroll
  for (int i = 0; i < kQueries; ++i) s.part[(part * kQueries + i) * call.lanes + lane] = y[i];
  cuda::sync_block();
  for (int i = cuda::thread_index(); i < tile.count * size; i += kThreads) {
    const int query = i / size, d = i % size;
    float sum = 0.0F;
    for (int each = 0; each < parts; ++each) sum += s.part[(each * kQueries + query) * call.lanes + d];
    call.y[call.query(tile.stream, tile.first + query, tile.head) + begin + d] = sum / s.sum[query];
  }
  cuda::sync_block();  // shared memory is reused by the next tile
}

// Writes row t of the call to the rings, for some heads. `thread` of `threads` takes part.
__device__ void write_row(const Call& call, int stream, int t, int first_head, int end_head, int thread, int threads) {
  const std::int64_t number = call.position[stream] + t, in_ring = number % call.ring;
  const std::uint32_t place = call.place(number);
  for (int head = first_head; head < end_head; ++head) {
    const std::int64_t cache = call.cache(stream, head);
    for (int group = 0; group < call.groups; ++group) {
      const std::int64_t from = call.new_row(stream, group, t, head);
      const std::int64_t to = cache + (call.persistent + group * call.ring + in_ring) * call.width;
      for (int d = thread; d < call.width; d += threads) {
        call.keys[to + d] = rotated(call, call.k + from, d, place);
        call.values[to + d] = call.v[from + d];
      }
    }
  }
}

// Fills rows [from, to) of one head's y, elements of one slice.
__device__ void fill_rows(const Call& call, const Tile& tile, int from, int to, float value) {
  const int begin = tile.slice * kSlice, size = call.width - begin < kSlice ? call.width - begin : kSlice;
  for (int i = cuda::thread_index(); i < (to - from) * size; i += kThreads) {
    call.y[call.query(tile.stream, from + i / size, tile.head) + begin + i % size] = value;
  }
}

template <int kQueries>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ Call call) {
  const Shared<kQueries> shared(cuda::shared_memory(), call.width);
  const std::int64_t of_stream = static_cast<std::int64_t>(call.heads) * call.tiles * call.slices;
  const std::int64_t work = call.indices.streams * of_stream;
  for (std::int64_t each = cuda::block_index(); each < work; each += cuda::block_count()) {
    Tile tile{};
    tile.stream = static_cast<int>(each / of_stream);
    tile.head = static_cast<int>(each / call.slices / call.tiles % call.heads);
    tile.slice = static_cast<int>(each % call.slices);
    tile.first = static_cast<int>(each / call.slices % call.tiles) * kQueries;
    const int tokens = call.indices.tokens, end = tile.first + kQueries < tokens ? tile.first + kQueries : tokens;
    const int wrong = wrong_operand(call, tile.stream);
    if (wrong != 0) {
      fill_rows(call, tile, tile.first, end, cuda::not_a_number());
      if (cuda::thread_index() == 0) cuda::report(call.status, wrong);
      continue;
    }
    const int valid = call.indices.valid_tokens(tile.stream);
    tile.count = (valid < end ? valid : end) - tile.first;
    if (tile.count < end - tile.first) {
      fill_rows(call, tile, tile.first + (tile.count > 0 ? tile.count : 0), end, 0.0F);
    }
    if (tile.count <= 0) continue;
    tile.position = call.position[tile.stream];
    tile.number = tile.position + tile.first;
    tile.oldest = call.first_visible(tile.number);
    tile.span = tile.number + tile.count - tile.oldest;
    tile.columns = call.persistent + call.groups * tile.span;
    tile.keys = call.keys + call.cache(tile.stream, tile.head);
    tile.values = call.values + call.cache(tile.stream, tile.head);
    answer(call, tile, shared);
    if (tokens == 1 && tile.slice == 0) {
      write_row(call, tile.stream, 0, tile.head, tile.head + 1, cuda::thread_index(), kThreads);
    }
  }
}

// Writes the rows of a call to the rings. A warp has a row of a head. Rows that later ones overwrite are left out.
__global__ void __launch_bounds__(kThreads) write_rings(const __grid_constant__ Call call) {
  const int blocks = (call.indices.tokens + kWarps - 1) / kWarps;
  const std::int64_t work = static_cast<std::int64_t>(call.indices.streams) * blocks;
  for (std::int64_t each = cuda::block_index(); each < work; each += cuda::block_count()) {
    const int stream = static_cast<int>(each / blocks);
    const int t = static_cast<int>(each % blocks) * kWarps + cuda::warp_index();
    if (wrong_operand(call, stream) != 0) continue;
    const int valid = call.indices.valid_tokens(stream);
    if (t >= valid || t + call.ring < valid) continue;
    write_row(call, stream, t, 0, call.heads, cuda::lane_index(), kWarpSize);
  }
}

class Kernel final : public CudaKernel {
 public:
  Kernel(const Configuration& configuration, const CudaDevice& device)
      : configuration_(configuration), device_(device) {}

  std::string run(const Operands& o, std::int32_t* status, CUstream_st* stream) const override {
    std::string error = check(o);
    for (const InPlace& pair : kInPlace) {
      if (!error.empty()) return error;
      const Tensor &from = o[pair.input], &to = o[pair.output];
      if (from.data == to.data) continue;
      error = cuda::copy(to.data, from.data, static_cast<std::size_t>(from.elements()) * sizeof(float), stream);
    }
    if (!error.empty()) return error;
    Call call = make_call(o);
    call.status = status;
    if (call.indices.streams == 0 || call.indices.tokens == 0) return {};
    error = call.indices.tokens <= kFewQueries ? attend_with<kFewQueries>(call, stream)
                                               : attend_with<kManyQueries>(call, stream);
    if (!error.empty() || call.indices.tokens == 1) return error;
    const std::int64_t blocks = (call.indices.tokens + kWarps - 1) / kWarps;
    const cuda::Launch launch{cuda::blocks_for(call.indices.streams * blocks), 1, 0, device_.shared_bytes, false};
    return cuda::launch(&write_rings, launch, call, stream);
  }

 private:
  std::string check(const Operands& o) const {
    std::string error = check_operands(configuration_, o);
    if (!error.empty()) return error;
    error = cuda::too_large(kOperator, "elements of a head", kMostWidth, o[kKeys].shape[3], "run on the CPU");
    if (error.empty()) {
      error = cuda::too_large(kOperator, "rows of a cache", cuda::kLargestCall, o[kKeys].shape[2], "run on the CPU");
    }
    if (!error.empty()) return error;
    return cuda::too_large(kOperator, "elements of q or k", cuda::kLargestCall,
                           std::max(o[kK].elements(), o[kQ].elements()), "feed fewer tokens or streams at a time");
  }

  template <int kQueries>
  std::string attend_with(Call& call, CUstream_st* stream) const {
    call.tiles = (call.indices.tokens + kQueries - 1) / kQueries;
    const std::int64_t work = static_cast<std::int64_t>(call.indices.streams) * call.heads * call.tiles * call.slices;
    const cuda::Launch launch{cuda::blocks_for(work), 1, Shared<kQueries>::bytes(call.width), device_.shared_bytes,
                              false};
    return cuda::launch(&attend<kQueries>, launch, call, stream);
  }

  Call make_call(const Operands& o) const {
    const Configuration& c = configuration_;
    const auto whole = [](std::int64_t value) { return static_cast<int>(value); };
    const auto& [pool, heads, rows, width] = o[kKeys].shape;
    Call call{};
    call.q = o[kQ].as<float>();
    call.k = o[kK].as<float>();
    call.v = o[kV].as<float>();
    call.keys = o[kKeysOut].as<float>();
    call.values = o[kValuesOut].as<float>();
    call.y = o[kY].as<float>();
    call.position = o[kPosition].as<std::int64_t>();
    call.increments = o[kIncrements].as<std::int64_t>();
    call.indices = {o[kValid].as<std::int64_t>(),
                    o[kSlots].as<std::int64_t>(),
                    whole(o[kQ].shape[0]),
                    whole(o[kQ].shape[1]),
                    pool,
                    status_word(StatusOf::kCachedAttention, kValid),
                    status_word(StatusOf::kCachedAttention, kSlots)};
    call.heads = whole(heads);
    call.width = whole(width);
    call.groups = whole(c.groups);
    call.persistent = whole(c.persistent);
    call.rows = rows;
    call.ring = c.ring(rows);
    call.window = c.window;
    call.segment = c.segment;
    call.rotary = c.rotary;
    call.origin = c.origin;
    call.slices = (call.width + kSlice - 1) / kSlice;
    for (call.lanes = 1; call.lanes < kSlice && call.lanes < call.width;) call.lanes *= 2;
    call.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)));
    return call;
  }

  Configuration configuration_;
  CudaDevice device_;
};

}  // namespace

std::unique_ptr<CudaKernel> make_cuda_kernel(const Configuration& configuration, const CudaDevice& device,
                                             std::string& error) {
  error = cuda::unsupported(kOperator, device);
  return error.empty() ? std::make_unique<Kernel>(configuration, device) : nullptr;
}

}  // namespace titans::kernels::cached_attention
