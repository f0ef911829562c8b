// CachedAttention on the CPU. Rows of the cache that no query sees are never read.
//
// Few rows are processed one by one: a head writes the row's key and value to the rings, computes a score for each
// visible row of the cache, and sums up the values.
//
// More rows are processed in tiles of queries. First the visible keys and values of a head are packed, those of the
// call after those of the cache. So a row of the call may take the place of a row in the ring that an earlier one still
// sees. The packed keys are transposed in panels, so that scores and sums are small matmuls. The rings are written
// last.
//
// Compiled once per instruction set (Highway's foreach_target).

#include "plugins/kernels/cpu_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/kernels/cached_attention_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Headers that include this file again come first.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "plugins/kernels/cached_attention_cpu.h"
#include "plugins/kernels/product-inl.h"
#include "plugins/kernels/scratch_pool.h"
#include "plugins/kernels/subnormals.h"
#include "plugins/kernels/vector-inl.h"

#ifndef TITANS_CACHED_ATTENTION_CALL_
#define TITANS_CACHED_ATTENTION_CALL_

namespace titans::kernels::cached_attention {

// The operands and sizes of one call.
struct Call {
  const float *q, *k, *v;
  float *keys, *values, *y;
  const std::int64_t *position, *increments, *valid, *slots;  // the last three may be null
  const float* angles;  // width / 2 cosines and as many sines for each row of the call; null without rotation
  std::size_t streams, tokens, heads, width, groups, persistent;
  std::size_t rows, ring;  // of the cache of one head, and of each group
  std::int64_t window, segment;
  Rotary rotary;
  Origin origin;
  std::size_t most_old;  // rows of a group that the call's first row sees before itself

  std::size_t visible(std::int64_t number) const {
    return static_cast<std::size_t>(number - first_visible(number) + 1);
  }
  std::size_t valid_rows(std::size_t stream) const {
    return valid == nullptr ? tokens : static_cast<std::size_t>(valid[stream]);
  }
  // The first row that row `number` sees.
  std::int64_t first_visible(std::int64_t number) const {
    std::int64_t first = window > 0 ? std::max<std::int64_t>(number - window + 1, 0) : 0;
    if (segment > 0) first = std::max(first, number - number % segment);
    return first;
  }
  // Where the cache of a stream's head begins.
  std::size_t head_of_cache(std::size_t stream, std::size_t head) const {
    const std::size_t slot = slots == nullptr ? stream : static_cast<std::size_t>(slots[stream]);
    return (slot * heads + head) * rows * width;
  }
  // Where a row of q, k or v begins: of a stream, a group, a row of the call and a head.
  std::size_t query(std::size_t stream, std::size_t t, std::size_t head) const {
    return ((stream * tokens + t) * heads + head) * width;
  }
  std::size_t new_row(std::size_t stream, std::size_t group, std::size_t t, std::size_t head) const {
    return (((stream * groups + group) * tokens + t) * heads + head) * width;
  }
  const float* angles_of(std::size_t stream, std::size_t t) const {
    return angles == nullptr ? nullptr : angles + (stream * tokens + t) * width;
  }
  std::size_t ring_row(std::size_t group, std::int64_t number) const {
    return persistent + group * ring + static_cast<std::size_t>(number) % ring;
  }
};

// Consecutive rows.
struct Span {
  std::size_t first, count;
};

inline constexpr std::size_t kTileQueries = 16;
// Keys of a panel, and the padding of scratch: whole vectors of any instruction set.
inline constexpr std::size_t kMostPanel = 32;

constexpr std::size_t padded_to_panels(std::size_t columns) {
  return (columns + kMostPanel - 1) / kMostPanel * kMostPanel;
}

// The visible rows of one stream's head, packed. The columns of the scores are the persistent rows, then the rows of
// each group.
struct Packed {
  float* keys;    // panels of keys, transposed
  float* values;  // columns x width
  bool finite;    // whether all values are

