#include "backends/onnxruntime/graph_session.h"

#include <onnxruntime_session_options_config_keys.h>

#include <algorithm>
#include <optional>

#include "backends/onnxruntime/host_tensor.h"
#include "base/error.h"
#include "base/mapped_file.h"

namespace titans::core {
namespace {

constexpr std::string_view kFix = "export the bundle again, or use a newer ONNX Runtime";

struct Signature {
  ONNXTensorElementDataType type;
  Shape shape;
};

using Signatures = std::map<std::string, Signature>;

// True if the tensor matches the graph's declaration. Safetensors has no 4-bit type, so an int4 weight is a
// one-dimensional uint8 tensor with two elements per byte.
bool matches(const Initializer& wanted, const TensorView& weight) {
  if (wanted.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4) {
    return wanted.type == static_cast<std::int64_t>(ort_type(weight.dtype)) && wanted.shape == weight.shape;
  }
  const std::optional<std::size_t> elements = tensor_bytes(wanted.shape, DType::kInt8);
  return elements && weight.dtype == DType::kUInt8 && weight.shape.size() == 1 &&
         weight.bytes == *elements / 2 + *elements % 2;
}

bool has_weights_of(DType dtype, const Bundle& bundle, const EngineGraph& graph) {
  return std::any_of(graph.weights.begin(), graph.weights.end(), [&](const std::string& name) {
    const auto weight = bundle.weights().find(name);
    return weight != bundle.weights().end() && weight->second.dtype == dtype;
  });
}

OrtHandle<OrtSessionOptions> make_options(const SessionShare& share, const EngineGraph& graph, bool spin) {
  const OrtLibrary& library = share.library;
  const OrtApi& api = library.api();
  const auto check = [&](OrtStatus* status) { library.check(status, "cannot set session options", kFix); };
  OrtSessionOptions* raw = nullptr;
  check(api.CreateSessionOptions(&raw));
  OrtHandle<OrtSessionOptions> options(raw, api.ReleaseSessionOptions);
  check(api.SetSessionExecutionMode(raw, ORT_SEQUENTIAL));
  check(api.SetSessionGraphOptimizationLevel(raw, ORT_ENABLE_ALL));
  check(api.SetIntraOpNumThreads(raw, share.threads));
  check(api.SetDeterministicCompute(raw, true));
  // The file was checked as ONNX, so a name ending in .ort must not select another format.
  check(api.AddSessionConfigEntry(raw, kOrtSessionOptionsConfigLoadModelFormat, "ONNX"));
  // The decode graph's threads spin until the next token. Those of other graphs stop with the call.
  check(api.AddSessionConfigEntry(raw, kOrtSessionOptionsConfigAllowIntraOpSpinning, "1"));
  check(api.AddSessionConfigEntry(raw, kOrtSessionOptionsConfigForceSpinningStop, spin ? "0" : "1"));
  if (has_weights_of(DType::kInt8, share.bundle, graph)) {
    // Matmuls that share an input each quantise it. If these nodes are merged, ONNX Runtime no longer recognises the
    // matmuls as quantised.
    check(
        api.AddSessionConfigEntry(raw, kOrtSessionOptionsDisableSpecifiedOptimizers, "CommonSubexpressionElimination"));
  }
  if (has_weights_of(DType::kFloat8E4M3, share.bundle, graph)) {
    // CPUs have no float8 matmul. With this setting the dequantisation is constant-folded once when the session opens,
    // not in every call.
    check(api.AddSessionConfigEntry(raw, kOrtSessionOptionsDisableQuantQDQ, "1"));
  }
  share.context.add_provider(*raw);
  share.memory_kernel.register_in(*raw, library);
  for (const std::string& name : graph.weights) {
    check(api.AddInitializer(raw, name.c_str(), share.weights.find(name)->second.get()));
  }
  return options;
}

Signature read_signature(const OrtLibrary& library, const OrtTypeInfo& type_info) {
  const OrtApi& api = library.api();
  const auto check = [&](OrtStatus* status) { library.check(status, "cannot read a tensor's type", kFix); };
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // owned by type_info
  check(api.CastTypeInfoToTensorInfo(&type_info, &tensor));
  Signature signature{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  if (tensor == nullptr) return signature;
  check(api.GetTensorElementType(tensor, &signature.type));
  std::size_t rank = 0;
  check(api.GetDimensionsCount(tensor, &rank));
  signature.shape.resize(rank);
  check(api.GetDimensions(tensor, signature.shape.data(), rank));
  return signature;
}

enum class Side { kInputs, kOutputs };

Signatures read_signatures(const OrtLibrary& library, const OrtSession& session, Side side) {
  const OrtApi& api = library.api();
  const bool inputs = side == Side::kInputs;
  const auto check = [&](OrtStatus* status) {
    library.check(status, "cannot read a graph's inputs and outputs", kFix);
  };
  OrtAllocator* allocator = nullptr;  // owned by ONNX Runtime
  check(api.GetAllocatorWithDefaultOptions(&allocator));
  std::size_t count = 0;
  check((inputs ? api.SessionGetInputCount : api.SessionGetOutputCount)(&session, &count));
  Signatures signatures;
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    check((inputs ? api.SessionGetInputName : api.SessionGetOutputName)(&session, i, allocator, &name));
    const std::string copy(name);
    check(api.AllocatorFree(allocator, name));
    OrtTypeInfo* type_info = nullptr;
    check((inputs ? api.SessionGetInputTypeInfo : api.SessionGetOutputTypeInfo)(&session, i, &type_info));
    const OrtHandle<OrtTypeInfo> owned(type_info, api.ReleaseTypeInfo);
    signatures[copy] = read_signature(library, *type_info);
  }
  return signatures;
}

Signatures promised(const Manifest& manifest, const Graph& graph, Side side) {
  constexpr std::int64_t kAny = -1;  // as ONNX Runtime reports a dimension with a name
  const std::int64_t streams = manifest.takes_streams() ? kAny : 1;
  Signatures signatures;
  if (side == Side::kInputs) {
    signatures[manifest.input] = {ort_type(manifest.input_dtype()), manifest.input_shape(graph, streams)};
    signatures[manifest.position_input] = {ort_type(DType::kInt64), {streams}};
    signatures[manifest.learn_input] = {ort_type(DType::kBool), {streams}};
    for (const std::string& optional : {manifest.valid_input, manifest.slots_input}) {
      if (!optional.empty()) signatures[optional] = {ort_type(DType::kInt64), {streams}};
    }
  } else {
    signatures[manifest.output] = {ort_type(DType::kFloat32), manifest.output_shape(graph, streams)};
  }
  for (const StateTensor& state : manifest.state) {
    Shape shape = state.shape;
    shape[0] = streams;  // slots, if the graph takes several streams
    signatures[side == Side::kInputs ? state.input : state.output] = {ort_type(state.dtype), shape};
  }
  return signatures;
}

void check_signatures(const Signatures& expected, const Signatures& found, std::string_view file,
                      std::string_view side) {
  const auto fail = [&](const std::string& name, std::string_view want, std::string_view got) {
    throw Error(TITANS_FAILED, "E0207", file, text(side, " ", name, ": expected ", want, ", got ", got), kFix);
  };
  for (const auto& [name, signature] : expected) {
    const auto entry = found.find(name);
    if (entry == found.end()) fail(name, shape_text(signature.shape), "none");
    if (entry->second.shape != signature.shape) {
      fail(name, text("shape ", shape_text(signature.shape)), shape_text(entry->second.shape));
    }
    if (entry->second.type != signature.type) {
      fail(name, ort_type_name(signature.type), ort_type_name(entry->second.type));
    }
  }
  for (const auto& [name, signature] : found) {
    if (expected.count(name) == 0) fail(name, "an entry in the manifest", "none");
  }
}

}  // namespace

std::map<std::string, Initializer> shared_initializers(const Bundle& bundle, const EngineGraph& graph) {
  const MappedFile file(bundle.folder() / graph.file);
  const std::map<std::string, Initializer> declared = read_initializers(file.text(), graph.file);
  std::map<std::string, Initializer> shared;
  for (const std::string& name : graph.weights) {
    const TensorView& weight = bundle.weights().find(name)->second;
    const auto entry = declared.find(name);
    if (entry == declared.end()) {
      throw Error(TITANS_FAILED, "E0207", graph.file, text("missing initialiser ", name), kFix);
    }
    const Initializer& wanted = entry->second;
    if (!matches(wanted, weight)) {
      throw Error(TITANS_FAILED, "E0207", "weights",
                  text(name, ": expected ", ort_type_name(wanted.type), " ", shape_text(wanted.shape), " as in ",
                       graph.file, ", got ", dtype_info(weight.dtype).name, " ", shape_text(weight.shape)),
                  "export the bundle again");
    }
    shared.emplace(name, wanted);
  }
  return shared;
}

OrtHandle<OrtSession> open_graph(const SessionShare& share, const EngineGraph& entry, bool spin) {
  const OrtLibrary& library = share.library;
  const std::string& file = entry.file;
  const OrtHandle<OrtSessionOptions> options = make_options(share, entry, spin);
  const std::string path = (share.bundle.folder() / file).string();
  OrtSession* raw = nullptr;
  library.check(library.api().CreateSessionWithPrepackedWeightsContainer(&library.env(), path.c_str(), options.get(),
                                                                         &share.prepacked, &raw),
                text("ONNX Runtime ", library.version(), " cannot open ", file), kFix);
  OrtHandle<OrtSession> session(raw, library.api().ReleaseSession);
  const Manifest& manifest = share.bundle.manifest();
  const Graph& graph = manifest.graphs[entry.graph];
  check_signatures(promised(manifest, graph, Side::kInputs), read_signatures(library, *raw, Side::kInputs), file,
                   "input");
  check_signatures(promised(manifest, graph, Side::kOutputs), read_signatures(library, *raw, Side::kOutputs), file,
                   "output");
  return session;
}

}  // namespace titans::core
