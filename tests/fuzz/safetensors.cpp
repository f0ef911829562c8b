// Fuzzes the reader of safetensors files.
#include "base/safetensors.h"

#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace titans;
  const std::filesystem::path path = fuzz::scratch() / "file.safetensors";
  fuzz::write(path, {reinterpret_cast<const char*>(data), size});
  const core::MappedFile file(path);
  try {
    for (const auto& [name, tensor] : core::read_safetensors(file, "file.safetensors")) {
      const auto start = static_cast<std::size_t>(tensor.data - file.data());
      fuzz::check(start <= file.size() && tensor.bytes <= file.size() - start, "a tensor within its file");
      fuzz::check(core::tensor_bytes(tensor.shape, tensor.dtype) == tensor.bytes, "the bytes of its shape");
      unsigned sum = 0;
      for (std::size_t i = 0; i < tensor.bytes; ++i) sum += std::to_integer<unsigned>(tensor.data[i]);
      fuzz::check(sum <= 255 * tensor.bytes, "bytes");
    }
  } catch (const core::Error& error) {
    fuzz::check_error(error);
  }
  return 0;
}
