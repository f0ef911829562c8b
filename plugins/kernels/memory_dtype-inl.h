// The memory dtypes of a packed row. Matrices are read as vectors of float32, and written with the rounding of
// docs/operator.md. Compiled once per instruction set.

#if defined(TITANS_MEMORY_DTYPE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_MEMORY_DTYPE_INL_H_
#undef TITANS_MEMORY_DTYPE_INL_H_
#else
#define TITANS_MEMORY_DTYPE_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "plugins/kernels/memory_common.h"
#include "plugins/kernels/rounding.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

using Bits = hn::RebindToUnsigned<Floats>;
using Integers = hn::RebindToSigned<Floats>;

inline constexpr std::uint32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;
inline constexpr std::uint16_t kNanScale = 0x7FC0;
inline constexpr std::size_t kBlock = static_cast<std::size_t>(kScaleBlock);
static_assert(kBlock % kLanes == 0, "a vector lies in one block");

// A matrix in a packed row, without gaps between its rows. Scales, if the dtype has them, follow in their own words.
struct Stored {
  void* elements;
  std::uint16_t* scales;
  std::size_t rows, columns;

  std::size_t blocks() const { return (columns + kBlock - 1) / kBlock; }
};

// A float32 matrix, as in a packed row's other fields.
inline Stored plain_matrix(const float* data, std::size_t rows, std::size_t columns) {
  return {const_cast<float*>(data), nullptr, rows, columns};
}

// The field of a weight tensor, `offset` words into a row.
inline Stored stored_tensor(const MemoryConfiguration& c, float* row, std::int64_t offset, int tensor) {
  float* begin = row + offset;
  float* scales = begin + element_words(c.memory_dtype, c.rows(tensor), c.columns(tensor));
  return {begin, reinterpret_cast<std::uint16_t*>(scales), static_cast<std::size_t>(c.rows(tensor)),
          static_cast<std::size_t>(c.columns(tensor))};
}

// The noise of one field's elements at one chunk update. When off, values are rounded to the nearest.
struct Noise {
  bool on = false;
  NoiseKeys keys;
};

HWY_INLINE hn::Vec<Bits> mix_bits(hn::Vec<Bits> x) {
  const Bits d;
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<16>(x)), hn::Set(d, kMixFirst));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<15>(x)), hn::Set(d, kMixSecond));
  return hn::Xor(x, hn::ShiftRight<16>(x));
}

// The upper 24 bits of the noise of elements from `element` on.
HWY_INLINE hn::Vec<Integers> noise_bits(const Noise& noise, std::size_t element) {
  const Bits d;
  const auto index = hn::Iota(d, static_cast<std::uint32_t>(element));
  const auto first = mix_bits(hn::Xor(index, hn::Set(d, noise.keys.first)));
  return hn::BitCast(Integers(), hn::ShiftRight<8>(mix_bits(hn::Xor(first, hn::Set(d, noise.keys.second)))));
}

// Rounds magnitudes, in units of an element's last bit, to whole numbers. `element`: the first one's index in its
// field.
HWY_INLINE Vector round_steps(Vector steps, const Noise& noise, std::size_t element) {
  const Floats d;
  if (!noise.on) return hn::Round(steps);
  const Vector low = hn::Floor(steps), above = hn::Sub(steps, low);
  const Vector u = hn::Mul(hn::ConvertTo(d, noise_bits(noise, element)), hn::Set(d, 0x1p-24F));
  return hn::Add(low, hn::IfThenElseZero(hn::Lt(u, above), hn::Set(d, 1.0F)));
}

// The exponent e with 2^e <= magnitude < 2^(e + 1), but at least `least`.
HWY_INLINE hn::Vec<Integers> exponents(Vector magnitude, int least) {
  const Integers d;
  const auto biased = hn::ShiftRight<23>(hn::BitCast(d, magnitude));
  return hn::Max(hn::Sub(biased, hn::Set(d, 127)), hn::Set(d, least));
}

