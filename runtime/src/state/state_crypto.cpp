#include "state/state_crypto.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"

namespace titans::core {
namespace {

// From openssl/evp.h; same values in 1.1 and 3.
constexpr int kGetTag = 0x10;
constexpr int kSetTag = 0x11;
// OpenSSL takes lengths as int.
constexpr std::size_t kMostAtOnce = std::size_t{1} << 30;
static_assert(kMostAtOnce <= std::numeric_limits<int>::max());

struct Functions {
  int (*random)(unsigned char* data, int bytes);
  const void* (*aes_256_gcm)();
  void* (*new_context)();
  void (*free_context)(void* context);
  int (*control)(void* context, int type, int argument, void* pointer);
  int (*init)(void* context, const void* cipher, void* engine, const unsigned char* key, const unsigned char* nonce,
              int encrypt);
  int (*update)(void* context, unsigned char* out, int* written, const unsigned char* in, int bytes);
  int (*finish)(void* context, unsigned char* out, int* written);
};

template <typename Function>
void find(void* library, const char* name, const std::string& from, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function != nullptr) return;
  throw Error(TITANS_UNSUPPORTED, "E0409", "state", text("encryption needs libcrypto: ", from, " has no ", name),
              "install OpenSSL 1.1 or 3");
}

Functions open_functions() {
  // TITANS_LIBCRYPTO selects a library elsewhere, also in tests.
  const char* named = std::getenv("TITANS_LIBCRYPTO");
  std::vector<std::string> names{"libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so"};
  if (named != nullptr && *named != '\0') names = {named};
  void* library = nullptr;
  std::string name;
  for (std::size_t i = 0; library == nullptr && i < names.size(); ++i) {
    name = names[i];
    library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    const char* why = ::dlerror();
    throw Error(TITANS_UNSUPPORTED, "E0409", "state",
                text("encryption needs libcrypto: ", why == nullptr ? "not found" : why),
                "install OpenSSL 1.1 or 3 (Debian and Ubuntu: apt install libssl3), or save without a key");
  }
  // Never closed, because it registers exit handlers.
  Functions functions{};
  find(library, "RAND_bytes", name, functions.random);
  find(library, "EVP_aes_256_gcm", name, functions.aes_256_gcm);
  find(library, "EVP_CIPHER_CTX_new", name, functions.new_context);
  find(library, "EVP_CIPHER_CTX_free", name, functions.free_context);
  find(library, "EVP_CIPHER_CTX_ctrl", name, functions.control);
  find(library, "EVP_CipherInit_ex", name, functions.init);
  find(library, "EVP_CipherUpdate", name, functions.update);
  find(library, "EVP_CipherFinal_ex", name, functions.finish);
  return functions;
}

const Functions& crypto() {
  static const Functions functions = open_functions();  // retried by the next call if it throws
  return functions;
}

void check(int result) {
  if (result == 1) return;
  throw Error(TITANS_FAILED, "E0409", "state", "libcrypto refused AES-256-GCM",
              "check that this installation of OpenSSL allows it");
}

const unsigned char* bytes_of(const void* data) { return static_cast<const unsigned char*>(data); }

}  // namespace

void fill_random(void* data, std::size_t bytes) {
  check(crypto().random(static_cast<unsigned char*>(data), static_cast<int>(bytes)));
}

bool has_crypto() noexcept {
  try {
    (void)crypto();
    return true;
  } catch (...) {
    return false;
  }
}

void Cipher::Free::operator()(void* context) const noexcept { crypto().free_context(context); }

Cipher::Cipher(Direction direction, const StateKey& key, const std::uint8_t* nonce, const void* associated,
               std::size_t associated_bytes)
    : context_(crypto().new_context()) {
  check(context_ != nullptr ? 1 : 0);
  const int encrypt = direction == Direction::kEncrypt ? 1 : 0;
  check(crypto().init(context_.get(), crypto().aes_256_gcm(), nullptr, key.data(), nonce, encrypt));
  int written = 0;
  check(crypto().update(context_.get(), nullptr, &written, bytes_of(associated), static_cast<int>(associated_bytes)));
}

void Cipher::update(const std::byte* from, std::size_t bytes, std::byte* to) {
  while (bytes > 0) {
    const std::size_t now = std::min(bytes, kMostAtOnce);
    int written = 0;
    check(crypto().update(context_.get(), reinterpret_cast<unsigned char*>(to), &written, bytes_of(from),
                          static_cast<int>(now)));
    from += now;
    to += now;
    bytes -= now;
  }
}

std::array<std::uint8_t, kTagBytes> Cipher::tag() {
  std::array<std::uint8_t, kTagBytes> tag{};
  unsigned char nothing[kTagBytes];
  int written = 0;
  check(crypto().finish(context_.get(), nothing, &written));
  check(crypto().control(context_.get(), kGetTag, static_cast<int>(tag.size()), tag.data()));
  return tag;
}

bool Cipher::matches(const std::uint8_t* tag) {
  std::array<std::uint8_t, kTagBytes> expected{};
  std::copy_n(tag, expected.size(), expected.begin());
  check(crypto().control(context_.get(), kSetTag, static_cast<int>(expected.size()), expected.data()));
  unsigned char nothing[kTagBytes];
  int written = 0;
  return crypto().finish(context_.get(), nothing, &written) == 1;
}

}  // namespace titans::core