  // The largest size for a call.
  static std::size_t most_columns(const Call& call) {
    return call.persistent + call.groups * (call.most_old + call.tokens);
  }
  static std::size_t floats(const Call& call) { return 2 * padded_to_panels(most_columns(call)) * call.width; }
  static Packed at(const Call& call, float* memory) {
    return {memory, memory + padded_to_panels(most_columns(call)) * call.width, true};
  }
};

// The functions of one instruction set. A unit is a head of a stream: stream * heads + head.
struct CpuFunctions {
  // Writes the angles of the valid rows of one stream.
  void (*turn)(const Call& call, std::size_t stream, float* angles);
  // Processes all rows of a unit one by one.
  void (*attend_rows)(const Call& call, std::size_t unit, float* scratch);
  // The same in three steps: packing, tiles of queries in any order, and writing to the rings.
  void (*pack)(const Call& call, std::size_t unit, float* scratch, Packed& packed);
  void (*attend_tile)(const Call& call, std::size_t unit, std::size_t tile, const Packed& packed, float* scratch);
  void (*write)(const Call& call, std::size_t unit);
};

// Floats of scratch for each function.
inline std::size_t row_scratch(const Call& call) { return padded_to_panels(call.width) + padded_to_panels(call.rows); }
inline std::size_t pack_scratch(const Call& call) { return kMostPanel * call.width; }
inline std::size_t score_stride(const Call& call) {
  // One more cache line, so that the rows of a tile do not compete for a few sets of the cache.
  return padded_to_panels(Packed::most_columns(call)) + 16;
}
inline std::size_t tile_scratch(const Call& call) { return kTileQueries * (call.width + score_stride(call)); }

}  // namespace titans::kernels::cached_attention

#endif  // TITANS_CACHED_ATTENTION_CALL_

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {
namespace attention {

using namespace titans::kernels::cached_attention;

using Integers = hn::RebindToUnsigned<Floats>;
using SignedIntegers = hn::RebindToSigned<Floats>;
inline constexpr std::size_t kMostSpans = 1 + 2 * static_cast<std::size_t>(kMostGroups);
inline constexpr std::size_t kPanel = 2 * kLanes;
static_assert(kMostPanel % kPanel == 0);
// The base of the softmax's exponentials is 2, so queries are scaled by this too.
inline constexpr float kLog2E = 1.44269504F;

// ---- rotation ----

// The cosine and sine of phase * 2 pi / 2^32. Quadrants are found in integers, so the error does not grow with the
// position. The polynomials are those of Cephes' sinf and cosf.
HWY_INLINE void turn_vector(hn::Vec<Integers> phase, Vector& cosine, Vector& sine) {
  const Floats d;
  const Integers du;
  const SignedIntegers di;
  const auto quadrant = hn::ShiftRight<30>(hn::Add(phase, hn::Set(du, 1U << 29)));
  const auto rest = hn::BitCast(di, hn::Sub(phase, hn::ShiftLeft<30>(quadrant)));
  const Vector x = hn::Mul(hn::ConvertTo(d, rest), hn::Set(d, 1.46291807926715968e-9F));  // 2 pi / 2^32
  const Vector square = hn::Mul(x, x);
  Vector s = hn::MulAdd(square, hn::Set(d, -1.9515295891e-4F), hn::Set(d, 8.3321608736e-3F));
  s = hn::MulAdd(s, square, hn::Set(d, -1.6666654611e-1F));
  s = hn::MulAdd(hn::Mul(s, square), x, x);
  Vector c = hn::MulAdd(square, hn::Set(d, 2.443315711809948e-5F), hn::Set(d, -1.388731625493765e-3F));
  c = hn::MulAdd(c, square, hn::Set(d, 4.166664568298827e-2F));
  c = hn::MulAdd(hn::Mul(c, square), square, hn::NegMulAdd(square, hn::Set(d, 0.5F), hn::Set(d, 1.0F)));
  const auto one = hn::Set(du, 1), two = hn::Set(du, 2);
  const auto odd = hn::RebindMask(d, hn::Eq(hn::And(quadrant, one), one));
  const auto sign_of_sine = hn::ShiftLeft<30>(hn::And(quadrant, two));
  const auto sign_of_cosine = hn::ShiftLeft<30>(hn::And(hn::Add(quadrant, one), two));
  sine = hn::Xor(hn::IfThenElse(odd, c, s), hn::BitCast(d, sign_of_sine));
  cosine = hn::Xor(hn::IfThenElse(odd, s, c), hn::BitCast(d, sign_of_cosine));
}

void turn(const Call& call, std::size_t stream, float* angles) {
  const std::size_t half = call.width / 2, valid = call.valid_rows(stream);
  float* to = angles + stream * call.tokens * call.width;
  for (std::size_t t = 0; t < valid; ++t, to += call.width) {
    const std::int64_t number = call.position[stream] + static_cast<std::int64_t>(t);
    const std::int64_t place = call.origin == Origin::kSegment ? number % call.segment : number;
    each_vector(half, [&](std::size_t i, std::size_t n) HWY_ATTR {
      HWY_ALIGN std::uint32_t phases[kLanes] = {};
      for (std::size_t lane = 0; lane < n; ++lane) {
        phases[lane] = static_cast<std::uint32_t>(place) * static_cast<std::uint32_t>(call.increments[i + lane]);
      }
      Vector cosine, sine;
      turn_vector(hn::Load(Integers(), phases), cosine, sine);
      store(cosine, to + i, n);
      store(sine, to + half + i, n);
    });
  }
}

// to = factor * the rotated row.
HWY_INLINE void rotate_row(Rotary rotary, const float* x, const float* angles, std::size_t width, float factor,
                           float* to) {
  const Floats d;
  const Vector factors = hn::Set(d, factor);
  const std::size_t half = width / 2;
  const float* sines = angles + half;
  if (rotary == Rotary::kNone) {
    scale_row(x, factor, width, to);
  } else if (rotary == Rotary::kHalves) {
    each_vector(half, [&](std::size_t i, std::size_t n) HWY_ATTR {
      const Vector a = hn::Mul(load(x + i, n), factors), b = hn::Mul(load(x + half + i, n), factors);
      const Vector c = load(angles + i, n), s = load(sines + i, n);
      store(hn::NegMulAdd(b, s, hn::Mul(a, c)), to + i, n);
      store(hn::MulAdd(a, s, hn::Mul(b, c)), to + half + i, n);
    });
  } else {
    std::size_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      Vector a, b;
      hn::LoadInterleaved2(d, x + 2 * i, a, b);
      a = hn::Mul(a, factors);
      b = hn::Mul(b, factors);
      const Vector c = hn::LoadU(d, angles + i), s = hn::LoadU(d, sines + i);
      hn::StoreInterleaved2(hn::NegMulAdd(b, s, hn::Mul(a, c)), hn::MulAdd(a, s, hn::Mul(b, c)), d, to + 2 * i);
    }
    for (; i < half; ++i) {
      const float a = x[2 * i] * factor, b = x[2 * i + 1] * factor;
      to[2 * i] = a * angles[i] - b * sines[i];
      to[2 * i + 1] = a * sines[i] + b * angles[i];
    }
  }
}

// ---- one query ----

// 2^x for x <= 0; results below the smallest normal number are zero. The polynomial is that of Cephes' exp2f.
HWY_INLINE Vector exp2_of_negative(Vector x) {
  const Floats d;
  const SignedIntegers di;
  const Vector whole = hn::Round(x), rest = hn::Sub(x, whole);
  Vector p = hn::Set(d, 1.535336188319500e-4F);
  for (const float c : {1.339887440266574e-3F, 9.618437357674640e-3F, 5.550332471162809e-2F, 2.402264791363012e-1F,
                        6.931472028550421e-1F, 1.0F}) {
    p = hn::MulAdd(p, rest, hn::Set(d, c));
  }
  const auto power = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, whole), hn::Set(di, 127)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0F)), hn::Mul(p, hn::BitCast(d, power)));
}

