// A fake library with TensorRT's interface, which runs the model of fake_executor.h on the driver of fake_cuda.cpp.
//
// Its engine files are lines of words, beginning with "FAKE ENGINE":
//   plugin 1        a plugin updates the memory in place; its library must have been loaded
//   in NAME TYPE EXTENT...    an input of 32-bit floats (TYPE 0), bools (4) or 64-bit integers (8)
//   out NAME TYPE EXTENT...   an output
//   host NAME       that input must be in host memory
// Without the plugin, outputs are written before inputs are read, so a shared buffer gives wrong numbers.
#include <cuda.h>
#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "fake_nvinfer_unused.h"

#define FAKE extern "C" __attribute__((visibility("default")))

#ifndef FAKE_VERSION  // in the format of getInferLibVersion
#define FAKE_VERSION NV_TENSORRT_VERSION
#endif

namespace titans::test {
namespace {

std::atomic<int> fail_at{-1};  // the enqueueV3 that fails, counted from now
std::atomic<int> enqueued{0};
std::atomic<int> alive{0};  // number of objects

struct Tensor {
  TensorIOMode mode;
  DataType type;
  Dims dims;
};

struct Network {
  std::map<std::string, Tensor> tensors;
  std::vector<std::string> names;
  std::set<std::string> on_host;
  bool plugin = false;
  ILogger* logger = nullptr;

  static std::unique_ptr<Network> parse(const std::string& source, std::string& problem) {
    auto network = std::make_unique<Network>();
    std::istringstream lines(source);
    std::string line;
    std::getline(lines, line);
    if (line != "FAKE ENGINE") {
      problem = "the plan has no header";
      return nullptr;
    }
    while (std::getline(lines, line)) {
      std::istringstream words(line);
      std::string what, name;
      words >> what >> name;
      if (what == "plugin") network->plugin = name == "1";
      if (what == "host") network->on_host.insert(name);
      if (what != "in" && what != "out") continue;
      Tensor tensor{what == "in" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT, DataType::kFLOAT, {}};
      int type = 0;
      words >> type;
      tensor.type = static_cast<DataType>(type);
      while (words >> tensor.dims.d[tensor.dims.nbDims]) ++tensor.dims.nbDims;
      network->tensors[name] = tensor;
      network->names.push_back(name);
    }
    return network;
  }
};

// The driver's function that enqueues a host call. The runtime has opened the driver.
decltype(&cuLaunchHostFunc) host_launcher() {
  void* driver = ::dlopen(std::getenv("TITANS_CUDA_DRIVER"), RTLD_NOW | RTLD_NOLOAD);
  return reinterpret_cast<decltype(&cuLaunchHostFunc)>(::dlsym(driver, "cuLaunchHostFunc"));
}

// Whether a context is current on this thread.
bool has_context() {
  void* driver = ::dlopen(std::getenv("TITANS_CUDA_DRIVER"), RTLD_NOW | RTLD_NOLOAD);
  return reinterpret_cast<bool (*)()>(::dlsym(driver, "fake_cuda_has_context"))();
}

struct Step {
  const Network* network;
  std::map<std::string, void*> at;
  bool spoil;
  std::int64_t host_position;  // if it is a host input: its value when the work was enqueued

  template <typename Value>
  Value* find(const char* name) const {
    return static_cast<Value*>(at.at(name));
  }

  void run() const {
    const bool vectors = network->tensors.count("x") != 0;
    const Dims output_dims = network->tensors.at(vectors ? "y" : "logits").dims;
    auto* next_memory = find<float>("memory.next");
    auto* next_last = find<float>("last.next");
    if (spoil || !network->plugin) next_memory[0] = std::nanf("");
    if (spoil) next_last[0] = std::nanf("");
    if (spoil) return;
    float memory[4];
    std::memcpy(memory, find<float>("memory"), sizeof(memory));
    float last = *find<float>("last");
    const bool host = network->on_host.count("position") != 0;
    const std::int64_t position = host ? host_position : *find<std::int64_t>("position");
    auto* output = find<float>(vectors ? "y" : "logits");
    for (std::int64_t t = 0; t < output_dims.d[1]; ++t) {
      for (std::int64_t v = 0; v < output_dims.d[2]; ++v) {
        *output++ = memory[0] + static_cast<float>(v) * last + static_cast<float>(position + t);
      }
      const float* vector = vectors ? find<float>("x") + t * network->tensors.at("x").dims.d[2] : nullptr;
      const float token = vectors ? vector[0] + 2 * vector[1] : static_cast<float>(find<std::int64_t>("tokens")[t]);
      if (*find<bool>("learn")) memory[0] = memory[0] / 2 + token;
      last = token;
    }
    std::memcpy(next_memory, memory, sizeof(memory));
    *next_last = last;
  }
};

class Context final : public UnusedContext {
 public:
  explicit Context(const Network& network) : network_(network) {}
  IExecutionContext* getPImpl() noexcept override { return nullptr; }
  bool setTensorAddress(Name name, void* data) noexcept override {
    if (network_.tensors.count(name) == 0) return false;
    at_[name] = data;
    return true;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    ++enqueued;
    for (const std::string& name : network_.names) {
      if (at_[name] == nullptr) {
        network_.logger->log(ILogger::Severity::kERROR, "a tensor without an address");
        return false;
      }
    }
    const bool fails = fail_at >= 0 && fail_at-- == 0;
    // Like TensorRT, computes shapes at enqueue, before the work begins.
    const std::int64_t position = *static_cast<const std::int64_t*>(at_["position"]);
    steps_.push_back(std::make_unique<Step>(Step{&network_, at_, fails, position}));
    const auto run = [](void* step) { static_cast<Step*>(step)->run(); };
    if (host_launcher()(stream, run, steps_.back().get()) != CUDA_SUCCESS) return false;
    if (fails) network_.logger->log(ILogger::Severity::kERROR, "a kernel that fails for a test");
    return !fails;
  }

