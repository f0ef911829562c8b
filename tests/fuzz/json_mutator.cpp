#include "json_mutator.h"

#include <algorithm>
#include <string>
#include <vector>

namespace titans::fuzz {
namespace {

using nlohmann::json;

void list_places(json& value, std::vector<json*>& places) {
  places.push_back(&value);
  if (!value.is_structured()) return;
  for (json& item : value) list_places(item, places);
}

json interesting(std::minstd_rand& random) {
  static const std::vector<json> values{0,
                                        1,
                                        -1,
                                        2,
                                        3,
                                        4,
                                        7,
                                        8,
                                        32,
                                        255,
                                        256,
                                        65536,
                                        std::int64_t{1} << 20,
                                        std::int64_t{1} << 31,
                                        (std::int64_t{1} << 31) - 1,
                                        std::int64_t{1} << 53,
                                        std::int64_t{1} << 60,
                                        (std::int64_t{1} << 62) + 1,
                                        std::numeric_limits<std::int64_t>::max(),
                                        std::numeric_limits<std::int64_t>::min(),
                                        std::numeric_limits<std::uint64_t>::max(),
                                        0.5,
                                        1e308,
                                        -0.0,
                                        "",
                                        ".",
                                        "..",
                                        "../a",
                                        "a/b",
                                        "a\\b",
                                        "none",
                                        std::string("a\0b", 3),
                                        std::string(300, 'n'),
                                        "\u00e9",
                                        nullptr,
                                        true,
                                        false,
                                        json::array(),
                                        json::object(),
                                        json::array({0}),
                                        json::array({1, 1}),
                                        "memory",
                                        "cache",
                                        "float32",
                                        "int8",
                                        "bfloat16",
                                        "fp8",
                                        "float16"};
  return values[random() % values.size()];
}

void change_number(json& value, std::minstd_rand& random) {
  const auto number = value.get<std::uint64_t>();
  const std::uint64_t others[] = {number + 1, number - 1, number * 2, number / 2, number + 4, ~number};
  value = static_cast<std::int64_t>(others[random() % std::size(others)]);
}

void change_array(json& value, std::minstd_rand& random) {
  if (value.empty()) {
    value.push_back(interesting(random));
    return;
  }
  const auto at = value.begin() + static_cast<std::ptrdiff_t>(random() % value.size());
  switch (random() % 3) {
    case 0:
      value.erase(at);
      return;
    case 1:
      value.push_back(json(*at));
      return;
    default:
      std::swap(*at, value[random() % value.size()]);
  }
}

void change_object(json& value, std::minstd_rand& random) {
  if (value.empty()) {
    value["name"] = interesting(random);
    return;
  }
  auto at = value.begin();
  std::advance(at, static_cast<std::ptrdiff_t>(random() % value.size()));
  if (random() % 2 == 0) {
    value.erase(at);
  } else {
    const json copy = *at;
    value[at.key() + "2"] = copy;
  }
}

}  // namespace

void mutate_json(json& document, std::minstd_rand& random) {
  std::vector<json*> places;
  list_places(document, places);
  json& place = *places[random() % places.size()];
  if (place.is_string() && random() % 8 != 0) {
    // The metadata of safetensors has only strings, and some of them are JSON.
    json inner = json::parse(place.get<std::string>(), nullptr, /*allow_exceptions=*/false);
    if (inner.is_structured()) {
      mutate_json(inner, random);
      place = inner.dump(-1, ' ', false, json::error_handler_t::replace);
      return;
    }
  }
  const auto choice = random() % 4;
  if (choice == 0) {
    place = interesting(random);
  } else if (choice == 1) {
    const json copy = *places[random() % places.size()];
    place = copy;
  } else if (place.is_number_integer()) {
    change_number(place, random);
  } else if (place.is_array()) {
    change_array(place, random);
  } else if (place.is_object()) {
    change_object(place, random);
  } else {
    place = interesting(random);
  }
}

}  // namespace titans::fuzz
