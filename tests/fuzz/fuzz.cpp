#include "fuzz.h"

#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "base/xxh3.h"

namespace titans::fuzz {
namespace {

struct Scratch {
  Scratch() {
    std::string pattern = (std::filesystem::temp_directory_path() / "titans-fuzz-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path = pattern;
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::filesystem::path path;
};

}  // namespace

void check(bool holds, std::string_view what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: expected %.*s\n", static_cast<int>(what.size()), what.data());
  std::abort();
}

void check_error(const core::Error& error) {
  const std::string message = error.what();
  for (const char* part : {"[", "] ", ". Fix: ", " (TITANS-E"}) {
    check(message.find(part) != std::string::npos, "an error of the one form, unlike: " + message);
  }
  check(message.find('\n') == std::string::npos, "an error of one line");
  check(error.status() != TITANS_OK, "an error whose status is one");
}

const std::filesystem::path& scratch() {
  static const Scratch folder;
  return folder.path;
}

bool write(const std::filesystem::path& path, std::string_view content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  file.close();
  return file.good();
}

std::string xxh3_128(std::string_view content) {
  return core::hex_digits(XXH3_128bits(content.data(), content.size()));
}

nlohmann::json file_record(std::string_view content) {
  return {{"bytes", content.size()}, {"xxh3_128", xxh3_128(content)}};
}

std::string safetensors(std::string header, std::string_view data) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string file;
  for (std::size_t i = 0; i < 8; ++i) file += static_cast<char>((header.size() >> (8 * i)) & 0xff);
  return file.append(header).append(data);
}

}  // namespace titans::fuzz
