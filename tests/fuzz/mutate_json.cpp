// Mutates JSON half of the time, and bytes otherwise.
#include <algorithm>
#include <string>

#include "json_mutator.h"

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  std::minstd_rand random(seed);
  nlohmann::json document = nlohmann::json::parse(data, data + size, nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded() || random() % 2 == 0) return LLVMFuzzerMutate(data, size, most);
  titans::fuzz::mutate_json(document, random);
  const std::string out = document.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (out.size() > most) return LLVMFuzzerMutate(data, size, most);
  std::copy(out.begin(), out.end(), data);
  return out.size();
}
