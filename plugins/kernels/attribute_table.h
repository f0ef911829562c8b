// Attribute tables: one row per attribute of an operator. A row has the name, the member in the struct of raw values,
// the member in the configuration, and the allowed values. Every adapter reads and writes attributes through the table.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "plugins/kernels/failure.h"

namespace titans::kernels {

// The allowed values of an attribute. Use the functions below to make one.
struct Allowed {
  const char* const* names = nullptr;  // of an enumeration
  std::size_t count = 0;               // number of names, or maximum length of a list
  std::int64_t least = 0, most = 0;    // bounds of an integer
  bool zero = false;                   // whether a float may be 0
};

template <std::size_t kCount>
constexpr Allowed one_of(const std::array<const char*, kCount>& names) {
  return {names.data(), kCount, 0, 0, false};
}
constexpr Allowed flag() { return {nullptr, 0, 0, 1, false}; }
constexpr Allowed between(std::int64_t least, std::int64_t most) { return {nullptr, 0, least, most, false}; }
constexpr Allowed up_to(std::size_t values, std::int64_t least, std::int64_t most) {
  return {nullptr, values, least, most, false};
}
constexpr Allowed above_zero() { return {}; }
constexpr Allowed at_least_zero() { return {nullptr, 0, 0, 0, true}; }

// Each decode() checks a raw value and stores it in the configuration, or returns "expected X, got Y".

inline std::string expected(const std::string& wanted, const std::string& got) {
  return "expected " + wanted + ", got " + got;
}

inline std::string expected_range(const Allowed& allowed, std::int64_t got) {
  const bool two = allowed.least == 0 && allowed.most == 1;
  return expected(two ? "0 or 1" : "[" + std::to_string(allowed.least) + ", " + std::to_string(allowed.most) + "]",
                  std::to_string(got));
}

template <typename Enum>
std::string decode(const Allowed& allowed, const std::string& raw, Enum& to) {
  std::string all;
  for (std::size_t i = 0; i < allowed.count; ++i) {
    if (raw == allowed.names[i]) {
      to = static_cast<Enum>(i);
      return {};
    }
    all += (i == 0 ? "\"" : " or \"") + std::string(allowed.names[i]) + "\"";
  }
  return expected(all, "\"" + raw + "\"");
}

template <typename Integer>
std::string decode(const Allowed& allowed, std::int64_t raw, Integer& to) {
  if (raw < allowed.least || raw > allowed.most) return expected_range(allowed, raw);
  to = static_cast<Integer>(raw);
  return {};
}

// configure() sets the default of a missing value.
inline std::string decode(const Allowed& allowed, const std::optional<std::int64_t>& raw, std::int64_t& to) {
  return raw ? decode(allowed, *raw, to) : std::string();
}

inline std::string decode(const Allowed& allowed, float raw, float& to) {
  if (!std::isfinite(raw) || raw < 0.0F || (raw == 0.0F && !allowed.zero)) {
    return expected(std::string("a finite number ") + (allowed.zero ? "of at least" : "above") + " 0",
                    std::to_string(raw));
  }
  to = raw;
  return {};
}

template <std::size_t kCount>
std::string decode(const Allowed& allowed, const std::vector<std::int64_t>& raw, std::array<std::int64_t, kCount>& to) {
  if (raw.size() < 2 || raw.size() > allowed.count) {
    return expected("2 to " + std::to_string(allowed.count) + " values", std::to_string(raw.size()));
  }
  for (const std::int64_t value : raw) {
    if (value < allowed.least || value > allowed.most) return expected_range(allowed, value);
  }
  std::copy(raw.begin(), raw.end(), to.begin());
  return {};
}

enum class Presence : std::uint8_t { kRequired, kOptional };

// A row of the table. A missing optional attribute keeps its initial value in the struct of raw values.
template <class Attributes, class Configuration>
struct Attribute {
  using Member =
      std::variant<std::string Attributes::*, std::int64_t Attributes::*, std::optional<std::int64_t> Attributes::*,
                   float Attributes::*, std::vector<std::int64_t> Attributes::*>;

  const char* name;
  bool required;
  Allowed allowed;
  Member member;
  std::string (*check)(const Allowed& allowed, const Attributes& from, Configuration& to);

  template <auto kRaw, auto kDecoded>
  static constexpr Attribute row(const char* name, Presence presence, const Allowed& allowed) {
    return {name, presence == Presence::kRequired, allowed, Member(kRaw),
            [](const Allowed& values, const Attributes& from, Configuration& to) {
              return decode(values, from.*kRaw, to.*kDecoded);
            }};
  }
};

template <class Row, std::size_t kFirst, std::size_t kSecond>
constexpr std::array<Row, kFirst + kSecond> join(const std::array<Row, kFirst>& first,
                                                 const std::array<Row, kSecond>& second) {
  std::array<Row, kFirst + kSecond> all{};
  for (std::size_t i = 0; i < kFirst; ++i) all[i] = first[i];
  for (std::size_t i = 0; i < kSecond; ++i) all[kFirst + i] = second[i];
  return all;
}

// Checks all values and stores them in the configuration. Returns the first error, or an empty string.
template <class Table, class Attributes, class Configuration>
std::string decode_all(const Table& table, const Attributes& attributes, Configuration& configuration) {
  for (const auto& row : table) {
    const std::string problem = row.check(row.allowed, attributes, configuration);
    if (problem.empty()) continue;
    return failure(Configuration::kOperator, "E0701", "invalid attribute " + std::string(row.name) + ": " + problem,
                   kExportAgain);
  }
  return {};
}

// Reads all attributes. read(name, value) sets the value if the attribute is present, and returns whether it is.
// Returns an error if a required attribute is missing.
template <class Table, class Attributes, class Read>
std::string read_all(const char* where, const Table& table, Attributes& attributes, const Read& read) {
  for (const auto& row : table) {
    const bool found = std::visit([&](auto member) -> bool { return read(row.name, attributes.*member); }, row.member);
    if (!found && row.required) {
      return failure(where, "E0703", "missing attribute: " + std::string(row.name), kExportAgain);
    }
  }
  return {};
}

// Calls write(name, value) for each attribute.
template <class Table, class Attributes, class Write>
void write_all(const Table& table, const Attributes& attributes, const Write& write) {
  for (const auto& row : table) {
    std::visit([&](auto member) { write(row.name, attributes.*member); }, row.member);
  }
}

template <class Table>
bool has_attribute(const Table& table, std::string_view name) {
  return std::any_of(table.begin(), table.end(), [&](const auto& row) { return name == row.name; });
}

}  // namespace titans::kernels
