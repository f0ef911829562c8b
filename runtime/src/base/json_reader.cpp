#include "base/json_reader.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "base/names.h"

namespace titans::core {
namespace {

constexpr std::string_view kFix = "export the bundle again";
constexpr std::size_t kLongestQuote = 60;
// JSON is processed recursively, so the depth is limited.
constexpr std::size_t kDeepest = 64;
constexpr std::ptrdiff_t kMostValues = std::ptrdiff_t{1} << 20;

// Invalid UTF-8 must not prevent an error text.
std::string quote(const nlohmann::json& value) {
  std::string out = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (out.size() > kLongestQuote) out = out.substr(0, kLongestQuote) + "...";
  return out;
}

// Validates a document before memory is allocated for it. The parser callbacks of the library take quadratic time in an
// object's members.
class Check : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Check(std::string_view document) : document_(document) {}

  bool null() override { return true; }
  bool boolean(bool /*value*/) override { return true; }
  // The library reads -0 as an integer. Other readers read it as a float, or refuse it.
  bool number_integer(number_integer_t value) override {
    if (value == 0) fail("-0 is not an integer of 64 bits");
    return true;
  }
  bool number_unsigned(number_unsigned_t /*value*/) override { return true; }
  bool number_float(number_float_t /*value*/, const string_t& source) override {
    const bool integer = source.find_first_of(".eE") == string_t::npos;
    if (integer) fail(text(source.substr(0, kLongestQuote), " is not an integer of 64 bits"));
    return true;
  }
  bool string(string_t& value) override {
    if (!is_text(value)) fail(text("hidden characters in the string ", quote(value)));
    return true;
  }
  bool binary(binary_t& /*value*/) override { return true; }
  bool start_object(std::size_t /*elements*/) override { return go_down(); }
  bool start_array(std::size_t /*elements*/) override { return go_down(); }
  bool end_object() override { return go_up(); }
  bool end_array() override { return go_up(); }
  bool key(string_t& value) override {
    if (value.size() > kLongestKey || !is_text(value)) {
      fail(text("expected a key of at most ", kLongestKey, " bytes without hidden characters, got ", quote(value)));
    }
    // Readers disagree about which duplicate key is used.
    if (!keys_.back().insert(value).second) fail(text("key ", quote(value), " twice in one object"));
    return true;
  }
  bool parse_error(std::size_t /*at*/, const std::string& /*token*/, const nlohmann::json::exception&) override {
    return false;
  }

 private:
  bool go_down() {
    if (keys_.size() >= kDeepest) fail(text("JSON nested deeper than ", kDeepest, " levels"));
    keys_.emplace_back();
    return true;
  }
  bool go_up() {
    keys_.pop_back();
    return true;
  }

  [[noreturn]] void fail(std::string_view problem) const {
    throw Error(TITANS_FAILED, "E0205", document_, problem, kFix);
  }

  std::string_view document_;
  // One set per open object or array. A hash table would take quadratic time for keys that are made to collide.
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

nlohmann::json JsonReader::parse(std::string_view source, std::string_view document) {
  const auto is_separator = [](char c) { return c == ',' || c == '[' || c == '{'; };
  const std::ptrdiff_t count = std::count_if(source.begin(), source.end(), is_separator);
  if (count > kMostValues) {
    throw Error(TITANS_FAILED, "E0205", document,
                text("more than ", kMostValues, " values: ", count, " commas and brackets"), kFix);
  }
  // The library ends at a NUL and skips a byte order mark.
  if (source.find('\0') != std::string_view::npos || source.substr(0, 1) == "\xef") {
    throw Error(TITANS_FAILED, "E0205", document, "expected a JSON object, got text that is not JSON", kFix);
  }
  Check check(document);
  nlohmann::json value(nlohmann::json::value_t::discarded);
  if (nlohmann::json::sax_parse(source, &check))
    value = nlohmann::json::parse(source, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object()) {
    throw Error(TITANS_FAILED, "E0205", document,
                text("expected a JSON object, got ", value.is_discarded() ? "text that is not JSON" : quote(value)),
                kFix);
  }
  return value;
}

JsonReader JsonReader::at(const std::string& key) const {
  std::optional<JsonReader> field = find(key);
  if (!field)
    throw Error(TITANS_FAILED, "E0205", document_, text("missing field ", path_.empty() ? key : path_ + "." + key),
                kFix);
  return *field;
}

std::optional<JsonReader> JsonReader::find(const std::string& key) const {
  if (!value_->is_object()) fail("an object");
  const auto field = value_->find(key);
  if (field == value_->end()) return std::nullopt;
  return JsonReader(*field, document_, path_.empty() ? key : path_ + "." + key);
}

std::vector<JsonReader> JsonReader::items() const {
  if (!value_->is_array()) fail("an array");
  std::vector<JsonReader> readers;
  for (const nlohmann::json& item : *value_) {
    readers.emplace_back(item, document_, text(path_, "[", readers.size(), "]"));
  }
  return readers;
}

std::vector<std::pair<std::string, JsonReader>> JsonReader::members() const {
  if (!value_->is_object()) fail("an object");
  std::vector<std::pair<std::string, JsonReader>> readers;
  for (const auto& [key, member] : value_->items()) {
    readers.emplace_back(key, JsonReader(member, document_, path_.empty() ? key : path_ + "." + key));
  }
  return readers;
}

std::string JsonReader::string() const {
  if (!value_->is_string()) fail("a string");
  std::string out = value_->get<std::string>();
  if (!is_text(out)) fail("a string without hidden characters");
  return out;
}

std::string JsonReader::name() const {
  if (!value_->is_string() || !is_plain(value_->get_ref<const std::string&>())) fail("a plain name");
  return value_->get<std::string>();
}

std::string JsonReader::file_name() const {
  if (!value_->is_string() || !is_plain(value_->get_ref<const std::string&>())) fail("a plain file name");
  return value_->get<std::string>();
}

std::int64_t JsonReader::integer(std::int64_t least, std::int64_t most) const {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  const bool fits =
      value_->is_number_integer() && !(value_->is_number_unsigned() && value_->get<std::uint64_t>() > kMost);
  if (!fits || value_->get<std::int64_t>() < least || value_->get<std::int64_t>() > most) {
    fail(text("an integer from ", least, " to ", most));
  }
  return value_->get<std::int64_t>();
}

double JsonReader::number(bool above_zero) const {
  const double value = value_->is_number() ? value_->get<double>() : -1.0;
  if (!std::isfinite(value) || value < 0 || (above_zero && value == 0)) {
    fail(above_zero ? "a finite number above 0" : "a finite number from 0");
  }
  return value;
}

Shape JsonReader::shape(std::int64_t least_extent) const {
  Shape out;
  for (const JsonReader& extent : items()) out.push_back(extent.integer(least_extent));
  return out;
}

void JsonReader::fail(std::string_view expectation) const {
  throw Error(TITANS_FAILED, "E0205", document_,
              text(path_.empty() ? "document" : path_, ": expected ", expectation, ", got ", quote(*value_)), kFix);
}

}  // namespace titans::core
