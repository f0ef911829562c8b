// What nodes of every device share: ONNX Runtime's errors, a node's attributes and its tensors.
#pragma once

#include <onnxruntime_c_api.h>

#include <exception>
#include <memory>

#include "plugins/kernels/neural_memory.h"

namespace titans::plugins {

// An ONNX Runtime object and the function of its API that releases it.
template <typename Object>
using Handle = std::unique_ptr<Object, void (*)(Object*)>;

// Carries a status through code that knows exceptions.
struct Failure {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

// Throws an invalid argument unless `error` is empty.
inline void check(const OrtApi& api, const std::string& error) {
  if (!error.empty()) throw Failure{api.CreateStatus(ORT_INVALID_ARGUMENT, error.c_str())};
}

// Runs `body`, and returns what it throws as a status: nothing may be thrown into ONNX Runtime.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

// What the node's attributes say. Throws where they say nothing that a kernel computes.
kernels::Configuration read_configuration(const OrtApi& api, const OrtKernelInfo& info);

// The inputs of a call and the outputs that the node wants, allocated. `values` is the type of y.
kernels::Operands read_operands(const OrtApi& api, OrtKernelContext& context,
                                const kernels::Configuration& configuration, kernels::DType values);

}  // namespace titans::plugins
