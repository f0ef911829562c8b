#include "stream/sampler.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Sampler;
using core::Sampling;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Probabilities 1/4, 1/8, 1/2, 1/8, unsorted.
const std::vector<float> kLogits{std::log(2.0F), std::log(1.0F), std::log(4.0F), std::log(1.0F)};

// Checks that the frequencies of draws match `probabilities`.
void expect_distribution(const Sampling& sampling, const std::vector<float>& logits,
                         const std::vector<double>& probabilities) {
  constexpr int kDraws = 20000;
  Sampler sampler(sampling);
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    ++counts[static_cast<std::size_t>(sampler.sample(logits, static_cast<std::uint64_t>(i)))];
  }
  for (std::size_t token = 0; token < counts.size(); ++token) {
    const double p = probabilities[token];
    // Five standard deviations. The seed is fixed, so the test is deterministic.
    EXPECT_NEAR(static_cast<double>(counts[token]) / kDraws, p, 5.0 * std::sqrt(p * (1.0 - p) / kDraws)) << token;
  }
}

Sampling with(double temperature, std::int32_t top_k, double top_p, double min_p) {
  return {temperature, top_k, top_p, min_p, 42};
}

TEST(Sampler, Plain) { expect_distribution(with(1.0, 0, 1.0, 0.0), kLogits, {0.25, 0.125, 0.5, 0.125}); }

TEST(Sampler, Temperature) {
  // Weights 2, 1, 4, 1 squared.
  expect_distribution(with(0.5, 0, 1.0, 0.0), kLogits, {4.0 / 22, 1.0 / 22, 16.0 / 22, 1.0 / 22});
}

TEST(Sampler, TopK) {
  expect_distribution(with(1.0, 2, 1.0, 0.0), kLogits, {1.0 / 3, 0, 2.0 / 3, 0});
  // Among equals, the smaller token stays.
  expect_distribution(with(1.0, 3, 1.0, 0.0), kLogits, {2.0 / 7, 1.0 / 7, 4.0 / 7, 0});
  expect_distribution(with(1.0, 100, 1.0, 0.0), kLogits, {0.25, 0.125, 0.5, 0.125});
}

TEST(Sampler, TopP) {
  expect_distribution(with(1.0, 0, 0.4, 0.0), kLogits, {0, 0, 1, 0});
  expect_distribution(with(1.0, 0, 0.6, 0.0), kLogits, {1.0 / 3, 0, 2.0 / 3, 0});
  expect_distribution(with(1.0, 0, 0.8, 0.0), kLogits, {2.0 / 7, 1.0 / 7, 4.0 / 7, 0});
}

TEST(Sampler, MinP) {
  expect_distribution(with(1.0, 0, 1.0, 0.3), kLogits, {1.0 / 3, 0, 2.0 / 3, 0});
  expect_distribution(with(1.0, 0, 1.0, 1.0), kLogits, {0, 0, 1, 0});
}

TEST(Sampler, TopPCountsWhatTopKLeft) {
  // Of all tokens, 0.6 needs two. Of the two that top_k leaves, the first alone has 2/3.
  expect_distribution(with(1.0, 2, 0.6, 0.0), kLogits, {0, 0, 1, 0});
}

TEST(Sampler, Greedy) {
  Sampler sampler(with(0.0, 0, 1.0, 0.0));
  EXPECT_EQ(sampler.sample(kLogits, 0), 2);
  EXPECT_EQ(sampler.sample({1.0F, 3.0F, 3.0F}, 0), 1);
}

TEST(Sampler, ExtremesStayFinite) {
  for (const double temperature : {1e-30, 1.0, 1e30}) {
    Sampler sampler(with(temperature, 0, 1.0, 0.0));
    for (std::uint64_t i = 0; i < 100; ++i) {
      EXPECT_EQ(sampler.sample({-kInfinity, 3e38F, -kInfinity}, i), 1);  // impossible tokens are never drawn
    }
  }
}

TEST(Sampler, LogitsOfNoUse) {
  for (const double temperature : {0.0, 1.0}) {
    Sampler sampler(with(temperature, 0, 1.0, 0.0));
    expect_error(TITANS_FAILED, {"NaN"}, [&] { sampler.sample({0.0F, std::nanf(""), 1.0F}, 0); });
    expect_error(TITANS_FAILED, {"finite", "inf"}, [&] { sampler.sample({0.0F, kInfinity}, 0); });
    expect_error(TITANS_FAILED, {"finite", "-inf"}, [&] { sampler.sample({-kInfinity, -kInfinity}, 0); });
  }
}

TEST(Sampler, WrongOptions) {
  const double nan = std::nan("");
  for (const Sampling& wrong :
       {with(-1.0, 0, 1.0, 0.0), with(nan, 0, 1.0, 0.0), with(1.0 / 0.0, 0, 1.0, 0.0), with(1.0, -1, 1.0, 0.0),
        with(1.0, 0, 0.0, 0.0), with(1.0, 0, 1.1, 0.0), with(1.0, 0, nan, 0.0), with(1.0, 0, 1.0, -0.1),
        with(1.0, 0, 1.0, 1.1), with(1.0, 0, 1.0, nan)}) {
    expect_error(TITANS_INVALID_ARGUMENT, {"generate"}, [&] { Sampler sampler(wrong); });
  }
}

// SplitMix64's published outputs for seed 1234567.
TEST(Uniform, IsTheSameEverywhere) {
  EXPECT_EQ(core::uniform(1234567, 0), static_cast<double>(6457827717110365317ULL >> 11) * 0x1.0p-53);
  EXPECT_EQ(core::uniform(1234567, 1), static_cast<double>(3203168211198807973ULL >> 11) * 0x1.0p-53);
}

}  // namespace
}  // namespace titans::test
