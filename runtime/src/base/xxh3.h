// XXH3-128 hashes as text, for manifests and state files.
#pragma once

#include <string>
#include <string_view>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace titans::core {

// 32 hexadecimal digits, the most significant first.
inline std::string hex_digits(const XXH128_hash_t& hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string hex;
  for (const unsigned char byte : canonical.digest) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

}  // namespace titans::core
