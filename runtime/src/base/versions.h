// Version numbers of libraries.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace titans::core {

struct Version {
  int major;
  int minor;

  // Parses "10.3.0", "1.32.0.dev1" or "10.13". No value unless the text begins with two numbers.
  static std::optional<Version> parse(std::string_view source) {
    const auto number = [&]() -> std::optional<int> {
      constexpr int kMost = 99999;
      int value = 0;
      std::size_t digits = 0;
      while (digits < source.size() && source[digits] >= '0' && source[digits] <= '9' && value <= kMost) {
        value = value * 10 + (source[digits++] - '0');
      }
      if (digits == 0 || value > kMost) return std::nullopt;
      source.remove_prefix(digits);
      return value;
    };
    const std::optional<int> first = number();
    if (!first || source.empty() || source.front() != '.') return std::nullopt;
    source.remove_prefix(1);
    const std::optional<int> second = number();
    return second ? std::optional(Version{*first, *second}) : std::nullopt;
  }

  bool operator==(const Version& other) const { return major == other.major && minor == other.minor; }
  std::string text() const { return std::to_string(major) + "." + std::to_string(minor); }
};

}  // namespace titans::core
