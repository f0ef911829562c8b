// SHA-256 (FIPS 180-4), for hashes that an attacker cannot make again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace titans::core {

class Sha256 {
 public:
  void add(std::string_view bytes);
  std::string hex();  // 64 digits; call it once, at the end

 private:
  void block(const unsigned char* bytes);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> open_{};
  std::size_t filled_ = 0;
  std::uint64_t bytes_ = 0;
};

inline std::string sha256(std::string_view bytes) {
  Sha256 hash;
  hash.add(bytes);
  return hash.hex();
}

}  // namespace titans::core
