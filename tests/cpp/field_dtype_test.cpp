#include "bundle/field_dtype.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "bundle/manifest.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::FieldDtype;

std::vector<float> unpack(FieldDtype dtype, const std::vector<std::uint32_t>& words, std::size_t extent,
                          std::size_t columns) {
  std::vector<float> raw(words.size()), values(extent);
  std::memcpy(raw.data(), words.data(), words.size() * sizeof(float));
  core::unpack_field(dtype, raw.data(), extent, columns, values.data());
  return values;
}

TEST(FieldDtype, WordsAreThoseOfTheOperator) {
  EXPECT_EQ(core::field_words(FieldDtype::kFloat32, {5, 33}), 165U);
  EXPECT_EQ(core::field_words(FieldDtype::kBFloat16, {5, 33}), 83U);
  EXPECT_EQ(core::field_words(FieldDtype::kFloat16, {5, 33}), 83U);
  EXPECT_EQ(core::field_words(FieldDtype::kInt8, {5, 33}), 42U + 5U);
  EXPECT_EQ(core::field_words(FieldDtype::kFp8, {33}), 9U + 1U);
  EXPECT_EQ(core::field_words(FieldDtype::kFloat32, {}), 1U);
}

TEST(FieldDtype, ValuesOfHalves) {
  const std::vector<float> bfloat16 = unpack(FieldDtype::kBFloat16, {0xBF803FC0, 0x00004080}, 3, 3);
  EXPECT_EQ(bfloat16, (std::vector<float>{1.5F, -1.0F, 4.0F}));
  // 1, -2; the largest and the smallest; infinity, NaN.
  const std::vector<float> float16 = unpack(FieldDtype::kFloat16, {0xC0003C00, 0x00017BFF, 0x7E007C00}, 6, 6);
  EXPECT_EQ(std::vector<float>(float16.begin(), float16.begin() + 5),
            (std::vector<float>{1.0F, -2.0F, 65504.0F, 0x1p-24F, INFINITY}));
  EXPECT_TRUE(std::isnan(float16[5]));
}

TEST(FieldDtype, ValuesWithScales) {
  // One row of 33 elements. The scale of the first 32 is 0.5, the scale of the last is 2.
  std::vector<std::uint32_t> words(10);
  words[0] = 0x000080FF + (0x7FU << 16);  // -1, -128, 127
  words[8] = 3;
  words[9] = 0x40003F00;
  std::vector<float> values = unpack(FieldDtype::kInt8, words, 33, 33);
  EXPECT_EQ(values[0], -0.5F);
  EXPECT_EQ(values[2], 63.5F);
  EXPECT_EQ(values[3], 0.0F);
  EXPECT_EQ(values[32], 6.0F);
  words[0] = 0x0138B87E;  // 448, -1, 1, the smallest
  values = unpack(FieldDtype::kFp8, words, 33, 33);
  EXPECT_EQ(std::vector<float>(values.begin(), values.begin() + 4),
            (std::vector<float>{224.0F, -0.5F, 0.5F, 0x1p-10F}));
  EXPECT_EQ(values[32], 3 * 0x1p-8F);
}

std::vector<std::uint32_t> pack(FieldDtype dtype, const std::vector<float>& values, std::size_t columns) {
  const auto rows = static_cast<std::int64_t>(values.size() / columns);
  std::vector<float> raw(core::field_words(dtype, {rows, static_cast<std::int64_t>(columns)}), -1.0F);
  core::pack_field(dtype, values.data(), values.size(), columns, raw.data());
  std::vector<std::uint32_t> words(raw.size());
  std::memcpy(words.data(), raw.data(), words.size() * sizeof(float));
  return words;
}

TEST(FieldDtype, PacksToTheNearestEven) {
  // 1 + 2^-8 and 1 + 3 * 2^-8 are ties; the largest float32 overflows to infinity.
  EXPECT_EQ(pack(FieldDtype::kBFloat16, {0x1.01p0F, 0x1.03p0F, 0x1.fffffep127F, -NAN, -0.0F}, 5),
            (std::vector<std::uint32_t>{0x3F823F80, 0x7FC07F80, 0x00008000}));
  // 1 + 2^-11 is a tie. 65519 is the largest finite input. Half of the smallest rounds to 0, one and a half to two.
  EXPECT_EQ(pack(FieldDtype::kFloat16, {0x1.002p0F, 65519.0F, 65520.0F, -INFINITY, 0x1p-25F, 0x1.8p-24F}, 6),
            (std::vector<std::uint32_t>{0x7BFF3C00, 0xFC007C00, 0x00020000}));
  // The largest subnormal, and a value that rounds up to the smallest normal number.
  EXPECT_EQ(pack(FieldDtype::kFloat16, {0x3FFp-24F, 0x7FFp-25F}, 2), (std::vector<std::uint32_t>{0x040003FF}));
}

TEST(FieldDtype, PacksBlocksWithAScale) {
  std::vector<float> values(66, 0.0F);  // two rows of 33
  values[0] = 127.0F, values[1] = -1.5F, values[2] = 2.5F, values[32] = 1e-38F, values[33] = NAN, values[65] = -254.0F;
  std::vector<std::uint32_t> words = pack(FieldDtype::kInt8, values, 33);
  ASSERT_EQ(words.size(), 19U);
  EXPECT_EQ(words[0], 0x0002FE7FU);   // 127, -2, 2: ties to even
  EXPECT_EQ(words[16], 0x00008100U);  // -127
  EXPECT_EQ(words[17], 0x00003F80U);  // 1, 0: too small for a scale
  EXPECT_EQ(words[18], 0x40007FC0U);  // NaN, 2
  std::fill(values.begin(), values.end(), 0.0F);
  values[0] = 448.0F, values[1] = -0x1.1p0F, values[2] = 0x1p-10F, values[3] = 0x1.8p-9F, values[4] = 0x1.ep-7F;
  words = pack(FieldDtype::kFp8, values, 33);
  EXPECT_EQ(words[0], 0x0200B87EU);  // 448, -1, 0, 2^-8: ties to even; scale 1
  EXPECT_EQ(words[1], 0x00000008U);  // 15/16 of the smallest normal number rounds up to it
}

TEST(FieldDtype, AManifestNamesIt) {
  nlohmann::json manifest = manifest_json();
  nlohmann::json& field = manifest["state"][0]["layout"][0];
  field["dtype"] = "bfloat16";
  EXPECT_EQ(core::Manifest::parse(manifest.dump()).state[0].layout[0].dtype, FieldDtype::kBFloat16);
  field["dtype"] = "int4";
  expect_error(TITANS_FAILED, {"layout[0].dtype", "float32, bfloat16, float16, int8, fp8", "int4"},
               [&] { core::Manifest::parse(manifest.dump()); });
}

}  // namespace
}  // namespace titans::test
