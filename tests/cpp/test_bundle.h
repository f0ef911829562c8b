// Bundles and files for tests, in temporary folders.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace titans::test {

class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

void write_file(const std::filesystem::path& path, const std::string& content);
std::string read_file(const std::filesystem::path& path);

// A safetensors file: the header's length, the header padded with blanks, the data.
std::string safetensors(std::string header, const std::string& data);
std::string float_bytes(const std::vector<float>& values);

// The manifest for write_bundle: vocabulary 8; graphs of 4 tokens (at multiples of 2), 2 and 1; state "layers.0.memory"
// [1, 1, 4] with the fields W0 [1, 2] and S0 [2], and "layers.0.last" [1, 1].
nlohmann::json manifest_json();

inline constexpr std::size_t kFakeInputs = 2;   // floats of an input vector
inline constexpr std::size_t kFakeOutputs = 3;  // floats of an output vector

// The same for a bundle that takes vectors, with input x and output y.
nlohmann::json vectors_json();

// Adds the sizes and hashes of the folder's files to `manifest` and writes it.
void write_manifest(const std::filesystem::path& folder, nlohmann::json manifest);
void write_bundle(const std::filesystem::path& folder);
void write_bundle(const std::filesystem::path& folder, const nlohmann::json& manifest);

// Checks that `action` throws an Error of this status, in the standard form, with all the words.
template <typename Action>
void expect_error(titans_status status, const std::vector<std::string>& words, Action&& action) {
  try {
    action();
    ADD_FAILURE() << "no error";
  } catch (const core::Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.status(), status) << message;
    for (const char* part : {"[", "] ", ". Fix: ", " (TITANS-E"}) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string& word : words)
      EXPECT_NE(message.find(word), std::string::npos) << message << " lacks " << word;
  }
}

}  // namespace titans::test