HWY_INLINE Vector power_of_two(hn::Vec<Integers> exponent) {
  const Integers d;
  return hn::BitCast(Floats(), hn::ShiftLeft<23>(hn::Add(exponent, hn::Set(d, 127))));
}

template <class To>
HWY_INLINE void store_elements(To d, hn::Vec<To> v, hn::TFromD<To>* to, std::size_t count) {
  count == kLanes ? hn::StoreU(v, d, to) : hn::StoreN(v, d, to, count);
}

template <class From>
HWY_INLINE hn::Vec<From> load_elements(From d, const hn::TFromD<From>* from, std::size_t count) {
  return count == kLanes ? hn::LoadU(d, from) : hn::LoadN(d, from, count);
}

// ---- elements without a scale ----

// A memory dtype has an element type, load() to float32, and pack(), which rounds float32 to elements.
struct Float32 {
  using Element = float;
  static constexpr bool kScaled = false;
  static HWY_INLINE Vector load(const float* from, std::size_t count) { return HWY_NAMESPACE::load(from, count); }
  static HWY_INLINE Vector pack(Vector v, const Noise&, std::size_t, float* to, std::size_t count) {
    HWY_NAMESPACE::store(v, to, count);
    return v;
  }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static constexpr bool kScaled = false;
  using Half = hn::Rebind<std::uint16_t, Floats>;
  static HWY_INLINE Vector load(const std::uint16_t* from, std::size_t count) {
    const auto raw = load_elements(Half(), from, count);
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(Bits(), raw)));
  }
  // Returns the stored values.
  static HWY_INLINE Vector pack(Vector v, const Noise& noise, std::size_t element, std::uint16_t* to,
                                std::size_t count) {
    const Bits d;
    const auto raw = hn::BitCast(d, v);
    auto rounded = raw;
    if (noise.on) {
      const auto above = hn::BitCast(Integers(), hn::ShiftLeft<8>(hn::And(raw, hn::Set(d, 0xFFFF))));
      const auto up = hn::RebindMask(d, hn::Lt(noise_bits(noise, element), above));
      rounded = hn::Add(raw, hn::IfThenElseZero(up, hn::Set(d, 0x10000)));
    } else {
      const auto odd = hn::And(hn::ShiftRight<16>(raw), hn::Set(d, 1));
      rounded = hn::Add(raw, hn::Add(odd, hn::Set(d, 0x7FFF)));
    }
    const auto quiet = hn::Or(raw, hn::Set(d, 0x00400000));
    rounded = hn::IfThenElse(hn::RebindMask(d, hn::IsNaN(v)), quiet, rounded);
    store_elements(Half(), hn::TruncateTo(Half(), hn::ShiftRight<16>(rounded)), to, count);
    return hn::BitCast(Floats(), hn::And(rounded, hn::Set(d, 0xFFFF0000)));
  }
};

struct Float16 {
  using Element = hwy::float16_t;
  static constexpr bool kScaled = false;
  using Half = hn::Rebind<hwy::float16_t, Floats>;
  static HWY_INLINE Vector load(const hwy::float16_t* from, std::size_t count) {
    return hn::PromoteTo(Floats(), load_elements(Half(), from, count));
  }
  static HWY_INLINE Vector pack(Vector v, const Noise& noise, std::size_t element, hwy::float16_t* to,
                                std::size_t count) {
    const Floats d;
    const Integers i;
    const Vector magnitude = hn::Abs(v);
    const auto exponent = exponents(magnitude, -14);
    const Vector steps = hn::Mul(magnitude, power_of_two(hn::Sub(hn::Set(i, 10), exponent)));
    Vector rounded = hn::Mul(round_steps(steps, noise, element), power_of_two(hn::Sub(exponent, hn::Set(i, 10))));
    const Vector infinity = hn::BitCast(d, hn::Set(Bits(), kInfinity));
    rounded = hn::IfThenElse(hn::Gt(rounded, hn::Set(d, 65504.0F)), infinity, rounded);
    rounded = hn::IfThenElse(hn::IsNaN(v), v, hn::CopySign(rounded, v));
    store_elements(Half(), hn::DemoteTo(Half(), rounded), to, count);
    return rounded;
  }
};

