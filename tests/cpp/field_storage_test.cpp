#include "field_storage.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "manifest.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::FieldStorage;

std::vector<float> unpack(FieldStorage storage, const std::vector<std::uint32_t>& words, std::size_t extent,
                          std::size_t columns) {
  std::vector<float> raw(words.size()), values(extent);
  std::memcpy(raw.data(), words.data(), words.size() * sizeof(float));
  core::unpack_field(storage, raw.data(), extent, columns, values.data());
  return values;
}

TEST(FieldStorage, WordsAreThoseOfTheOperator) {
  EXPECT_EQ(core::field_words(FieldStorage::kFloat32, {5, 33}), 165U);
  EXPECT_EQ(core::field_words(FieldStorage::kBFloat16, {5, 33}), 83U);
  EXPECT_EQ(core::field_words(FieldStorage::kFloat16, {5, 33}), 83U);
  EXPECT_EQ(core::field_words(FieldStorage::kInt8, {5, 33}), 42U + 5U);
  EXPECT_EQ(core::field_words(FieldStorage::kFp8, {33}), 9U + 1U);
  EXPECT_EQ(core::field_words(FieldStorage::kFloat32, {}), 1U);
}

TEST(FieldStorage, ValuesOfHalves) {
  const std::vector<float> bfloat16 = unpack(FieldStorage::kBFloat16, {0xBF803FC0, 0x00004080}, 3, 3);
  EXPECT_EQ(bfloat16, (std::vector<float>{1.5F, -1.0F, 4.0F}));
  // 1, -2; the largest, the smallest; infinity, NaN.
  const std::vector<float> float16 = unpack(FieldStorage::kFloat16, {0xC0003C00, 0x00017BFF, 0x7E007C00}, 6, 6);
  EXPECT_EQ(std::vector<float>(float16.begin(), float16.begin() + 5),
            (std::vector<float>{1.0F, -2.0F, 65504.0F, 0x1p-24F, INFINITY}));
  EXPECT_TRUE(std::isnan(float16[5]));
}

TEST(FieldStorage, ValuesWithScales) {
  // One row of 33: the scale of its first 32 is 0.5, that of its last 2.
  std::vector<std::uint32_t> words(10);
  words[0] = 0x000080FF + (0x7FU << 16);  // -1, -128, 127
  words[8] = 3;
  words[9] = 0x40003F00;
  std::vector<float> values = unpack(FieldStorage::kInt8, words, 33, 33);
  EXPECT_EQ(values[0], -0.5F);
  EXPECT_EQ(values[2], 63.5F);
  EXPECT_EQ(values[3], 0.0F);
  EXPECT_EQ(values[32], 6.0F);
  words[0] = 0x0138B87E;  // 448, -1, 1, the smallest
  values = unpack(FieldStorage::kFp8, words, 33, 33);
  EXPECT_EQ(std::vector<float>(values.begin(), values.begin() + 4),
            (std::vector<float>{224.0F, -0.5F, 0.5F, 0x1p-10F}));
  EXPECT_EQ(values[32], 3 * 0x1p-8F);
}

TEST(FieldStorage, AManifestNamesIt) {
  nlohmann::json manifest = manifest_json();
  nlohmann::json& field = manifest["state"][0]["layout"][0];
  field["storage"] = "bfloat16";
  EXPECT_EQ(core::Manifest::parse(manifest.dump()).state[0].layout[0].storage, FieldStorage::kBFloat16);
  field["storage"] = "int4";
  expect_error(TITANS_FAILED, {"layout[0].storage", "float32, bfloat16, float16, int8, fp8", "int4"},
               [&] { core::Manifest::parse(manifest.dump()); });
}

}  // namespace
}  // namespace titans::test