// scores[i] = q . row i.
HWY_INLINE void add_scores(const float* q, const float* rows, std::size_t count, std::size_t width, float* scores) {
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* row = rows + i * width;
    Vector sum[4] = {hn::Zero(Floats()), hn::Zero(Floats()), hn::Zero(Floats()), hn::Zero(Floats())};
    each_vector(width, [&](std::size_t j, std::size_t n) HWY_ATTR {
      const Vector qs = load(q + j, n);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < 4; ++r) sum[r] = hn::MulAdd(load(row + r * width + j, n), qs, sum[r]);
    });
    store_sums(sum, scores + i);
  }
  for (; i < count; ++i) {
    scores[i] = sum_vectors(width, [&](std::size_t j, std::size_t n)
                                       HWY_ATTR { return hn::Mul(load(rows + i * width + j, n), load(q + j, n)); });
  }
}

// Replaces scores by 2^(score - the largest), and returns their sum. Writes up to a whole vector.
HWY_INLINE float softmax(float* scores, std::size_t count) {
  const Floats d;
  const Vector lowest = hn::Set(d, -HUGE_VALF);
  Vector most = lowest;
  each_vector(count, [&](std::size_t i, std::size_t n) HWY_ATTR {
    const Vector x =
        n == kLanes ? hn::LoadU(d, scores + i) : hn::IfThenElse(hn::FirstN(d, n), hn::LoadU(d, scores + i), lowest);
    hn::StoreU(x, d, scores + i);
    most = hn::Max(most, x);
  });
  const Vector largest = hn::Set(d, hn::ReduceMax(d, most));
  Vector sum = hn::Zero(d);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const Vector p = exp2_of_negative(hn::Sub(hn::LoadU(d, scores + i), largest));
    hn::StoreU(p, d, scores + i);
    sum = hn::Add(sum, p);
  }
  return hn::ReduceSum(d, sum);
}

