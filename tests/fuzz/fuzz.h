// Shared code of the fuzz targets. A target is the function LLVMFuzzerTestOneInput. libFuzzer calls it, or replay.cpp
// on machines without clang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace titans::fuzz {

// Aborts unless `holds`, which reports a finding to the fuzzer.
void check(bool holds, std::string_view what);

// Checks that an Error has the standard form.
void check_error(const core::Error& error);

// A target's source of decisions: the input's bytes in order, then zeros.
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
    __builtin_memcpy(&out, &bits, sizeof(out));  // fuzzing machines are little-endian
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

// This process's folder for the files that a target writes. It is removed at exit.
const std::filesystem::path& scratch();

// Whether the file could be written: a fuzzer's file names may be invalid.
bool write(const std::filesystem::path& path, std::string_view content);

// Size and XXH3-128, in the form of a manifest's `files`.
nlohmann::json file_record(std::string_view content);
std::string xxh3_128(std::string_view content);

// A safetensors file: the header's length, the header padded with blanks to a multiple of eight, the data.
std::string safetensors(std::string header, std::string_view data);

}  // namespace titans::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
