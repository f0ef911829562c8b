// AES-256-GCM of the machine's libcrypto (OpenSSL 1.1 or 3), opened at its first use: nothing is linked against it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace titans::core {

inline constexpr std::size_t kKeyBytes = 32;
inline constexpr std::size_t kNonceBytes = 12;
inline constexpr std::size_t kTagBytes = 16;

using StateKey = std::array<std::uint8_t, kKeyBytes>;

// Of libcrypto's own generator. TITANS_UNSUPPORTED where there is no libcrypto.
void fill_random(void* data, std::size_t bytes);
// Whether libcrypto is there.
bool has_crypto() noexcept;

// Turns bytes into as many others, in order; then the tag says whether they are what was encrypted.
class Cipher {
 public:
  enum class Direction : std::uint8_t { kEncrypt, kDecrypt };

  // `associated` is authenticated beside what follows.
  Cipher(Direction direction, const StateKey& key, const std::uint8_t* nonce, const void* associated,
         std::size_t associated_bytes);

  void update(const std::byte* from, std::size_t bytes, std::byte* to);
  // After the last update, of what was encrypted.
  std::array<std::uint8_t, kTagBytes> tag();
  // The same of what was decrypted: nothing of that may be believed before this is true.
  bool matches(const std::uint8_t* tag);

 private:
  struct Free {
    void operator()(void* context) const noexcept;
  };
  std::unique_ptr<void, Free> context_;
};

}  // namespace titans::core
