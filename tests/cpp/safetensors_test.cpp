#include "base/safetensors.h"

#include <cstring>

#include <gtest/gtest.h>

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
                        "new": {"dtype": "F8_E9M9", "shape": [4], "data_offsets": [4, 8]}})",
                    float_bytes({1.5F, 2.5F})));
  const core::MappedFile file(folder_.path() / "t.safetensors");
  const core::Tensors tensors = core::read_safetensors(file, "t.safetensors");
  EXPECT_EQ(tensors.size(), 2U);  // unknown types are skipped
  float one = 0.0F;
  std::memcpy(&one, tensors.at("one").data, sizeof(one));
  EXPECT_EQ(one, 1.5F);
  EXPECT_EQ(tensors.at("none").shape, (core::Shape{0, 3}));
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

}  // namespace
}  // namespace titans::test
