// Converts TensorRT's tensor descriptions to the kernel's operands.
#pragma once

#include <cstddef>
#include <cstdint>

#include <NvInferRuntime.h>

#include "plugins/kernels/neural_memory.h"

namespace titans::plugins {

// The alignment of workspaces and their parts, in bytes.
inline constexpr std::size_t kAlignment = 256;

constexpr std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

kernels::DType dtype_of(nvinfer1::DataType type);

// Whether `operand` may have this type. q, k, v and y have the type of q.
bool type_fits(kernels::Operand operand, nvinfer1::DataType type, nvinfer1::DataType q);

kernels::Tensor tensor_of(const nvinfer1::PluginTensorDesc& description, void* data);

// The distance in bytes between two values of `learn`. TensorRT's headers rule out bool tensors for plugins, so `learn`
// may be 0 and 1 in int32 or int64. The kernel gets the lowest bytes.
std::size_t learn_pitch(nvinfer1::DataType type);

// The workspace for the lowest bytes. A single one is read in place.
std::size_t learn_bytes(nvinfer1::DataType type, std::int64_t streams);

}  // namespace titans::plugins
