// Reads texts and files as the runtime does, for differential.py, which compares the results with other readers.
// On stdin: a letter, the size as 4 bytes, and the content, again and again. j: JSON; s: safetensors; o: an ONNX graph.
// On stdout, one line each: "-" if it is refused, else "+" and what was read.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "backends/onnxruntime/graph_check.h"
#include "base/error.h"
#include "base/json_reader.h"
#include "base/safetensors.h"

namespace {

using namespace titans;

std::string read(char kind, std::string_view content) {
  if (kind == 'j') return core::JsonReader::parse(content, "text").dump();
  if (kind == 'o') {
    core::check_encoding(content, "graph.onnx");
    return "";
  }
  // Aligned for every element type, as a mapped file.
  std::vector<std::uint64_t> aligned(content.size() / 8 + 1);
  content.copy(reinterpret_cast<char*>(aligned.data()), content.size());
  const auto* start = reinterpret_cast<const std::byte*>(aligned.data());
  nlohmann::json tensors = nlohmann::json::object();
  for (const auto& [name, tensor] :
       core::read_safetensors({reinterpret_cast<const char*>(start), content.size()}, "file.safetensors")) {
    const auto first = static_cast<std::size_t>(tensor.data - start);
    tensors[name] = {core::dtype_info(tensor.dtype).safetensors, tensor.shape, first, tensor.bytes};
  }
  return tensors.dump();
}

}  // namespace

int main() {
  for (int kind = std::getchar(); kind != EOF; kind = std::getchar()) {
    std::uint32_t size = 0;
    for (unsigned shift = 0; shift < 32; shift += 8) size |= static_cast<std::uint32_t>(std::getchar()) << shift;
    std::string content(size, '\0');
    if (std::fread(content.data(), 1, size, stdin) != size) return 1;
    std::string line;
    try {
      line = "+" + read(static_cast<char>(kind), content);
    } catch (const core::Error& error) {
      if (error.code() == "TITANS-E1003") return 1;
      line = "-";
    }
    std::puts(line.c_str());
    std::fflush(stdout);
  }
  return 0;
}