// ---- elements with a scale ----

struct Int8 {
  using Element = std::int8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = kLargestInt8;
  static constexpr float kUnit = 1.0F;  // the scale of load()'s values
  using Quarter = hn::Rebind<std::int8_t, Floats>;
  static HWY_INLINE Vector load(const std::int8_t* from, std::size_t count) {
    return hn::ConvertTo(Floats(), hn::PromoteTo(Integers(), load_elements(Quarter(), from, count)));
  }
  // The values are in units of the scale.
  static HWY_INLINE Vector pack(Vector v, const Noise& noise, std::size_t element, std::int8_t* to, std::size_t count) {
    const Vector whole = hn::Min(round_steps(hn::Abs(v), noise, element), hn::Set(Floats(), kLargest));
    const auto code = hn::NearestInt(hn::CopySign(whole, v));
    store_elements(Quarter(), hn::DemoteTo(Quarter(), code), to, count);
    return hn::ConvertTo(Floats(), code);
  }
};

struct Fp8 {
  using Element = std::uint8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = kLargestFp8;
  using Quarter = hn::Rebind<std::uint8_t, Floats>;
  // Interpreted as float16, the bits give 2^-8 of the value, subnormal numbers included.
  static constexpr float kUnit = 256.0F;
  static HWY_INLINE Vector load(const std::uint8_t* from, std::size_t count) {
    const hn::Rebind<std::uint16_t, Floats> d;
    const auto raw = hn::PromoteTo(d, load_elements(Quarter(), from, count));
    const auto magnitude = hn::ShiftLeft<7>(hn::And(raw, hn::Set(d, 0x7F)));
    const auto sign = hn::ShiftLeft<8>(hn::And(raw, hn::Set(d, 0x80)));
    return hn::PromoteTo(Floats(), hn::BitCast(hn::Rebind<hwy::float16_t, Floats>(), hn::Or(magnitude, sign)));
  }
  static HWY_INLINE Vector pack(Vector v, const Noise& noise, std::size_t element, std::uint8_t* to,
                                std::size_t count) {
    const Integers d;
    const Vector magnitude = hn::Abs(v);
    const auto exponent = hn::Min(exponents(magnitude, -6), hn::Set(d, 8));
    const Vector steps = hn::Mul(magnitude, power_of_two(hn::Sub(hn::Set(d, 3), exponent)));
    const Vector whole = round_steps(steps, noise, element);
    const Vector rounded =
        hn::Min(hn::Mul(whole, power_of_two(hn::Sub(exponent, hn::Set(d, 3)))), hn::Set(Floats(), kLargest));
    // An exponent has 8 steps. 16 of them are the first step of the next exponent.
    const auto base = hn::ShiftLeft<3>(hn::Add(exponent, hn::Set(d, 6)));
    const auto code = hn::Min(hn::Add(base, hn::NearestInt(whole)), hn::Set(d, 0x7E));
    const auto sign = hn::ShiftRight<24>(hn::And(hn::BitCast(Bits(), v), hn::Set(Bits(), 0x80000000)));
    store_elements(Quarter(), hn::TruncateTo(Quarter(), hn::Or(hn::BitCast(Bits(), code), sign)), to, count);
    return hn::CopySign(rounded, v);
  }
};

// ---- matrices ----

HWY_INLINE float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t whole = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &whole, sizeof(value));
  return value;
}

// The elements of a matrix, for loops that read it.
template <class MemoryDtype>
struct View {
  explicit View(const Stored& stored)
      : elements(static_cast<const typename MemoryDtype::Element*>(stored.elements)),
        scales(stored.scales),
        rows(stored.rows),
        columns(stored.columns),
        blocks(stored.blocks()) {}

