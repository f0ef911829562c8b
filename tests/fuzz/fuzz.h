// What fuzz targets share. A target is the function LLVMFuzzerTestOneInput; libFuzzer calls it, and replay.cpp on
// machines without clang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace titans::fuzz {

// Ends the program, which is how a fuzzer learns of a finding.
void check(bool holds, std::string_view what);

// That an Error has the one form that errors have.
void check_error(const core::Error& error);

// What a target takes decisions from: bytes from the front, zeros once they are used up.
class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  bool any_left() const { return at_ < size_; }
  std::uint8_t byte() { return any_left() ? data_[at_++] : 0; }
  std::size_t below(std::size_t end) { return byte() % end; }
  template <typename Number>
  Number number() {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < sizeof(Number); ++i) bits |= std::uint64_t{byte()} << (8 * i);
    Number out;
    static_assert(sizeof(out) <= sizeof(bits));
    __builtin_memcpy(&out, &bits, sizeof(out));  // the low bytes come first on the machines that fuzz
    return out;
  }
  std::string text(std::size_t most) {
    std::string out;
    for (std::size_t left = below(most + 1); left > 0; --left) out += static_cast<char>(byte());
    return out;
  }
  std::string rest() {
    std::string out(reinterpret_cast<const char*>(data_) + at_, size_ - at_);
    at_ = size_;
    return out;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

// A folder of this process's own for the files that a target writes, gone at its end.
const std::filesystem::path& scratch();

// Whether the file could be written: a fuzzer's names need not be any.
bool write(const std::filesystem::path& path, std::string_view content);

// Size and XXH3-128 as a manifest's `files` has them.
nlohmann::json file_record(std::string_view content);
std::string xxh3_128(std::string_view content);

// A safetensors file: the length of the header, the header padded with blanks to a multiple of eight, the data.
std::string safetensors(std::string header, std::string_view data);

}  // namespace titans::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
