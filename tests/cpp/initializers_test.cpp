#include "backends/onnxruntime/initializers.h"

#include <string>

#include <gtest/gtest.h>

#include "test_bundle.h"
#include "wire.h"

namespace titans::test {
namespace {

std::string model(const std::string& tensors) { return number(1, 9) + field(7, field(2, "name") + tensors); }

TEST(Initializers, NamesTypesAndShapes) {
  const auto found = core::read_initializers(
      model(field(5, number(1, 2) + number(1, 3) + number(2, 1) + field(8, "plain") + field(9, "data")) +
            field(5, field(8, "packed") + number(2, 11) + field(1, std::string("\x80\x01\x05", 3)))),
      "m.onnx");
  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(found.at("plain").type, 1);
  EXPECT_EQ(found.at("plain").shape, (core::Shape{2, 3}));
  EXPECT_EQ(found.at("packed").type, 11);
  EXPECT_EQ(found.at("packed").shape, (core::Shape{128, 5}));
}

TEST(Initializers, WhatIsNoModel) {
  const std::string whole = model(field(5, field(8, "a") + number(2, 1)));
  for (const std::string& bytes : {std::string("not an ONNX model"), whole.substr(0, whole.size() - 1),
                                   std::string(11, '\xff'), std::string("\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 10),
                                   std::string("\x3b"), model(field(5, field(8, "a")) + field(5, field(8, "a")))}) {
    expect_error(TITANS_FAILED, {"m.onnx", "an ONNX model"}, [&] { core::read_initializers(bytes, "m.onnx"); });
  }
}

}  // namespace
}  // namespace titans::test