  HWY_INLINE Vector load(std::size_t row, std::size_t column, std::size_t count) const {
    const Vector v = unscaled(row, column, count);
    if constexpr (MemoryDtype::kScaled) return hn::Mul(v, scale(row, column / kBlock));
    return v;
  }
  // Elements without their scale, and the factor of a block.
  HWY_INLINE Vector unscaled(std::size_t row, std::size_t column, std::size_t count) const {
    return MemoryDtype::load(elements + row * columns + column, count);
  }
  HWY_INLINE Vector scale(std::size_t row, std::size_t block) const {
    return hn::Set(Floats(), MemoryDtype::kUnit * from_bfloat16(scales[row * blocks + block]));
  }

  const typename MemoryDtype::Element* HWY_RESTRICT elements;
  const std::uint16_t* HWY_RESTRICT scales;
  std::size_t rows, columns, blocks;
};

template <class MemoryDtype>
void unpack_matrix(const Stored& from, float* to) {
  const View<MemoryDtype> view(from);
  if constexpr (!MemoryDtype::kScaled) {
    each_vector(from.rows * from.columns, [&](std::size_t i, std::size_t n)
                                              HWY_ATTR { store(MemoryDtype::load(view.elements + i, n), to + i, n); });
    return;
  }
  for (std::size_t row = 0; row < from.rows; ++row, to += from.columns) {
    each_vector(from.columns,
                [&](std::size_t column, std::size_t n) HWY_ATTR { store(view.load(row, column, n), to + column, n); });
  }
}

// A block's scale and the reciprocal that its values are multiplied by.
struct Scale {
  std::uint16_t bits;
  float value, reciprocal;
};

HWY_INLINE Scale block_scale(const float* values, std::size_t count, float largest) {
  const Bits d;
  auto most = hn::Zero(d);
  each_vector(count, [&](std::size_t i, std::size_t n) HWY_ATTR {
    most = hn::Max(most, hn::And(hn::BitCast(d, load(values + i, n)), hn::Set(d, kMagnitude)));
  });
  std::uint32_t bits = hn::ReduceMax(d, most);
  if (bits >= kInfinity) return {kNanScale, from_bfloat16(kNanScale), 0.0F};
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  if (top < kSmallestBlock) return {0, 0.0F, 0.0F};
  const float exact = top / largest;
  std::memcpy(&bits, &exact, sizeof(bits));
  const auto up = static_cast<std::uint16_t>((bits + 0xFFFF) >> 16);
  return {up, from_bfloat16(up), 1.0F / from_bfloat16(up)};
}

// Rounds a float32 matrix into the row. Writes the stored values to `kept`, which may be `from`.
template <class MemoryDtype>
void pack_matrix(const float* from, const Stored& to, const Noise& noise, float* kept) {
  auto* elements = static_cast<typename MemoryDtype::Element*>(to.elements);
  if constexpr (!MemoryDtype::kScaled) {
    each_vector(to.rows * to.columns, [&](std::size_t i, std::size_t n) HWY_ATTR {
      store(MemoryDtype::pack(load(from + i, n), noise, i, elements + i, n), kept + i, n);
    });
  } else {
    std::uint16_t* scales = to.scales;
    for (std::size_t row = 0; row < to.rows; ++row) {
      for (std::size_t column = 0; column < to.columns; column += kBlock) {
        const std::size_t begin = row * to.columns + column, count = HWY_MIN(kBlock, to.columns - column);
        const Scale scale = block_scale(from + begin, count, MemoryDtype::kLargest);
        *scales++ = scale.bits;
        const bool usable = scale.reciprocal != 0.0F;
        const Vector value = hn::Set(Floats(), scale.value), reciprocal = hn::Set(Floats(), scale.reciprocal);
        each_vector(count, [&](std::size_t i, std::size_t n) HWY_ATTR {
          const std::size_t at = begin + i;
          const Vector scaled = usable ? hn::Mul(load(from + at, n), reciprocal) : hn::Zero(Floats());
          store(hn::Mul(MemoryDtype::pack(scaled, noise, at, elements + at, n), value), kept + at, n);
        });
      }
    }
  }
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
