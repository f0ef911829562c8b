// ONNX Runtime's errors and threads, and a node's attributes and tensors.
#pragma once

#include <onnxruntime_c_api.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"
#include "plugins/kernels/parallel.h"

namespace titans::plugins {

// Owns an ONNX Runtime object and releases it with the API's function.
template <typename Object>
using Handle = std::unique_ptr<Object, void (*)(Object*)>;

// An exception that carries a status.
struct Failure {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

// Throws an invalid-argument status unless `error` is empty.
inline void check(const OrtApi& api, const std::string& error) {
  if (!error.empty()) throw Failure{api.CreateStatus(ORT_INVALID_ARGUMENT, error.c_str())};
}

// Runs `body` and converts its exceptions to a status, because ONNX Runtime does not catch exceptions.
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

// The session's thread pool.
struct SessionThreads {
  const OrtApi& api;
  OrtKernelContext& context;

  kernels::Parallel parallel() { return {&SessionThreads::run, this}; }

 private:
  static void run(void* self, std::size_t count, void (*body)(void*, std::size_t), void* argument) {
    const SessionThreads& threads = *static_cast<SessionThreads*>(self);
    check(threads.api.KernelContext_ParallelFor(&threads.context, body, count, 0, argument));
  }
};

// Reads a node's attributes by name. Each read() sets the value if the attribute is present, and returns whether it is.
// Throws if the attribute has another type.
class NodeAttributes {
 public:
  NodeAttributes(const OrtApi& api, const OrtKernelInfo& info, const char* where)
      : api_(api), info_(info), where_(where) {}

  bool read(const char* name, std::string& value) const;
  bool read(const char* name, std::int64_t& value) const;
  bool read(const char* name, std::optional<std::int64_t>& value) const;
  bool read(const char* name, float& value) const;
  bool read(const char* name, std::vector<std::int64_t>& value) const;

 private:
  bool found(OrtStatus* status) const;
  bool refuse_another_type(const char* name) const;

  const OrtApi& api_;
  const OrtKernelInfo& info_;
  const char* where_;
};

// Reads the configuration of a node by its operator's attribute table. Throws if its attributes are invalid.
template <class Configuration>
Configuration read_configuration(const OrtApi& api, const OrtKernelInfo& info) {
  const NodeAttributes node(api, info, Configuration::kOperator);
  typename Configuration::Attributes attributes;
  check(api, kernels::read_all(Configuration::kOperator, attribute_table(attributes), attributes,
                               [&](const char* name, auto& value) { return node.read(name, value); }));
  Configuration configuration;
  check(api, configure(attributes, configuration));
  return configuration;
}

// The device of the session's provider, such as the number of a GPU.
int ordinal_of(const OrtApi& api, const OrtKernelInfo& info);

// Sets the first `count` inputs of a call; absent ones stay absent.
void read_inputs(const OrtApi& api, OrtKernelContext& context, kernels::Tensor* inputs, std::size_t count);

// Output `index` with this shape and dtype, which is allocated here. Absent if the node has no such output, or if
// `like` has no shape.
kernels::Tensor make_output(const OrtApi& api, OrtKernelContext& context, std::size_t index,
                            const kernels::Tensor& like);

std::size_t output_count(const OrtApi& api, OrtKernelContext& context);

// The inputs of a memory's call, and the node's outputs, which are allocated here. `values`: the dtype of y.
kernels::Operands read_operands(const OrtApi& api, OrtKernelContext& context,
                                const kernels::Configuration& configuration, kernels::DType values);
kernels::Operands read_operands(const OrtApi& api, OrtKernelContext& context,
                                const kernels::ChunkConfiguration& configuration, kernels::DType values);

}  // namespace titans::plugins
