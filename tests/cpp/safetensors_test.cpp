#include "base/safetensors.h"

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "base/xxh3.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

class SafetensorsTest : public testing::Test {
 protected:
  void write(const std::string& content) { write_file(folder_.path() / "t.safetensors", content); }

  void refuse(const std::string& content, const std::vector<std::string>& words) {
    write(content);
    expect_error(TITANS_FAILED, words, [&] {
      const core::MappedFile file(folder_.path() / "t.safetensors");
      core::read_safetensors(file, "t.safetensors");
    });
  }

  // A tensor "x" with this entry, and eight bytes of data.
  void refuse_entry(const std::string& entry, const std::vector<std::string>& words) {
    refuse(safetensors(R"({"x": )" + entry + "}", std::string(8, 'x')), words);
  }

  TemporaryFolder folder_;
};

TEST_F(SafetensorsTest, ReadsWhatIsThere) {
  write(safetensors(R"({"__metadata__": {"a": "b"}, "none": {"dtype": "I64", "shape": [0, 3], "data_offsets": [0, 0]},
                        "one": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
                        "two": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
                    float_bytes({1.5F, 2.5F})));
  const core::MappedFile file(folder_.path() / "t.safetensors");
  const core::Tensors tensors = core::read_safetensors(file, "t.safetensors");
  EXPECT_EQ(tensors.size(), 3U);
  float one = 0.0F;
  std::memcpy(&one, tensors.at("one").data, sizeof(one));
  EXPECT_EQ(one, 1.5F);
  EXPECT_EQ(tensors.at("none").shape, (core::Shape{0, 3}));
}

TEST_F(SafetensorsTest, OffsetsBeyond4GiB) {
  constexpr std::uintmax_t kHole = (std::uintmax_t{5} << 30) + 64;
  const std::string range = std::to_string(kHole) + ", " + std::to_string(kHole + 4);
  const std::string start = safetensors(
      R"({"hole": {"dtype": "U8", "shape": [)" + std::to_string(kHole) + R"(], "data_offsets": [0, )" +
          std::to_string(kHole) + R"(]}, "far": {"dtype": "F32", "shape": [1], "data_offsets": [)" + range + "]}}",
      "");
  write(start);
  const std::filesystem::path path = folder_.path() / "t.safetensors";
  std::filesystem::resize_file(path, start.size() + kHole);  // a hole takes no disk
  std::ofstream(path, std::ios::binary | std::ios::app) << float_bytes({2.5F});
  const core::MappedFile file(path);
  const core::Tensors tensors = core::read_safetensors(file, "t.safetensors");
  EXPECT_EQ(tensors.at("hole").bytes, kHole);
  float far = 0.0F;
  const std::byte* data = tensors.at("far").data;
  EXPECT_EQ(static_cast<std::uintmax_t>(data - file.data()), start.size() + kHole);
  std::memcpy(&far, data, sizeof(far));
  EXPECT_EQ(far, 2.5F);
  file.release();  // the mapping stays
  std::memcpy(&far, data, sizeof(far));
  EXPECT_EQ(far, 2.5F);
}

TEST_F(SafetensorsTest, HashOfSeveralBlocks) {
  std::string content(std::size_t{20} << 20, '\0');
  for (std::size_t i = 0; i < content.size(); i += 4093) content[i] = static_cast<char>(i / 4093);
  write(content);
  const core::MappedFile file(folder_.path() / "t.safetensors");
  EXPECT_EQ(file.hash(), core::hex_digits(XXH3_128bits(content.data(), content.size())));
  EXPECT_EQ(file.text(), content);
}

TEST_F(SafetensorsTest, LyingLength) {
  refuse("", {"0 bytes"});
  refuse("1234567", {"7 bytes"});
  refuse(std::string(8, '\xff'), {"at most 0 bytes", "18446744073709551615"});
  refuse(std::string("\x05\0\0\0\0\0\0\0", 8) + "{}  ", {"at most 4 bytes"});
}

TEST_F(SafetensorsTest, NoJson) {
  refuse(safetensors("{", ""), {"not JSON"});
  refuse(safetensors("[]", ""), {"[]"});
  refuse(safetensors(std::string(100000, '['), ""), {"deeper than 64 levels"});
  refuse(safetensors(R"({"x": "\xff"})", ""), {"not JSON"});
}

TEST_F(SafetensorsTest, WrongEntries) {
  refuse_entry("3", {"x", "an object"});
  refuse_entry(R"({"dtype": "F32", "shape": [2]})", {"x.data_offsets"});
  refuse_entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [0]})", {"two offsets"});
  refuse_entry(R"({"dtype": 1, "shape": [2], "data_offsets": [0, 8]})", {"x.dtype", "a string"});
  refuse_entry(R"({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})", {"x.shape[0]", "-2"});
  refuse_entry(R"({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]})", {"x.shape[0]", "2.0"});
  refuse_entry(R"({"dtype": "F8_E9M9", "shape": [8], "data_offsets": [0, 8]})", {"x.dtype", "F8_E9M9"});
  refuse_entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1})", {"data_offsets alone"});
  refuse(safetensors(R"({"__metadata__": {"a": 1}})", ""), {"__metadata__.a", "a string"});
}

TEST_F(SafetensorsTest, OffsetsOutOfBounds) {
  refuse_entry(R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]})", {"x.data_offsets[1]", "12"});
  refuse_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [8, 4]})", {"x.data_offsets[1]"});
  refuse_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]})", {"x.data_offsets[0]"});
  refuse_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [18446744073709551612, 4]})", {"x.data_offsets[0]"});
}

TEST_F(SafetensorsTest, BytesUnlikeTheShape) {
  refuse_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]})", {"float32 [1]", "8 bytes"});
  refuse_entry(R"({"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]})", {"x", "0 bytes"});
  refuse_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [2, 6]})", {"aligned"});
}

TEST_F(SafetensorsTest, Overlap) {
  refuse(safetensors(R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                         "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})",
                     std::string(8, 'x')),
         {"tensors a and b overlap"});
}

// Readers differ in what they do with bytes that belong to no tensor.
TEST_F(SafetensorsTest, BytesOfNoTensor) {
  const auto header = [](const std::string& range) {
    return R"({"a": {"dtype": "U8", "shape": [4], "data_offsets": )" + range + "}}";
  };
  refuse(safetensors(header("[4, 8]"), std::string(8, 'x')), {"a gap of 4 bytes before tensor a"});
  refuse(safetensors(header("[0, 4]"), std::string(8, 'x')), {"4 bytes after the last tensor"});
}

}  // namespace
}  // namespace titans::test
