// Mutates the header as JSON with a correct length half of the time, and bytes otherwise.
#include <algorithm>
#include <string>

#include "fuzz.h"
#include "json_mutator.h"

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  constexpr std::size_t kLengthBytes = 8;
  std::minstd_rand random(seed);
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < std::min(size, kLengthBytes); ++i) length |= std::uint64_t{data[i]} << (8 * i);
  if (size < kLengthBytes || length > size - kLengthBytes || random() % 2 == 0)
    return LLVMFuzzerMutate(data, size, most);
  const std::uint8_t* header = data + kLengthBytes;
  nlohmann::json document = nlohmann::json::parse(header, header + length, nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded()) return LLVMFuzzerMutate(data, size, most);
  titans::fuzz::mutate_json(document, random);
  const std::string rest(data + kLengthBytes + length, data + size);
  const std::string out =
      titans::fuzz::safetensors(document.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace), rest);
  if (out.size() > most) return LLVMFuzzerMutate(data, size, most);
  std::copy(out.begin(), out.end(), data);
  return out.size();
}
