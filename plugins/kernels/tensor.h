// Tensors in the caller's memory, and the checks of a tensor that all operators share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace titans::kernels {

enum class DType : std::uint8_t { kFloat32, kInt64, kBool, kFloat16, kBFloat16, kOther };

// An absent optional tensor has no data and rank -1.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = -1;
  std::array<std::int64_t, 4> shape{};
  const std::int64_t* strides = nullptr;  // in elements; null: contiguous, row-major

  bool present() const { return rank >= 0; }
  std::int64_t elements() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// For example "(2, 3, 4)".
std::string shape_text(const std::int64_t* values, std::size_t count);

// Checks presence, dtype, rank, shape, strides and alignment of an operand. Returns a formatted error (failure.h), or
// an empty string. `where`: the operator's name.
std::string check_tensor(const char* where, const char* name, const Tensor& tensor, DType dtype, int rank,
                         const std::array<std::int64_t, 4>& shape, bool required);
std::string check_rank(const char* where, const char* name, const Tensor& tensor, int rank, const char* fix);

// Whether two tensors share a byte, and the error for outputs that do.
bool overlap(const Tensor& a, const Tensor& b);
std::string overlapping(const char* where, const std::string& output, const std::string& other, const char* fix);

}  // namespace titans::kernels
