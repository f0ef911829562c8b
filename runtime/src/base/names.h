// The check of names and texts that come from a file, and the one way to print them. titans_export/names.py has the
// same rules; a test compares the two.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace titans::core {

inline constexpr std::size_t kLongestName = 128;
inline constexpr std::size_t kLongestKey = 512;    // bytes of a key of JSON
inline constexpr std::size_t kLongestText = 4096;  // bytes of a text

// True if a name may become a part of a path, a word of a script or a label: letters, digits and . _ - +, beginning
// with a letter, a digit or _.
inline bool is_plain(std::string_view name) noexcept {
  const auto is_letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  if (name.empty() || name.size() > kLongestName || !is_letter(name[0])) return false;
  for (const char c : name) {
    if (!is_letter(c) && c != '.' && c != '-' && c != '+') return false;
  }
  return true;
}

// Characters that a terminal obeys or does not show: controls, marks of direction and width, line separators, tags.
inline bool is_hidden(std::uint32_t code) noexcept {
  constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 11> kHidden{{{0x00, 0x1F},
                                                                             {0x7F, 0x9F},
                                                                             {0xAD, 0xAD},
                                                                             {0x61C, 0x61C},
                                                                             {0x180E, 0x180E},
                                                                             {0x200B, 0x200F},
                                                                             {0x2028, 0x202E},
                                                                             {0x2060, 0x206F},
                                                                             {0xFEFF, 0xFEFF},
                                                                             {0xFFF9, 0xFFFB},
                                                                             {0xE0000, 0xE007F}}};
  for (const auto& [first, last] : kHidden) {
    if (code >= first && code <= last) return true;
  }
  return false;
}

struct Utf8Character {
  std::uint32_t code;
  std::size_t bytes;
};

// The character that begins at `at`; none if the bytes there are not UTF-8.
inline std::optional<Utf8Character> utf8_at(std::string_view text, std::size_t at) noexcept {
  const auto byte = [&](std::size_t index) {
    return static_cast<std::uint32_t>(static_cast<unsigned char>(text[index]));
  };
  const std::uint32_t first = byte(at);
  if (first < 0x80) return Utf8Character{first, 1};
  const std::size_t bytes = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() - at < bytes) return std::nullopt;
  std::uint32_t code = first & (0x7FU >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    const std::uint32_t next = byte(at + i);
    if ((next & 0xC0U) != 0x80) return std::nullopt;
    code = (code << 6) | (next & 0x3FU);
  }
  const bool overlong = (bytes == 3 && code < 0x800) || (bytes == 4 && code < 0x10000);
  if (overlong || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) return std::nullopt;
  return Utf8Character{code, bytes};
}

inline bool is_utf8(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    const std::optional<Utf8Character> character = utf8_at(text, at);
    if (!character) return false;
    at += character->bytes;
  }
  return true;
}

// True for UTF-8 without hidden characters.
inline bool is_text(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    const std::optional<Utf8Character> character = utf8_at(text, at);
    if (!character || is_hidden(character->code)) return false;
    at += character->bytes;
  }
  return true;
}

// The text with hidden characters as escapes, such as \x1b. Bytes that are not UTF-8 stay: a path may have them.
inline std::string shown(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const std::optional<Utf8Character> character = utf8_at(text, at);
    const std::size_t bytes = character ? character->bytes : 1;
    if (character && is_hidden(character->code)) {
      std::array<char, 12> escape{};
      const char* const format = character->code < 0x100     ? "\\x%02x"
                                 : character->code < 0x10000 ? "\\u%04x"
                                                             : "\\U%08x";
      std::snprintf(escape.data(), escape.size(), format, static_cast<unsigned>(character->code));
      out += escape.data();
    } else {
      out += text.substr(at, bytes);
    }
    at += bytes;
  }
  return out;
}

}  // namespace titans::core
