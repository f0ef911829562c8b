// The operator ai.titans::CachedAttention: attributes, operands and checks. docs/attention-operator.md is the
// specification; names, shapes and equations are from there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/attribute_table.h"
#include "plugins/kernels/operands.h"

namespace titans::kernels::cached_attention {

inline constexpr const char* kOperator = "CachedAttention";

enum class Rotary : std::uint8_t { kNone, kHalves, kPairs };
enum class Origin : std::uint8_t { kStream, kSegment };
inline constexpr std::array kRotaries{"none", "halves", "pairs"};
inline constexpr std::array kOrigins{"stream", "segment"};

inline constexpr std::int64_t kMostHeads = 1 << 16;
inline constexpr std::int64_t kMostGroups = 16;
inline constexpr std::int64_t kMostRows = std::int64_t{1} << 31;  // keeps every size far from overflow

struct Attributes {
  std::int64_t heads = 0;
  std::int64_t window = 0;
  std::int64_t segment = 0;
  std::int64_t persistent = 0;
  std::int64_t groups = 1;
  std::string rotary = "none";
  std::string origin = "stream";
};

struct Configuration {
  static constexpr const char* kOperator = cached_attention::kOperator;
  using Attributes = cached_attention::Attributes;

  std::int64_t heads = 1;
  std::int64_t window = 0;   // 0: no limit
  std::int64_t segment = 0;  // 0: no segments
  std::int64_t persistent = 0;
  std::int64_t groups = 1;
  Rotary rotary = Rotary::kNone;
  Origin origin = Origin::kStream;

  // The largest number of rows that a query sees in a group.
  std::int64_t most_visible() const {
    if (window == 0 || segment == 0) return window + segment;
    return window < segment ? window : segment;
  }
  // Rows of a group's ring in a cache of this many rows.
  std::int64_t ring(std::int64_t rows) const { return (rows - persistent) / groups; }
};

inline constexpr std::array kAttributes{
    Attribute<Attributes, Configuration>::row<&Attributes::heads, &Configuration::heads>("heads", Presence::kRequired,
                                                                                         between(1, kMostHeads)),
    Attribute<Attributes, Configuration>::row<&Attributes::window, &Configuration::window>(
        "window", Presence::kOptional, between(0, kMostRows)),
    Attribute<Attributes, Configuration>::row<&Attributes::segment, &Configuration::segment>(
        "segment", Presence::kOptional, between(0, kMostRows)),
    Attribute<Attributes, Configuration>::row<&Attributes::persistent, &Configuration::persistent>(
        "persistent", Presence::kOptional, between(0, kMostRows)),
    Attribute<Attributes, Configuration>::row<&Attributes::groups, &Configuration::groups>(
        "groups", Presence::kOptional, between(1, kMostGroups)),
    Attribute<Attributes, Configuration>::row<&Attributes::rotary, &Configuration::rotary>(
        "rotary", Presence::kOptional, one_of(kRotaries)),
    Attribute<Attributes, Configuration>::row<&Attributes::origin, &Configuration::origin>(
        "origin", Presence::kOptional, one_of(kOrigins))};
constexpr const auto& attribute_table(const Attributes& /*of*/) { return kAttributes; }

// The operator's inputs and outputs in order.
enum Operand : std::size_t {
  kKeys,
  kValues,
  kQ,
  kK,
  kV,
  kPosition,
  kIncrements,  // with rotation
  kValid,       // optional
  kSlots,       // optional
  kInputs,      // number of inputs
  kY = kInputs,
  kKeysOut,
  kValuesOut,
  kOperands
};

inline constexpr std::array<const char*, kOperands> kOperandNames{
    "keys", "values", "q", "k", "v", "position", "increments", "valid", "slots", "y", "keys_out", "values_out"};

inline constexpr std::array<InPlace, 2> kInPlace{InPlace{kKeys, kKeysOut}, InPlace{kValues, kValuesOut}};

using Operands = std::array<Tensor, kOperands>;

// The checks return a formatted error (failure.h), or an empty string.

std::string configure(const Attributes& attributes, Configuration& configuration);
// Checks ranks, shapes, dtypes, layout, alignment and aliasing of the operands, without reading their values.
std::string check_operands(const Configuration& configuration, const Operands& operands);
// Checks the ranges of position, increments, valid and slots. The operands have passed check_operands and are in host
// memory.
std::string check_values(const Operands& operands);

}  // namespace titans::kernels::cached_attention
