// TensorRT's descriptions of tensors as the kernel's operands.
#pragma once

#include <cstddef>
#include <cstdint>

#include <NvInferRuntime.h>

#include "plugins/kernels/neural_memory.h"

namespace titans::plugins {

// Workspaces and their parts start at multiples of this.
inline constexpr std::size_t kAlignment = 256;

constexpr std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

kernels::DType dtype_of(nvinfer1::DataType type);

// Whether a tensor of this type may stand where `operand` is; q, k, v and y as q has it.
bool type_fits(kernels::Operand operand, nvinfer1::DataType type, nvinfer1::DataType q);

kernels::Tensor tensor_of(const nvinfer1::PluginTensorDesc& description, void* data);

// TensorRT's headers say that plugins have no bool tensors, so `learn` may come as 0 and 1 in int32 or int64, of which
// the kernel gets the lowest bytes. Bytes from one of them to the next.
std::size_t learn_pitch(nvinfer1::DataType type);

// Workspace that the lowest bytes need. One alone is read where it lies.
std::size_t learn_bytes(nvinfer1::DataType type, std::int64_t streams);

}  // namespace titans::plugins
