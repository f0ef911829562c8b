#include "plugins/kernels/tensor.h"

#include <algorithm>

#include "plugins/kernels/attribute_table.h"
#include "plugins/kernels/failure.h"

namespace titans::kernels {
namespace {

constexpr std::array<const char*, 6> kDTypeNames{"float32", "int64", "bool", "float16", "bfloat16", "another type"};
constexpr std::array<std::size_t, 6> kDTypeBytes{4, 8, 1, 2, 2, 1};

const char* name_of(DType dtype) { return kDTypeNames[static_cast<std::size_t>(dtype)]; }
std::size_t bytes_of(DType dtype) { return kDTypeBytes[static_cast<std::size_t>(dtype)]; }

std::string check_layout(const char* where, const Tensor& tensor, const char* name) {
  const auto wrong = [&](const std::string& problem, const char* fix) {
    return failure(where, "E0707", "wrong memory layout of " + std::string(name) + ": " + problem, fix);
  };
  const auto rank = static_cast<std::size_t>(tensor.rank);
  if (tensor.strides != nullptr && tensor.elements() > 0) {
    std::int64_t step = 1;
    for (std::size_t i = rank; i-- > 0;) {
      if (tensor.shape[i] != 1 && tensor.strides[i] != step) {
        return wrong("expected row-major without gaps, got strides " + shape_text(tensor.strides, rank),
                     "copy the tensor");
      }
      step *= tensor.shape[i];
    }
  }
  if (tensor.elements() > 0 && tensor.data == nullptr) return wrong("the address is NULL", "bind a buffer");
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % bytes_of(tensor.dtype) != 0) {
    return wrong("the address is not aligned to " + std::to_string(bytes_of(tensor.dtype)) + " bytes",
                 "allocate it as an array of its dtype");
  }
  return {};
}

}  // namespace

std::int64_t Tensor::elements() const {
  std::int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= shape[static_cast<std::size_t>(i)];
  return count;
}

std::string shape_text(const std::int64_t* values, std::size_t count) {
  std::string out = "(";
  for (std::size_t i = 0; i < count; ++i) out += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return out + ")";
}

std::string check_rank(const char* where, const char* name, const Tensor& tensor, int rank, const char* fix) {
  if (tensor.rank == rank) return {};
  return failure(
      where, "E0706",
      "wrong rank of " + std::string(name) + ": " + expected(std::to_string(rank), std::to_string(tensor.rank)), fix);
}

std::string check_tensor(const char* where, const char* name, const Tensor& tensor, DType dtype, int rank,
                         const std::array<std::int64_t, 4>& shape, bool required) {
  if (!tensor.present()) {
    return required ? failure(where, "E0703", "missing operand: " + std::string(name), "connect it") : std::string();
  }
  if (tensor.dtype != dtype) {
    return failure(where, "E0705",
                   "wrong dtype of " + std::string(name) + ": " + expected(name_of(dtype), name_of(tensor.dtype)),
                   "cast it");
  }
  std::string problem = check_rank(where, name, tensor, rank, "reshape it");
  if (!problem.empty()) return problem;
  if (!std::equal(shape.begin(), shape.begin() + rank, tensor.shape.begin())) {
    const auto count = static_cast<std::size_t>(rank);
    return failure(where, "E0706",
                   "wrong shape of " + std::string(name) + ": " +
                       expected(shape_text(shape.data(), count), shape_text(tensor.shape.data(), count)),
                   "check the model's sizes");
  }
  return check_layout(where, tensor, name);
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data); };
  const auto bytes = [](const Tensor& t) { return static_cast<std::uintptr_t>(t.elements()) * bytes_of(t.dtype); };
  if (!a.present() || !b.present() || bytes(a) == 0 || bytes(b) == 0) return false;
  return begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
}

std::string overlapping(const char* where, const std::string& output, const std::string& other, const char* fix) {
  return failure(where, "E0708", "overlapping buffers: " + output + " and " + other, fix);
}

}  // namespace titans::kernels