 private:
  const Network& network_;
  std::map<std::string, void*> at_;
  std::vector<std::unique_ptr<Step>> steps_;
};

// The application's handle for one of our objects.
template <typename Interface, typename Implementation>
class Holder final : public Interface {
 public:
  explicit Holder(Implementation* implementation) {
    this->mImpl = implementation;
    ++alive;
  }
  ~Holder() noexcept override {
    if (!has_context()) std::abort();
    delete this->mImpl;
    --alive;
  }
};

class Engine final : public UnusedEngine {
 public:
  explicit Engine(std::unique_ptr<Network> network) : network_(std::move(network)) {}
  ICudaEngine* getPImpl() noexcept override { return nullptr; }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
    return new Holder<IExecutionContext, Context>(new Context(*network_));
  }
  Dims getTensorShape(Name name) const noexcept override {
    const auto found = network_->tensors.find(name);
    return found == network_->tensors.end() ? Dims{-1, {}} : found->second.dims;
  }
  DataType getTensorDataType(Name name) const noexcept override {
    const auto found = network_->tensors.find(name);
    return found == network_->tensors.end() ? DataType::kFLOAT : found->second.type;
  }
  TensorLocation getTensorLocation(Name name) const noexcept override {
    return network_->on_host.count(name) == 0 ? TensorLocation::kDEVICE : TensorLocation::kHOST;
  }
  TensorIOMode getTensorIOMode(Name name) const noexcept override {
    const auto found = network_->tensors.find(name);
    return found == network_->tensors.end() ? TensorIOMode::kNONE : found->second.mode;
  }
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(network_->names.size()); }
  Name getIOTensorName(int32_t index) const noexcept override {
    return network_->names[static_cast<std::size_t>(index)].c_str();
  }

 private:
  std::unique_ptr<Network> network_;
};

class Registry final : public UnusedRegistry {
 public:
  PluginLibraryHandle loadLibrary(Name path) noexcept override {
    return loaded_ = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  }
  bool has_plugin() const { return loaded_ != nullptr; }

 private:
  void* loaded_ = nullptr;
};

class Runtime final : public UnusedRuntime {
 public:
  explicit Runtime(ILogger* logger) : logger_(logger) {}
  IRuntime* getPImpl() noexcept override { return nullptr; }
  ILogger* getLogger() const noexcept override { return logger_; }
  IPluginRegistry& getPluginRegistry() noexcept override { return registry_; }
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    std::string problem;
    std::unique_ptr<Network> network = Network::parse(std::string(static_cast<Name>(blob), size), problem);
    if (network && network->plugin && !registry_.has_plugin()) problem = "no creator of NeuralMemory";
    if (!problem.empty()) {
      logger_->log(ILogger::Severity::kERROR, problem.c_str());
      return nullptr;
    }
    network->logger = logger_;
    return new Holder<ICudaEngine, Engine>(new Engine(std::move(network)));
  }

 private:
  ILogger* logger_;
  Registry registry_;
};

}  // namespace
}  // namespace titans::test

FAKE void* createInferRuntime_INTERNAL(void* logger, std::int32_t) noexcept {
  using titans::test::Runtime;
  return new titans::test::Holder<nvinfer1::IRuntime, Runtime>(new Runtime(static_cast<nvinfer1::ILogger*>(logger)));
}
FAKE std::int32_t getInferLibVersion() noexcept { return FAKE_VERSION; }

// Functions for tests.
FAKE void fake_nvinfer_fail_at(int call) { titans::test::fail_at = call; }
FAKE int fake_nvinfer_enqueued() { return titans::test::enqueued; }
FAKE int fake_nvinfer_alive() { return titans::test::alive; }