// y = factor * the sum of weighted rows, for kVectors vectors of columns. Consecutive rows have sums of their own, as
// one sum would wait for each addition.
template <std::size_t kVectors, std::size_t kSums>
HWY_INLINE void sum_values(const float* weights, const float* values, const Span* spans, std::size_t count,
                           std::size_t width, std::size_t tail, float factor, float* y) {
  const Floats d;
  Vector sum[kSums][kVectors];
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kSums; ++r) {
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kVectors; ++j) sum[r][j] = hn::Zero(d);
  }
  const auto at = [&](const float* row, std::size_t j)
                      HWY_ATTR { return load(row + j * kLanes, kVectors == 1 ? tail : kLanes); };
  for (const Span* span = spans; span != spans + count; ++span) {
    const float* row = values + span->first * width;
    std::size_t i = 0;
    for (; i + kSums <= span->count; i += kSums, row += kSums * width) {
#pragma GCC unroll 8
      for (std::size_t r = 0; r < kSums; ++r) {
        const Vector weight = hn::Set(d, weights[i + r]);
#pragma GCC unroll 8
        for (std::size_t j = 0; j < kVectors; ++j) {
          sum[r][j] = hn::MulAdd(weight, at(row + r * width, j), sum[r][j]);
        }
      }
    }
    for (; i < span->count; ++i, row += width) {
      const Vector weight = hn::Set(d, weights[i]);
#pragma GCC unroll 8
      for (std::size_t j = 0; j < kVectors; ++j) sum[0][j] = hn::MulAdd(weight, at(row, j), sum[0][j]);
    }
    weights += span->count;
  }
  const Vector factors = hn::Set(d, factor);
#pragma GCC unroll 8
  for (std::size_t j = 0; j < kVectors; ++j) {
    Vector total = sum[0][j];
#pragma GCC unroll 8
    for (std::size_t r = 1; r < kSums; ++r) total = hn::Add(total, sum[r][j]);
    store(hn::Mul(total, factors), y + j * kLanes, kVectors == 1 ? tail : kLanes);
  }
}

// The spans of the cache that row `number` sees, in order.
std::size_t visible_spans(const Call& call, std::int64_t number, Span* spans) {
  std::size_t count = 0;
  if (call.persistent > 0) spans[count++] = {0, call.persistent};
  const std::int64_t first = call.first_visible(number);
  const std::size_t visible = call.visible(number);
  for (std::size_t g = 0; g < call.groups; ++g) {
    const std::size_t begin = call.ring_row(g, first), end = call.persistent + (g + 1) * call.ring;
    const std::size_t before_end = std::min(visible, end - begin);
    spans[count++] = {begin, before_end};
    if (before_end < visible) spans[count++] = {end - call.ring, visible - before_end};
  }
  return count;
}

// Writes a row's keys and values to the rings.
HWY_INLINE void write_row(const Call& call, std::size_t unit, std::size_t t) {
  const std::size_t stream = unit / call.heads, head = unit % call.heads, width = call.width;
  const std::size_t cache = call.head_of_cache(stream, head);
  const std::int64_t number = call.position[stream] + static_cast<std::int64_t>(t);
  for (std::size_t g = 0; g < call.groups; ++g) {
    const std::size_t from = call.new_row(stream, g, t, head), to = cache + call.ring_row(g, number) * width;
    rotate_row(call.rotary, call.k + from, call.angles_of(stream, t), width, 1.0F, call.keys + to);
    std::copy_n(call.v + from, width, call.values + to);
  }
}

// Rotates and scales the query of a row.
HWY_INLINE void prepare_query(const Call& call, std::size_t stream, std::size_t head, std::size_t t, float* q) {
  const float scale = kLog2E / std::sqrt(static_cast<float>(call.width));
  rotate_row(call.rotary, call.q + call.query(stream, t, head), call.angles_of(stream, t), call.width, scale, q);
}

// Padding rows get the answer 0.
void clear_padding(const Call& call, std::size_t unit) {
  const std::size_t stream = unit / call.heads, head = unit % call.heads;
  for (std::size_t t = call.valid_rows(stream); t < call.tokens; ++t) {
    std::fill_n(call.y + call.query(stream, t, head), call.width, 0.0F);
  }
}

void attend_rows(const Call& call, std::size_t unit, float* scratch) {
  const std::size_t stream = unit / call.heads, head = unit % call.heads, width = call.width;
  const std::size_t cache = call.head_of_cache(stream, head);
  const float *keys = call.keys + cache, *values = call.values + cache;
  float *q = scratch, *scores = scratch + padded_to_panels(width);
  for (std::size_t t = 0; t < call.valid_rows(stream); ++t) {
    write_row(call, unit, t);
    prepare_query(call, stream, head, t, q);
    Span spans[kMostSpans];
    const std::size_t count = visible_spans(call, call.position[stream] + static_cast<std::int64_t>(t), spans);
    std::size_t visible = 0;
    for (std::size_t i = 0; i < count; ++i) {
      add_scores(q, keys + spans[i].first * width, spans[i].count, width, scores + visible);
      visible += spans[i].count;
    }
    const float factor = 1.0F / softmax(scores, visible);
    float* y = call.y + call.query(stream, t, head);
    std::size_t column = 0;
    for (; column + 4 * kLanes <= width; column += 4 * kLanes) {
      sum_values<4, 2>(scores, values + column, spans, count, width, kLanes, factor, y + column);
    }
    for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
      sum_values<2, 4>(scores, values + column, spans, count, width, kLanes, factor, y + column);
    }
    for (; column < width; column += kLanes) {
      sum_values<1, 4>(scores, values + column, spans, count, width, std::min(kLanes, width - column), factor,
                       y + column);
    }
  }
  clear_padding(call, unit);
}

