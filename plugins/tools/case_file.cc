#include "plugins/tools/case_file.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>

namespace titans::kernels {
namespace {

using nlohmann::json;

constexpr std::align_val_t kAlignment{64};

DType dtype_of(const std::string& name) {
  const std::pair<const char*, DType> known[] = {{"F32", DType::kFloat32},
                                                 {"I64", DType::kInt64},
                                                 {"BOOL", DType::kBool},
                                                 {"F16", DType::kFloat16},
                                                 {"BF16", DType::kBFloat16}};
  for (const auto& [text, dtype] : known) {
    if (name == text) return dtype;
  }
  return DType::kOther;
}

}  // namespace

HostBuffer::HostBuffer(std::size_t bytes) : data_(::operator new(bytes, kAlignment)), bytes_(bytes) {
  std::memset(data_, 0xFF, bytes_);
}
HostBuffer::~HostBuffer() { ::operator delete(data_, kAlignment); }

CaseFile::CaseFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::uint64_t length = 0;
  if (raw.size() < sizeof(length)) {
    throw_error(failure("case", "E1001", "a file cannot be read: " + path + " is not a safetensors file",
                        "write the case again"));
  }
  std::memcpy(&length, raw.data(), sizeof(length));
  const json header = json::parse(raw.substr(sizeof(length), length));
  const char* data = raw.data() + sizeof(length) + length;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      calls = std::stoul(entry.at("calls").get<std::string>());
      attributes = json::parse(entry.at("attributes").get<std::string>());
      op = entry.value("operator", op);
      continue;
    }
    Tensor tensor;
    tensor.dtype = dtype_of(entry.at("dtype"));
    const std::vector<std::int64_t> shape = entry.at("shape");
    tensor.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.shape.begin());
    const std::size_t begin = entry.at("data_offsets")[0], end = entry.at("data_offsets")[1];
    tensor.data = memory.emplace(name, end - begin).first->second.data();
    std::memcpy(tensor.data, data + begin, end - begin);
    tensors[name] = tensor;
  }
}

Operands CaseFile::inputs(std::size_t call) const {
  Operands operands;
  for (std::size_t i = kQ; i < kInputs; ++i) {
    const auto found = tensors.find(std::to_string(call) + "." + kOperandNames[i]);
    if (found != tensors.end()) operands[i] = found->second;
  }
  return operands;
}

Tensor float_tensor(void* data, std::initializer_list<std::int64_t> shape) {
  Tensor tensor;
  tensor.data = data;
  tensor.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  return tensor;
}

}  // namespace titans::kernels
