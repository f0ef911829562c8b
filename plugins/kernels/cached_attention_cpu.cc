// CachedAttention on the CPU. A head of a stream processes its rows one by one: it writes the row's key and value to
// the rings, computes a score for each visible row of the cache, and sums up the values. Rows that the query does not
// see are never read.
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
  std::size_t ring_row(std::size_t group, std::int64_t number) const {
    return persistent + group * ring + static_cast<std::size_t>(number) % ring;
  }
};

// Consecutive rows of the cache.
struct Span {
  std::size_t first, count;
};

// The functions of one instruction set.
struct CpuFunctions {
  // Writes the angles of the valid rows of one stream.
  void (*turn)(const Call& call, std::size_t stream, float* angles);
  // Processes the rows of one stream's head.
  void (*attend)(const Call& call, std::size_t stream, std::size_t head, float* scratch);
};

// Floats of scratch for one head.
inline std::size_t scratch_floats(const Call& call) {
  constexpr std::size_t kPadding = 16;  // a vector of any instruction set
  return call.width + call.rows + 2 * kPadding;
}

}  // namespace titans::kernels::cached_attention

#endif  // TITANS_CACHED_ATTENTION_CALL_

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {
namespace attention {

using namespace titans::kernels::cached_attention;

using Integers = hn::RebindToUnsigned<Floats>;
using SignedIntegers = hn::RebindToSigned<Floats>;
inline constexpr std::size_t kMostSpans = 1 + 2 * static_cast<std::size_t>(kMostGroups);
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

// y = factor * the sum of weighted rows, for kVectors vectors of columns.
template <std::size_t kVectors>
HWY_INLINE void sum_values(const float* weights, const float* values, const Span* spans, std::size_t count,
                           std::size_t width, std::size_t tail, float factor, float* y) {
  const Floats d;
  Vector even[kVectors], odd[kVectors];
  for (std::size_t j = 0; j < kVectors; ++j) even[j] = odd[j] = hn::Zero(d);
  const auto at = [&](const float* row, std::size_t j)
                      HWY_ATTR { return load(row + j * kLanes, j + 1 == kVectors ? tail : kLanes); };
  for (const Span* span = spans; span != spans + count; ++span) {
    const float* row = values + span->first * width;
    std::size_t i = 0;
    for (; i + 2 <= span->count; i += 2, row += 2 * width) {
      const Vector first = hn::Set(d, weights[i]), second = hn::Set(d, weights[i + 1]);
      for (std::size_t j = 0; j < kVectors; ++j) even[j] = hn::MulAdd(first, at(row, j), even[j]);
      for (std::size_t j = 0; j < kVectors; ++j) odd[j] = hn::MulAdd(second, at(row + width, j), odd[j]);
    }
    if (i < span->count) {
      const Vector first = hn::Set(d, weights[i]);
      for (std::size_t j = 0; j < kVectors; ++j) even[j] = hn::MulAdd(first, at(row, j), even[j]);
    }
    weights += span->count;
  }
  const Vector factors = hn::Set(d, factor);
  for (std::size_t j = 0; j < kVectors; ++j) {
    store(hn::Mul(hn::Add(even[j], odd[j]), factors), y + j * kLanes, j + 1 == kVectors ? tail : kLanes);
  }
}

// The spans of the cache that row `number` sees, in order.
std::size_t visible_spans(const Call& call, std::int64_t number, Span* spans) {
  std::size_t count = 0;
  if (call.persistent > 0) spans[count++] = {0, call.persistent};
  const std::int64_t first = call.first_visible(number);
  const auto visible = static_cast<std::size_t>(number - first + 1);
  for (std::size_t g = 0; g < call.groups; ++g) {
    const std::size_t begin = call.ring_row(g, first), end = call.persistent + (g + 1) * call.ring;
    const std::size_t before_end = std::min(visible, end - begin);
    spans[count++] = {begin, before_end};
    if (before_end < visible) spans[count++] = {end - call.ring, visible - before_end};
  }
  return count;
}

void attend(const Call& call, std::size_t stream, std::size_t head, float* scratch) {
  const std::size_t width = call.width, stride = call.heads * width, valid = call.valid_rows(stream);
  const std::size_t cache = call.head_of_cache(stream, head);
  float *keys = call.keys + cache, *values = call.values + cache, *q = scratch, *scores = scratch + width;
  const float scale = kLog2E / std::sqrt(static_cast<float>(width));
  for (std::size_t t = 0; t < valid; ++t) {
    const std::int64_t number = call.position[stream] + static_cast<std::int64_t>(t);
    const std::size_t row = stream * call.tokens + t;
    const float* angles = call.angles == nullptr ? nullptr : call.angles + row * width;
    rotate_row(call.rotary, call.q + row * stride + head * width, angles, width, scale, q);
    for (std::size_t g = 0; g < call.groups; ++g) {
      const std::size_t from = ((stream * call.groups + g) * call.tokens + t) * stride + head * width;
      const std::size_t to = call.ring_row(g, number) * width;
      rotate_row(call.rotary, call.k + from, angles, width, 1.0F, keys + to);
      std::copy_n(call.v + from, width, values + to);
    }
    Span spans[kMostSpans];
    const std::size_t count = visible_spans(call, number, spans);
    std::size_t visible = 0;
    for (std::size_t i = 0; i < count; ++i) {
      add_scores(q, keys + spans[i].first * width, spans[i].count, width, scores + visible);
      visible += spans[i].count;
    }
    const float factor = 1.0F / softmax(scores, visible);
    float* y = call.y + row * stride + head * width;
    std::size_t column = 0;
    for (; column + 4 * kLanes <= width; column += 4 * kLanes) {
      sum_values<4>(scores, values + column, spans, count, width, kLanes, factor, y + column);
    }
    for (; column < width; column += kLanes) {
      sum_values<1>(scores, values + column, spans, count, width, std::min(kLanes, width - column), factor, y + column);
    }
  }
  for (std::size_t t = valid; t < call.tokens; ++t) {
    std::fill_n(call.y + (stream * call.tokens + t) * stride + head * width, width, 0.0F);
  }
}

}  // namespace attention

cached_attention::CpuFunctions cached_attention_functions() { return {&attention::turn, &attention::attend}; }

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
      Work work{*this, make_call(o), nullptr, {false}};
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
      if (work.angles != nullptr) run_tasks(parallel, work.call.streams, &Work::turn, work);
      run_tasks(parallel, work.call.streams * work.call.heads, &Work::attend, work);
      if (!work.out_of_memory) return {};
    } catch (const std::bad_alloc&) {
    }
    return failure(kOperator, "E1002", "out of memory: no scratch memory", "free memory or open fewer streams");
  }

 private:
  struct Work {
    const Kernel& kernel;
    Call call;
    float* angles;
    std::atomic<bool> out_of_memory;

    static void turn(void* context, std::size_t stream) {
      const Work& work = *static_cast<const Work*>(context);
      work.kernel.functions_.turn(work.call, stream, work.angles);
    }

    // Runs on a thread of the caller, which does not catch exceptions.
    static void attend(void* context, std::size_t index) {
      Work& work = *static_cast<Work*>(context);
      const FlushSubnormals flush;
      try {
        const GrowingPool::Lease scratch(work.kernel.scratch_);
        work.kernel.functions_.attend(work.call, index / work.call.heads, index % work.call.heads,
                                      scratch.get().floats(scratch_floats(work.call)));
      } catch (...) {
        work.out_of_memory = true;
      }
    }
  };

  static void run_tasks(const Parallel& parallel, std::size_t count, void (*body)(void*, std::size_t), Work& work) {
    if (count == 1) {
      body(&work, 0);
    } else {
      parallel.run(parallel.pool, count, body, &work);
    }
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
    return call;
  }

  Configuration configuration_;
  CpuFunctions functions_;
  mutable GrowingPool angles_{GrowingScratch::Nothing()}, scratch_{GrowingScratch::Nothing()};
};

}  // namespace

std::unique_ptr<CpuKernel> CpuKernel::create(const Configuration& configuration, std::string_view target,
                                             std::string& error) {
  const auto* found = find_target(kTargets, kOperator, target, error);
  return found == nullptr ? nullptr : std::make_unique<Kernel>(configuration, found->function());
}

}  // namespace titans::kernels::cached_attention

#endif  // HWY_ONCE
