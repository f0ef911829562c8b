#include "tensorrt_plugin_host.h"

#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace titans::plugin_host {

using namespace nvinfer1;

namespace {

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("[plugin host] " + what); }

template <typename Interface>
Interface* capability(IPluginV3& plugin, PluginCapabilityType type, const std::string& kind, std::int32_t major) {
  auto* found = static_cast<Interface*>(plugin.getCapabilityInterface(type));
  if (found == nullptr) fail("missing capability: " + kind);
  const InterfaceInfo info = found->getInterfaceInfo();
  if (info.kind != kind || info.major != major) {
    fail("wrong capability: expected " + kind + " " + std::to_string(major) + ", got " + info.kind + " " +
         std::to_string(info.major));
  }
  return found;
}

// ---- dimension expressions: either constants or the extents of inputs ----

class Expression final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Expression(std::int64_t constant) : value_(constant), constant_(true) { mImpl = this; }
  Expression(std::size_t input, std::size_t axis) : input_(input), axis_(axis) { mImpl = this; }
  ~Expression() noexcept override = default;

  std::int64_t evaluate(const std::vector<std::vector<std::int64_t>>& inputs) const {
    return constant_ ? value_ : inputs[input_][axis_];
  }

 private:
  bool isConstant() const override { return constant_; }
  std::int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  std::int64_t value_ = 0;
  std::size_t input_ = 0, axis_ = 0;
  bool constant_ = false;
};

class ExpressionBuilder final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  ExpressionBuilder() { mImpl = this; }
  ~ExpressionBuilder() noexcept override = default;

  template <typename... Arguments>
  const Expression* add(Arguments... arguments) {
    return &expressions_.emplace_back(arguments...);
  }

 private:
  const IDimensionExpr* constant(std::int64_t value) override { return add(value); }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }

  std::deque<Expression> expressions_;
};

class ResourceContext final : public IPluginResourceContext {
 public:
  IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

}  // namespace

// ---- the library ----

struct Library::Logger final : ILogger, ILoggerFinder {
  void log(Severity, const char* message) noexcept override {
    const std::lock_guard lock(mutex);
    lines += std::string(message) + "\n";
  }
  ILogger* findLogger() override { return this; }

  std::mutex mutex;
  std::string lines;
};

Library::Library(const std::string& path) : logger_(std::make_unique<Logger>()) {
  handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) fail(dlerror());
  reinterpret_cast<void (*)(ILoggerFinder*)>(symbol("setLoggerFinder"))(logger_.get());
  std::int32_t count = 0;
  auto* creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(symbol("getCreators"))(count);
  for (std::int32_t i = 0; i < count; ++i) {
    if (std::string(creators[i]->getInterfaceInfo().kind) != "PLUGIN CREATOR_V3ONE") continue;
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (std::string(creator->getPluginName()) == "NeuralMemory" &&
        std::string(creator->getPluginNamespace()) == "ai.titans" && std::string(creator->getPluginVersion()) == "1") {
      creator_ = creator;
    }
  }
  if (creator_ == nullptr) fail("missing creator: ai.titans NeuralMemory 1");
}

Library::~Library() {
  if (handle_ == nullptr) return;
  if (void* set = dlsym(handle_, "setLoggerFinder")) reinterpret_cast<void (*)(ILoggerFinder*)>(set)(nullptr);
  dlclose(handle_);
}

void* Library::find(const char* name) const { return dlsym(handle_, name); }

void* Library::symbol(const char* name) const {
  void* found = find(name);
  if (found == nullptr) fail("missing symbol in the library: " + std::string(name));
  return found;
}

std::string Library::messages() const {
  const std::lock_guard lock(logger_->mutex);
  return std::exchange(logger_->lines, {});
}

// ---- building ----