// ---- tiles of queries ----

// The columns of a packed group.
struct Columns {
  std::size_t old, each;  // rows of the cache, and all rows, of each group

  Columns(const Call& call, std::size_t stream)
      : old(static_cast<std::size_t>(call.position[stream] - call.first_visible(call.position[stream]))),
        each(old + call.valid_rows(stream)) {}
  std::size_t first(const Call& call, std::size_t group) const { return call.persistent + group * each; }
  std::size_t all(const Call& call) const { return first(call, call.groups); }
};

void pack(const Call& call, std::size_t unit, float* scratch, Packed& packed) {
  const Floats d;
  const std::size_t stream = unit / call.heads, head = unit % call.heads, width = call.width;
  const std::size_t cache = call.head_of_cache(stream, head), valid = call.valid_rows(stream);
  const Columns columns(call, stream);
  const std::int64_t first_old = call.first_visible(call.position[stream]);
  // Persistent rows, then for each group its rows of the cache and of the call.
  std::size_t region = 0, row = 0;
  const auto region_rows = [&] { return region == 0 ? call.persistent : region % 2 == 1 ? columns.old : valid; };
  Vector zero_if_finite = hn::Zero(d);
  const std::size_t all = columns.all(call);
  for (std::size_t column = 0; column < all; column += kPanel) {
    const std::size_t count = std::min(kPanel, all - column);
    for (std::size_t i = 0; i < count; ++i, ++row) {
      for (; row == region_rows(); row = 0) ++region;
      const float* value = nullptr;
      if (region != 0 && region % 2 == 0) {
        const std::size_t from = call.new_row(stream, region / 2 - 1, row, head);
        rotate_row(call.rotary, call.k + from, call.angles_of(stream, row), width, 1.0F, scratch + i * width);
        value = call.v + from;
      } else {
        const std::size_t cached =
            region == 0 ? row : call.ring_row(region / 2, first_old + static_cast<std::int64_t>(row));
        std::copy_n(call.keys + cache + cached * width, width, scratch + i * width);
        value = call.values + cache + cached * width;
      }
      float* to = packed.values + (column + i) * width;
      each_vector(width, [&](std::size_t j, std::size_t n) HWY_ATTR {
        const Vector x = load(value + j, n);
        zero_if_finite = hn::MulAdd(x, hn::Zero(d), zero_if_finite);
        store(x, to + j, n);
      });
    }
    transpose(scratch, width, count, width, packed.keys + column * width, kPanel);
  }
  packed.finite = hn::ReduceSum(d, zero_if_finite) == 0.0F;
}

// Replaces the scores of some spans by 2^(score - the largest), and returns their sum.
HWY_INLINE float softmax_spans(float* scores, const Span* spans, std::size_t count) {
  const Floats d;
  const Vector lowest = hn::Set(d, -HUGE_VALF);
  Vector most = lowest;
  for (const Span* span = spans; span != spans + count; ++span) {
    each_vector(span->count, [&](std::size_t i, std::size_t n) HWY_ATTR {
      const Vector x = load(scores + span->first + i, n);
      most = hn::Max(most, n == kLanes ? x : hn::IfThenElse(hn::FirstN(d, n), x, lowest));
    });
  }
  const Vector largest = hn::Set(d, hn::ReduceMax(d, most));
  Vector sum = hn::Zero(d);
  for (const Span* span = spans; span != spans + count; ++span) {
    each_vector(span->count, [&](std::size_t i, std::size_t n) HWY_ATTR {
      float* at = scores + span->first + i;
      const Vector p = exp2_of_negative(hn::Sub(load(at, n), largest));
      store(p, at, n);
      sum = hn::Add(sum, n == kLanes ? p : hn::IfThenElseZero(hn::FirstN(d, n), p));
    });
  }
  return hn::ReduceSum(d, sum);
}

