// Reads typed fields of a JSON document. Errors give the path of the field.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/tensor.h"

namespace titans::core {

class JsonReader {
 public:
  // `document` names the file in error texts and must outlive the reader, as must `value`.
  JsonReader(const nlohmann::json& value, std::string_view document, std::string path = {})
      : value_(&value), document_(document), path_(std::move(path)) {}

  // Parses a text. Throws an Error if it is not a JSON object, or if readers could understand it differently: invalid
  // UTF-8, a byte order mark, NUL, a key twice in one object, -0 as an integer, integers beyond 64 bits, floats beyond
  // float64, more than 64 levels or 2^20 values, long keys, and hidden characters in any string.
  static nlohmann::json parse(std::string_view source, std::string_view document);

  JsonReader at(const std::string& key) const;
  std::optional<JsonReader> find(const std::string& key) const;
  std::vector<JsonReader> items() const;                            // of an array
  std::vector<std::pair<std::string, JsonReader>> members() const;  // of an object

  std::string string() const;     // a text, see base/names.h
  std::string name() const;       // a plain name
  std::string file_name() const;  // a plain name, which cannot leave the bundle
  std::int64_t integer(std::int64_t least, std::int64_t most = std::numeric_limits<std::int64_t>::max()) const;
  // A finite number from 0, or above 0.
  double number(bool above_zero = false) const;
  Shape shape(std::int64_t least_extent) const;
  const nlohmann::json& raw() const { return *value_; }

  // Throws "[document] path: expected `expectation`, got VALUE".
  [[noreturn]] void fail(std::string_view expectation) const;

 private:
  const nlohmann::json* value_;
  std::string_view document_;
  std::string path_;
};

}  // namespace titans::core