Built build(const Library& library, Fields fields, const std::vector<Range>& inputs, bool device) {
  const auto expect = [&](bool condition, const char* step) {
    if (!condition) fail(std::string(step) + " failed: " + library.messages());
  };
  Built built;
  Plugin given(library.creator().createPlugin("layer", &fields.collection(), TensorRTPhase::kBUILD));
  expect(given != nullptr, "createPlugin");
  const Plugin plugin(given->clone());  // the network keeps its own copy
  expect(plugin != nullptr, "clone");
  given.reset();
  auto* core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE", 1);
  auto* build = capability<IPluginV3OneBuildV2>(*plugin, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD", 2);
  auto* runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME", 1);
  expect(std::string(core->getPluginName()) == library.creator().getPluginName(), "getPluginName");
  expect(std::string(core->getPluginNamespace()) == library.creator().getPluginNamespace(), "getPluginNamespace");
  expect(std::string(core->getPluginVersion()) == library.creator().getPluginVersion(), "getPluginVersion");

  const auto in_count = static_cast<std::int32_t>(inputs.size()), out_count = build->getNbOutputs();
  const auto outputs = static_cast<std::size_t>(out_count);
  std::vector<DataType> input_types;
  for (const Range& input : inputs) input_types.push_back(input.type);
  built.output_types.resize(outputs);
  expect(build->getOutputDataTypes(built.output_types.data(), out_count, input_types.data(), in_count) == 0,
         "getOutputDataTypes");

  ExpressionBuilder expressions;
  std::vector<DimsExprs> in_shapes(inputs.size()), out_shapes(outputs);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    in_shapes[i].nbDims = static_cast<std::int32_t>(inputs[i].most.size());
    for (std::size_t axis = 0; axis < inputs[i].most.size(); ++axis) {
      const std::int64_t extent = inputs[i].most[axis];
      const bool fixed = inputs[i].least[axis] == extent;
      in_shapes[i].d[axis] = fixed ? expressions.add(extent) : expressions.add(i, axis);
    }
  }
  expect(build->getOutputShapes(in_shapes.data(), in_count, nullptr, 0, out_shapes.data(), out_count, expressions) == 0,
         "getOutputShapes");
  const auto evaluate = [&](std::size_t output, std::vector<std::int64_t> Range::* which) {
    std::vector<std::vector<std::int64_t>> extents;
    for (const Range& input : inputs) extents.push_back(input.*which);
    std::vector<std::int64_t> shape;
    for (std::int32_t axis = 0; axis < out_shapes[output].nbDims; ++axis) {
      shape.push_back(static_cast<const Expression*>(out_shapes[output].d[axis])->evaluate(extents));
    }
    return shape;
  };

  std::vector<DynamicPluginTensorDesc> tensors;
  for (const Range& input : inputs) tensors.push_back(open_tensor(input));
  for (std::size_t i = 0; i < outputs; ++i) {
    built.most_outputs.push_back(evaluate(i, &Range::most));
    tensors.push_back(open_tensor(
        {built.output_types[i], evaluate(i, &Range::least), evaluate(i, &Range::typical), built.most_outputs[i]}));
  }
  for (std::int32_t i = 0; i < in_count + out_count; ++i) {
    expect(build->supportsFormatCombination(i, tensors.data(), in_count, out_count), "supportsFormatCombination");
  }
  const DynamicPluginTensorDesc *in = tensors.data(), *out = tensors.data() + in_count;
  expect(build->configurePlugin(in, in_count, out, out_count) == 0, "configurePlugin");
  expect(build->getNbTactics() == 0, "getNbTactics");
  built.workspace = build->getWorkspaceSize(in, in_count, out, out_count);
  if (device) {
    std::vector<PluginTensorDesc> typical;
    for (const DynamicPluginTensorDesc& each : tensors) typical.push_back(tensor(each.desc.type, shape_of(each.opt)));
    expect(runtime->onShapeChange(typical.data(), in_count, typical.data() + in_count, out_count) == 0,
           "onShapeChange");
  }
  for (std::int32_t i = 0; i < out_count; ++i) built.aliases.push_back(build->getAliasedInput(i));
  expect(build->getTimingCacheID() != nullptr, "getTimingCacheID");
  built.timing_cache_id = build->getTimingCacheID();
  const PluginFieldCollection* kept = runtime->getFieldsToSerialize();
  expect(kept != nullptr, "getFieldsToSerialize");
  built.engine = Fields(*kept);
  return built;
}

// ---- running ----

Context::Context(const Library& library, Fields engine) {
  plugin_.reset(library.creator().createPlugin("layer", &engine.collection(), TensorRTPhase::kRUNTIME));
  if (plugin_ == nullptr) fail("createPlugin failed: " + library.messages());
  ResourceContext resources;
  auto* runtime = capability<IPluginV3OneRuntime>(*plugin_, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME", 1);
  attached_.reset(runtime->attachToContext(&resources));
  if (attached_ == nullptr) fail("attachToContext failed: " + library.messages());
  runtime_ = capability<IPluginV3OneRuntime>(*attached_, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME", 1);
}

std::int32_t Context::prepare(const std::vector<PluginTensorDesc>& in, const std::vector<PluginTensorDesc>& out) {
  std::vector<PluginTensorDesc> now = in;
  now.insert(now.end(), out.begin(), out.end());
  const auto same = [](const PluginTensorDesc& a, const PluginTensorDesc& b) {
    return a.type == b.type && shape_of(a.dims) == shape_of(b.dims);
  };
  if (last_.size() == now.size() && std::equal(now.begin(), now.end(), last_.begin(), same)) return 0;
  const std::int32_t code = runtime_->onShapeChange(in.data(), static_cast<std::int32_t>(in.size()), out.data(),
                                                    static_cast<std::int32_t>(out.size()));
  if (code == 0) last_ = now;
  return code;
}

std::int32_t Context::run(const std::vector<PluginTensorDesc>& in, const std::vector<PluginTensorDesc>& out,
                          const std::vector<const void*>& inputs, const std::vector<void*>& outputs, void* workspace,
                          cudaStream_t stream) {
  std::int32_t code = prepare(in, out);
  if (code == 0) code = runtime_->setTactic(0);
  if (code == 0) code = runtime_->enqueue(in.data(), out.data(), inputs.data(), outputs.data(), workspace, stream);
  return code;
}

}  // namespace titans::plugin_host