// y = the sums of weighted values, for kRows queries and kVectors vectors of columns. The weights of query i are at
// weights + i * stride.
template <int kRows, int kVectors, bool kTail>
HWY_INLINE void sum_tile(const float* weights, std::size_t stride, const float* values, const Span* spans,
                         std::size_t count, std::size_t width, std::size_t row, std::size_t column,
                         const float* factors, float* y, std::size_t y_stride) {
  Vector sum[kRows][kVectors];
  const std::size_t tail = kTail ? width - column : kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::Zero(Floats());
  }
  for (const Span* span = spans; span != spans + count; ++span) {
    const Product product{weights + span->first, stride, values + span->first * width, width, span->count};
    accumulate<kRows, kVectors, kTail>(product, row, column, tail, sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const Vector factor = hn::Set(Floats(), factors[row + static_cast<std::size_t>(i)]);
    float* to = y + (row + static_cast<std::size_t>(i)) * y_stride + column;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      store(hn::Mul(sum[i][j], factor), to + static_cast<std::size_t>(j) * kLanes, tail);
  }
}

// The same for all rows of a tile.
template <int kVectors, bool kTail>
HWY_INLINE void sum_rows(const float* weights, std::size_t stride, const float* values, const Span* spans,
                         std::size_t count, std::size_t width, std::size_t rows, std::size_t column,
                         const float* factors, float* y, std::size_t y_stride) {
  std::size_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    sum_tile<kTileRows, kVectors, kTail>(weights, stride, values, spans, count, width, row, column, factors, y,
                                         y_stride);
  }
  for (; row < rows; ++row) {
    sum_tile<1, kVectors, kTail>(weights, stride, values, spans, count, width, row, column, factors, y, y_stride);
  }
}

void attend_tile(const Call& call, std::size_t unit, std::size_t tile, const Packed& packed, float* scratch) {
  const std::size_t stream = unit / call.heads, head = unit % call.heads, width = call.width;
  const std::size_t first = tile * kTileQueries, valid = call.valid_rows(stream);
  if (first >= valid) return;
  const std::size_t rows = std::min(kTileQueries, valid - first), stride = score_stride(call);
  float *q = scratch, *scores = scratch + kTileQueries * width;
  for (std::size_t i = 0; i < rows; ++i) prepare_query(call, stream, head, first + i, q + i * width);

  const Columns columns(call, stream);
  const std::int64_t position = call.position[stream], first_old = call.first_visible(position);
  // The columns of a group that row t sees, relative to the group's first one.
  const auto seen = [&](std::size_t t) {
    const auto from = static_cast<std::size_t>(call.first_visible(position + static_cast<std::int64_t>(t)) - first_old);
    return Span{from, columns.old + t + 1 - from};
  };
  // The columns that any query of the tile sees.
  Span spans[kMostSpans];
  std::size_t count = 0;
  if (call.persistent > 0) spans[count++] = {0, call.persistent};
  const Span top = seen(first), bottom = seen(first + rows - 1);
  for (std::size_t g = 0; g < call.groups; ++g) {
    spans[count++] = {columns.first(call, g) + top.first, bottom.first + bottom.count - top.first};
  }

  std::size_t done = 0;  // columns with scores; spans may share a panel
  for (std::size_t s = 0; s < count; ++s) {
    const std::size_t end = spans[s].first + spans[s].count;
    for (std::size_t column = std::max(done, spans[s].first / kPanel * kPanel); column < end; column += kPanel) {
      const Product products[] = {{q, width, packed.keys + column * width, kPanel, width}};
      panel<2, false>(products, 0, rows, 0, 0, [&](Vector sum, std::size_t row, std::size_t j, std::size_t) HWY_ATTR {
        hn::StoreU(sum, Floats(), scores + row * stride + column + j);
      });
      done = column + kPanel;
    }
  }

  float factors[kTileQueries];
  for (std::size_t i = 0; i < rows; ++i) {
    float* of_row = scores + i * stride;
    Span own[kMostSpans];
    std::copy_n(spans, count, own);
    const Span here = seen(first + i);
    for (std::size_t g = 0, s = count - call.groups; g < call.groups; ++g, ++s) {
      own[s] = {columns.first(call, g) + here.first, here.count};
      std::fill(of_row + spans[s].first, of_row + own[s].first, 0.0F);
      std::fill(of_row + own[s].first + own[s].count, of_row + spans[s].first + spans[s].count, 0.0F);
    }
    factors[i] = 1.0F / softmax_spans(of_row, own, count);
  }

  float* y = call.y + call.query(stream, first, head);
  const std::size_t y_stride = call.heads * width;
  std::size_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    sum_rows<2, false>(scores, stride, packed.values, spans, count, width, rows, column, factors, y, y_stride);
  }
  if (column + kLanes <= width) {
    sum_rows<1, false>(scores, stride, packed.values, spans, count, width, rows, column, factors, y, y_stride);
    column += kLanes;
  }
  if (column < width) {
    sum_rows<1, true>(scores, stride, packed.values, spans, count, width, rows, column, factors, y, y_stride);
  }
}

