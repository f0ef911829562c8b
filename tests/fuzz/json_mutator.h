// Changes a JSON document in one place and keeps it valid. Blind changes of bytes mostly give invalid JSON.
#pragma once

#include <cstdint>
#include <random>

#include <nlohmann/json.hpp>

namespace titans::fuzz {

void mutate_json(nlohmann::json& document, std::minstd_rand& random);

}  // namespace titans::fuzz

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);
