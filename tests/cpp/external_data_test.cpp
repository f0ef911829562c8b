// Graph files that refer ONNX Runtime to external files.
#include "backends/onnxruntime/external_data.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "wire.h"

namespace titans::test {
namespace {

const std::set<std::string, std::less<>> kFiles{"weights.safetensors", "cpu.safetensors"};

std::string entry(const std::string& key, const std::string& value) { return field(1, key) + field(2, value); }

// A tensor whose data is at this location.
std::string tensor(const std::string& location) {
  return field(8, "E") + number(14, 1) + field(13, entry("location", location)) + field(13, entry("offset", "64"));
}

// A model with one graph.
std::string model(const std::string& graph) { return number(1, 9) + field(7, graph); }

// A node with one attribute.
std::string node(const std::string& attribute) { return field(4, "Op") + field(5, field(1, "a") + attribute); }

// Models with the tensor in every possible place.
std::vector<std::string> models_with(const std::string& tensor) {
  const std::string constant = node(field(5, tensor));
  const std::string sparse = field(1, tensor) + field(2, tensor);
  return {model(field(5, tensor)),
          model(field(15, sparse)),
          model(field(15, field(2, tensor))),
          model(field(1, constant)),
          model(field(1, node(field(10, tensor)))),
          model(field(1, node(field(22, sparse)))),
          model(field(1, node(field(23, sparse)))),
          model(field(1, node(field(6, field(5, tensor))))),
          model(field(1, node(field(11, field(1, constant))))),
          field(25, field(7, constant)),
          field(25, field(11, field(1, "a") + field(5, tensor))),
          field(20, field(1, field(5, tensor))),
          field(20, field(2, field(5, tensor))),
          model(field(5, field(8, "D"))) + model(field(5, tensor))};
}

TEST(ExternalData, WhatTheBundleHas) {
  for (const std::string& file : kFiles) {
    for (const std::string& bytes : models_with(tensor(file))) {
      EXPECT_NO_THROW(core::check_external_data(bytes, "g.onnx", kFiles));
    }
  }
}

TEST(ExternalData, WhatItHasNot) {
  const std::string locations[] = {"/etc/passwd",
                                   "../weights.safetensors",
                                   "./weights.safetensors",
                                   "golden.safetensors",
                                   "a/../weights.safetensors",
                                   "",
                                   std::string("weights.safetensors\0", 20),
                                   "*/_ORT_MEM_ADDR_/*",
                                   "weights.safetensors/"};
  for (const std::string& location : locations) {
    for (const std::string& bytes : models_with(tensor(location))) {
      try {
        core::check_external_data(bytes, "g.onnx", kFiles);
        ADD_FAILURE() << location;
      } catch (const core::Error& error) {
        const std::string message = error.what();
        EXPECT_EQ(error.status(), TITANS_FAILED);
        EXPECT_NE(message.find("g.onnx"), std::string::npos) << message;
        EXPECT_NE(message.find("data of E"), std::string::npos) << message;
      }
    }
  }
}

// If a field is repeated, the last occurrence counts; repeated messages are merged. The check must look at every
// occurrence.
TEST(ExternalData, OneOfSeveral) {
  const std::string good = entry("location", "weights.safetensors");
  const std::string bad = entry("location", "/etc/passwd");
  for (const std::string& entries : {field(13, good) + field(13, bad), field(13, bad) + field(13, good),
                                     field(13, field(1, "offset") + bad), field(13, good + field(2, "/etc/passwd"))}) {
    EXPECT_THROW(core::check_external_data(model(field(5, entries)), "g.onnx", kFiles), core::Error);
  }
  EXPECT_NO_THROW(core::check_external_data(model(field(5, field(13, bad + good))), "g.onnx", kFiles));
}

TEST(ExternalData, Nesting) {
  std::string graph = field(5, tensor("weights.safetensors"));
  for (int depth = 0; depth < 30; ++depth) graph = field(1, node(field(6, graph)));
  EXPECT_NO_THROW(core::check_external_data(model(graph), "g.onnx", kFiles));
  for (int depth = 0; depth < 300; ++depth) graph = field(1, node(field(6, graph)));
  EXPECT_THROW(core::check_external_data(model(graph), "g.onnx", kFiles), core::Error);
}

}  // namespace
}  // namespace titans::test
