// AES-256-GCM from the system's libcrypto (OpenSSL 1.1 or 3), loaded at first use. Nothing is linked against it.
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

// Uses libcrypto's generator. Throws TITANS_UNSUPPORTED without libcrypto.
void fill_random(void* data, std::size_t bytes);
// True if libcrypto is available.
bool has_crypto() noexcept;

// Encrypts or decrypts a byte sequence in order. The tag then authenticates it.
class Cipher {
 public:
  enum class Direction : std::uint8_t { kEncrypt, kDecrypt };

  // `associated` is authenticated but not encrypted.
  Cipher(Direction direction, const StateKey& key, const std::uint8_t* nonce, const void* associated,
         std::size_t associated_bytes);

  void update(const std::byte* from, std::size_t bytes, std::byte* to);
  // The tag of encrypted data. Call after the last update.
  std::array<std::uint8_t, kTagBytes> tag();
  // Checks the tag of decrypted data. Do not use the data unless this returns true.
  bool matches(const std::uint8_t* tag);

 private:
  struct Free {
    void operator()(void* context) const noexcept;
  };
  std::unique_ptr<void, Free> context_;
};

}  // namespace titans::core