void write(const Call& call, std::size_t unit) {
  const std::size_t valid = call.valid_rows(unit / call.heads);
  // Later rows take the place of earlier ones.
  for (std::size_t t = valid - std::min(valid, call.ring); t < valid; ++t) write_row(call, unit, t);
  clear_padding(call, unit);
}

}  // namespace attention

cached_attention::CpuFunctions cached_attention_functions() {
  return {&attention::turn, &attention::attend_rows, &attention::pack, &attention::attend_tile, &attention::write};
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace titans::kernels::cached_attention {
namespace {

constexpr TargetFunction<CpuFunctions (*)()> kTargets[] = {TITANS_EACH_TARGET(cached_attention_functions)};

class Kernel final : public CpuKernel {
 public:
  Kernel(const Configuration& configuration, const CpuFunctions& functions)
      : configuration_(configuration), functions_(functions) {}

  std::string run(const Operands& o, const Parallel& parallel) const override {
    std::string error = check_operands(configuration_, o);
    if (error.empty()) error = check_values(o);
    if (!error.empty()) return error;
    try {
      const GrowingPool::Lease angles(angles_);
      Work work{*this, make_call(o), nullptr, nullptr, {}, {false}};
      if (work.call.rotary != Rotary::kNone) {
        work.angles = angles.get().floats(work.call.streams * work.call.tokens * work.call.width);
        work.call.angles = work.angles;
      }
      for (const InPlace& pair : kInPlace) {
        const Tensor &from = o[pair.input], &to = o[pair.output];
        if (from.data != to.data) {
          std::memcpy(to.data, from.data, static_cast<std::size_t>(from.elements()) * sizeof(float));
        }
      }
      if (work.angles != nullptr) {
        run_tasks(parallel, work.call.streams, &Work::turn, work,
                  work.call.tokens * work.call.streams * work.call.width);
      }
      attend(parallel, work);
      if (!work.out_of_memory) return {};
    } catch (const std::bad_alloc&) {
    }
    return failure(kOperator, "E1002", "out of memory: no scratch memory", "free memory or open fewer streams");
  }

 private:
  // Below so many rows, packing does not pay.
  static constexpr std::size_t kFewRows = 6;
  // So many units keep all threads busy; fewer share their tiles.
  static constexpr std::size_t kManyUnits = 16;

  struct Work {
    const Kernel& kernel;
    Call call;
    float* angles;
    float* packed_memory;  // of units that share their tiles
    Packed packed[kManyUnits];
    std::atomic<bool> out_of_memory;

    std::size_t units() const { return call.streams * call.heads; }
    std::size_t tiles() const { return (call.tokens + kTileQueries - 1) / kTileQueries; }

    static void turn(void* context, std::size_t stream) {
      const Work& work = *static_cast<const Work*>(context);
      work.kernel.functions_.turn(work.call, stream, work.angles);
    }

    // Each runs on a thread of the caller, which does not catch exceptions.
    static void rows_of_unit(void* context, std::size_t unit) {
      with_scratch(context, [unit](const Work& work, auto& scratch) {
        work.kernel.functions_.attend_rows(work.call, unit, scratch.floats(row_scratch(work.call)));
      });
    }
    static void tiles_of_unit(void* context, std::size_t unit) {
      with_scratch(context, [unit](const Work& work, auto& scratch) {
        const CpuFunctions& functions = work.kernel.functions_;
        const std::size_t packed_floats = Packed::floats(work.call);
        float* memory = scratch.floats(packed_floats + work.most_scratch());
        Packed packed = Packed::at(work.call, memory);
        float* rest = memory + packed_floats;
        functions.pack(work.call, unit, rest, packed);
        if (!packed.finite) return functions.attend_rows(work.call, unit, rest);
        for (std::size_t tile = 0; tile < work.tiles(); ++tile) {
          functions.attend_tile(work.call, unit, tile, packed, rest);
        }
        functions.write(work.call, unit);
      });
    }
    static void pack_unit(void* context, std::size_t unit) {
      with_scratch(context, [unit](Work& work, auto& scratch) {
        work.packed[unit] = Packed::at(work.call, work.packed_memory + unit * Packed::floats(work.call));
        work.kernel.functions_.pack(work.call, unit, scratch.floats(work.most_scratch()), work.packed[unit]);
      });
    }
    static void tile_of_unit(void* context, std::size_t index) {
      with_scratch(context, [index](const Work& work, auto& scratch) {
        const std::size_t unit = index / work.tiles(), tile = index % work.tiles();
        if (!work.packed[unit].finite) return;
        work.kernel.functions_.attend_tile(work.call, unit, tile, work.packed[unit],
                                           scratch.floats(work.most_scratch()));
      });
    }
    static void write_unit(void* context, std::size_t unit) {
      with_scratch(context, [unit](const Work& work, auto& scratch) {
        const CpuFunctions& functions = work.kernel.functions_;
        if (work.packed[unit].finite) return functions.write(work.call, unit);
        functions.attend_rows(work.call, unit, scratch.floats(work.most_scratch()));
      });
    }

    // One size, so that scratch does not grow in the middle of a call.
    std::size_t most_scratch() const { return std::max({row_scratch(call), pack_scratch(call), tile_scratch(call)}); }

    template <class Body>
    static void with_scratch(void* context, const Body& body) {
      Work& work = *static_cast<Work*>(context);
      const FlushSubnormals flush;
      try {
        const GrowingPool::Lease scratch(work.kernel.scratch_);
        body(work, scratch.get());
      } catch (...) {
        work.out_of_memory = true;
      }
    }
  };

  // A NaN or an infinity among values would reach queries that do not see its row, through a weight of 0. Such units
  // are computed row by row.
  void attend(const Parallel& parallel, Work& work) const {
    const std::size_t units = work.units();
    if (work.call.tokens < kFewRows) {
      return run_tasks(parallel, units, &Work::rows_of_unit, work, work.call.tokens * floats_per_row(work.call));
    }
    if (units >= kManyUnits) return run_tasks(parallel, units, &Work::tiles_of_unit, work);
    const GrowingPool::Lease packed(packed_);
    work.packed_memory = packed.get().floats(units * Packed::floats(work.call));
    run_tasks(parallel, units, &Work::pack_unit, work);
    if (work.out_of_memory) return;
    run_tasks(parallel, units * work.tiles(), &Work::tile_of_unit, work);
    run_tasks(parallel, units, &Work::write_unit, work);
  }

  // The number of floats of the cache that all streams read for one row, at their positions.
  static std::size_t floats_per_row(const Call& call) {
    std::size_t rows = 0;
    for (std::size_t b = 0; b < call.streams; ++b) {
      rows += call.persistent + call.groups * call.visible(call.position[b]);
    }
    return 2 * rows * call.heads * call.width;
  }

  // A thread finishes less work than this before it could wake another.
  static constexpr std::size_t kSmallWork = 1 << 15;

  static void run_tasks(const Parallel& parallel, std::size_t count, void (*body)(void*, std::size_t), Work& work,
                        std::size_t floats = kSmallWork) {
    if (count > 1 && floats >= kSmallWork) return parallel.run(parallel.pool, count, body, &work);
    for (std::size_t i = 0; i < count; ++i) body(&work, i);
  }

  Call make_call(const Operands& o) const {
    const Configuration& c = configuration_;
    const auto size = [](std::int64_t value) { return static_cast<std::size_t>(value); };
    const auto floats = [&](Operand which) { return o[which].as<float>(); };
    const auto integers = [&](Operand which) { return o[which].as<const std::int64_t>(); };
    const auto& [pool, heads, rows, width] = o[kKeys].shape;
    Call call{};
    call.q = floats(kQ);
    call.k = floats(kK);
    call.v = floats(kV);
    call.keys = floats(kKeysOut);
    call.values = floats(kValuesOut);
    call.y = floats(kY);
    call.position = integers(kPosition);
    call.increments = integers(kIncrements);
    call.valid = integers(kValid);
    call.slots = integers(kSlots);
    call.streams = size(o[kQ].shape[0]);
    call.tokens = size(o[kQ].shape[1]);
    call.heads = size(heads);
    call.width = size(width);
    call.groups = size(c.groups);
    call.persistent = size(c.persistent);
    call.rows = size(rows);
    call.ring = size(c.ring(rows));
    call.window = c.window;
    call.segment = c.segment;
    call.rotary = c.rotary;
    call.origin = c.origin;
    call.most_old = size(c.most_visible() - 1);
    return call;
  }

  Configuration configuration_;
  CpuFunctions functions_;
  mutable GrowingPool angles_{GrowingScratch::Nothing()}, packed_{GrowingScratch::Nothing()},
      scratch_{GrowingScratch::Nothing()};
};

}  // namespace

std::unique_ptr<CpuKernel> CpuKernel::create(const Configuration& configuration, std::string_view target,
                                             std::string& error) {
  const auto* found = find_target(kTargets, kOperator, target, error);
  return found == nullptr ? nullptr : std::make_unique<Kernel>(configuration, found->function());
}

}  // namespace titans::kernels::cached_attention

#endif  // HWY_ONCE
