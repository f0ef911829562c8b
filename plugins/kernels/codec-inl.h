// Reads a head's matrices in their memory dtype, and rounds them at the end of a chunk. Compiled once per instruction
// set.

#if defined(TITANS_CODEC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_CODEC_INL_H_
#undef TITANS_CODEC_INL_H_
#else
#define TITANS_CODEC_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "plugins/kernels/gemv-inl.h"
#include "plugins/kernels/memory_common.h"
#include "plugins/kernels/memory_dtype-inl.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

// Operations on a head's matrices, by memory dtype.
struct Codec {
  bool direct;  // the row has float32, which is used in place
  void (*gemv)(Pass pass, const Gemv& g);
  void (*gemv_transposed)(const Stored& w, const float* x, float* y);
  void (*unpack)(const Stored& from, float* to);
  void (*pack)(const float* from, const Stored& to, const Noise& noise, float* kept);
};

template <class MemoryDtype>
inline constexpr Codec kCodec{std::is_same_v<MemoryDtype, Float32>, &gemv<MemoryDtype>, &gemv_transposed<MemoryDtype>,
                              &unpack_matrix<MemoryDtype>, &pack_matrix<MemoryDtype>};

inline const Codec& codec_of(MemoryDtype memory_dtype) {
  switch (memory_dtype) {
    case MemoryDtype::kBFloat16:
      return kCodec<BFloat16>;
    case MemoryDtype::kFloat16:
      return kCodec<Float16>;
    case MemoryDtype::kInt8:
      return kCodec<Int8>;
    case MemoryDtype::kFp8:
      return kCodec<Fp8>;
    default:
      return kCodec<Float32>;
  }
}

// Rounds W and S into a row when a chunk update is committed, one weight tensor after the other.
class Rounded {
 public:
  Rounded(const MemoryConfiguration& configuration, const WeightLayout& layout, const Codec& codec, float* row,
          std::uint32_t head)
      : c_(configuration), layout_(layout), codec_(codec), row_(row), head_(head) {}

  // next = values + their last rounding error. With error feedback, the chunk update starts from this sum.
  void add_error(int tensor, bool surprise, const float* values, float* next) const {
    codec_.unpack(error(tensor, surprise), next);
    each_vector(static_cast<std::size_t>(c_.elements(tensor)), [&](std::size_t i, std::size_t n) HWY_ATTR {
      store(hn::Add(load(values + i, n), load(next + i, n)), next + i, n);
    });
  }

  // Rounds `next` into the row and writes the rounded values to `kept`. Overwrites `next`.
  void store_tensor(int tensor, bool surprise, float* next, float* kept) const {
    Noise noise;
    if (c_.rounding == Rounding::kStochastic) {
      noise = {true, noise_keys(c_.seed, head_, static_cast<std::uint32_t>(tensor), surprise, chunk_updates())};
    }
    codec_.pack(next, field(tensor, surprise), noise, kept);
    if (c_.rounding != Rounding::kErrorFeedback) return;
    each_vector(static_cast<std::size_t>(c_.elements(tensor)), [&](std::size_t i, std::size_t n) HWY_ATTR {
      store(hn::Sub(load(next + i, n), load(kept + i, n)), next + i, n);
    });
    codec_.pack(next, error(tensor, surprise), Noise(), next);
  }

  // Counts the chunk update, after all tensors of a committed chunk.
  void count() const {
    if (c_.rounding != Rounding::kStochastic) return;
    const std::uint32_t after = chunk_updates() + 1;
    std::memcpy(row_ + layout_.chunk_updates, &after, sizeof(after));
  }

  Stored field(int tensor, bool surprise) const {
    return stored_tensor(c_, row_, (surprise ? layout_.s : layout_.w)[static_cast<std::size_t>(tensor)], tensor);
  }

 private:
  Stored error(int tensor, bool surprise) const {
    return stored_tensor(c_, row_, (surprise ? layout_.es : layout_.ew)[static_cast<std::size_t>(tensor)], tensor);
  }

  std::uint32_t chunk_updates() const {
    std::uint32_t count;
    std::memcpy(&count, row_ + layout_.chunk_updates, sizeof(count));
    return count;
  }

  const MemoryConfiguration& c_;
  const WeightLayout& layout_;
  const Codec& codec_;
  float* row_;
  std::uint32_t head_;
};

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
