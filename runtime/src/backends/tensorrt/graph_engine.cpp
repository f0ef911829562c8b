#include "backends/tensorrt/graph_engine.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "backends/tensorrt/logger.h"
#include "base/error.h"
#include "base/mapped_file.h"

namespace titans::core {
namespace {

using nvinfer1::DataType;

constexpr std::string_view kFix = "run titans-export build for this bundle again";

struct Signature {
  DType dtype;
  Shape shape;
};

using Signatures = std::map<std::string, Signature>;

std::optional<DType> dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return DType::kFloat32;
    case DataType::kHALF:
      return DType::kFloat16;
    case DataType::kBF16:
      return DType::kBFloat16;
    case DataType::kINT8:
      return DType::kInt8;
    case DataType::kUINT8:
      return DType::kUInt8;
    case DataType::kINT32:
      return DType::kInt32;
    case DataType::kINT64:
      return DType::kInt64;
    case DataType::kBOOL:
      return DType::kBool;
    default:
      return std::nullopt;
  }
}

Signatures promised_inputs(const Manifest& manifest, const Graph& graph) {
  Signatures inputs{{manifest.input, {manifest.input_dtype(), manifest.input_shape(graph)}},
                    {manifest.position_input, {DType::kInt64, {1}}},
                    {manifest.learn_input, {DType::kBool, {1}}}};
  for (const StateTensor& state : manifest.state) inputs[state.input] = {state.dtype, state.shape};
  return inputs;
}

Signatures promised_outputs(const Manifest& manifest, const Graph& graph) {
  Signatures outputs{{manifest.output, {DType::kFloat32, manifest.output_shape(graph)}}};
  for (const StateTensor& state : manifest.state) outputs[state.output] = {state.dtype, state.shape};
  return outputs;
}

Shape shape_of(const nvinfer1::Dims& dims) { return dims.nbDims < 0 ? Shape() : Shape(dims.d, dims.d + dims.nbDims); }

void check_tensor(const nvinfer1::ICudaEngine& engine, const std::string& name, const Signature& promised,
                  const std::string& file) {
  const std::string wanted = text("expected ", name, " as ", dtype_info(promised.dtype).name, " ",
                                  shape_text(promised.shape), " as in the manifest");
  const DataType type = engine.getTensorDataType(name.c_str());
  const std::optional<DType> dtype = dtype_of(type);
  const Shape shape = shape_of(engine.getTensorShape(name.c_str()));
  if (dtype == promised.dtype && shape == promised.shape) return;
  throw Error(
      TITANS_FAILED, "E0610", file,
      text(wanted, ", got ", dtype ? std::string(dtype_info(*dtype).name) : text("type ", static_cast<int>(type)), " ",
           shape_text(shape)),
      kFix);
}

void check_side(const nvinfer1::ICudaEngine& engine, const Signatures& promised, nvinfer1::TensorIOMode mode,
                const std::string& file) {
  const std::string_view side = mode == nvinfer1::TensorIOMode::kINPUT ? "input" : "output";
  std::size_t found = 0;
  for (std::int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
    const std::string name = engine.getIOTensorName(i);
    if (engine.getTensorIOMode(name.c_str()) != mode) continue;
    const auto entry = promised.find(name);
    if (entry == promised.end()) {
      throw Error(TITANS_FAILED, "E0610", file, text(side, " ", name, " is missing in the manifest"), kFix);
    }
    check_tensor(engine, name, entry->second, file);
    ++found;
  }
  if (found == promised.size()) return;
  for (const auto& [name, signature] : promised) {
    if (engine.getTensorIOMode(name.c_str()) != mode) {
      throw Error(TITANS_FAILED, "E0610", file, text(side, " ", name, " is missing in the engine"), kFix);
    }
  }
}

}  // namespace

GraphEngine::GraphEngine(nvinfer1::IRuntime& runtime, const Bundle& bundle, const EngineGraph& graph)
    : graph_(bundle.manifest().graphs[graph.graph]), file_(graph.file) {
  const MappedFile file(bundle.folder() / file_);
  VendorLogger::clear();
  engine_.reset(runtime.deserializeCudaEngine(file.data(), file.size()));
  if (!engine_) {
    throw Error(TITANS_FAILED, "E0610", file_,
                text(kVendor, " cannot open the engine: ", VendorLogger::errors(kNoReason)),
                "run titans-export build for this bundle again, and check the driver with nvidia-smi");
  }
  const Manifest& manifest = bundle.manifest();
  check_side(*engine_, promised_inputs(manifest, graph_), nvinfer1::TensorIOMode::kINPUT, file_);
  check_side(*engine_, promised_outputs(manifest, graph_), nvinfer1::TensorIOMode::kOUTPUT, file_);
  for (const std::string* name : {&manifest.input, &manifest.position_input, &manifest.learn_input}) {
    if (engine_->getTensorLocation(name->c_str()) == nvinfer1::TensorLocation::kHOST) on_host_.push_back(*name);
  }
}

bool GraphEngine::on_host(const std::string& input) const {
  return std::find(on_host_.begin(), on_host_.end(), input) != on_host_.end();
}

std::unique_ptr<nvinfer1::IExecutionContext> GraphEngine::make_context() {
  VendorLogger::clear();
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext());
  if (!context) {
    throw Error(TITANS_FAILED, "E0609", file_,
                text(kVendor, " cannot create a context: ", VendorLogger::errors(kNoReason)),
                "free device memory, or open fewer sessions");
  }
  return context;
}

}  // namespace titans::core
