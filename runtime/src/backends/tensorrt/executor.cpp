// The backend for TensorRT, and with TITANS_TENSORRT_RTX for TensorRT-RTX. Each graph has an engine. State and output
// are on the device, and decoding replays a captured CUDA graph.
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "backends/backend.h"
#include "backends/tensorrt/device_state.h"
#include "backends/tensorrt/graph_engine.h"
#include "backends/tensorrt/library.h"
#include "backends/tensorrt/plugin_library.h"
#include "backends/tensorrt/workspace.h"
#include "base/error.h"

namespace titans::core {
namespace {

class DeviceExecutor final : public Executor {
 public:
  DeviceExecutor(const Bundle& bundle, const ExecutorOptions& options)
      : library_(VendorLibrary::load(options.library)),
        bundle_(bundle),
        record_(*bundle.engine()),
        device_(cuda::find_device(cuda::Driver::require(), options.device)),
        context_(cuda::Driver::require(), device_.ordinal),
        copies_(context_),
        graphs_(bundle.manifest().graphs.size()),
        share_{bundle.manifest(), context_, copies_, recording_, graphs_, device_.integrated} {
    const cuda::Context::Scope scope(context_);
    try {
      open_graphs();
      rehearse();
    } catch (...) {
      close();
      throw;
    }
  }

  ~DeviceExecutor() override {
    try {
      const cuda::Context::Scope scope(context_);
      close();
    } catch (...) {  // NOLINT: a broken context has nothing left to free
    }
  }

  std::string version() const override { return library_.version(); }
  std::string memory_kernel() const override { return record_.plugin ? "tensorrt-plugin" : "standard-operators"; }
  bool in_place(std::size_t state) const override { return record_.state_in_place[state]; }

  std::map<std::string, std::string> details() const override {
    return {
        {"cuda_graphs", cuda_graphs_},
        {"memory", device_.integrated ? "shared with the host: inputs and outputs are not copied" : "the device's own"},
        {"sm", text(device_.sm)},
        {"driver", text("CUDA ", cuda::cuda_version_text(device_.driver_version))},
        {"precision", record_.precision}};
  }

  std::unique_ptr<Buffer> allocate(std::size_t state) override {
    return std::make_unique<DeviceBuffer>(copies_, bundle_.manifest().state[state].bytes);
  }

  std::unique_ptr<Workspace> make_workspace() override {
    const std::lock_guard lock(mutex_);
    if (warm_) return std::move(warm_);
    const cuda::Context::Scope scope(context_);
    return std::make_unique<DeviceWorkspace>(share_);
  }

  void run(const Call& call, Workspace& workspace) override { static_cast<DeviceWorkspace&>(workspace).run(call); }

 private:
  void open_graphs() {
    runtime_ = library_.make_runtime();
    if (record_.plugin) load_plugin();
    for (const EngineGraph& graph : bundle_.graphs()) {
      graphs_[graph.graph] = std::make_unique<GraphEngine>(*runtime_, bundle_, graph);
    }
  }

  // Vendor objects must be destroyed with their context current.
  void close() noexcept {
    warm_.reset();
    graphs_.clear();
    runtime_.reset();
  }

  // Each runtime has its own registry, because other runtimes in the process may have a plugin of the same name.
  void load_plugin() {
    const PluginLibrary plugin = find_plugin_library();
    if (!plugin.why_not.empty()) {
      throw Error(TITANS_UNSUPPORTED, "E0607", kVendor,
                  text("the plugin ", record_.plugin->name, " is missing: ", plugin.why_not),
                  "put its library beside the runtime's backend");
    }
    VendorLogger::clear();
    if (runtime_->getPluginRegistry().loadLibrary(plugin.path.c_str()) == nullptr) {
      throw Error(TITANS_UNSUPPORTED, "E0607", kVendor,
                  text("cannot load the plugins of ", plugin.path.string(), ": ", VendorLogger::errors(kNoReason)),
                  "build the runtime with the headers of this TensorRT");
    }
  }

  // Decodes one token from the same state three times per decode graph: normally, while recording, and from the
  // recording. A broken engine fails here, and recordings are used only if they give the same numbers.
  void rehearse() {
    const Manifest& manifest = bundle_.manifest();
    warm_ = std::make_unique<DeviceWorkspace>(share_);
    std::vector<std::unique_ptr<Buffer>> buffers;
    std::vector<Buffer*> from;
    std::vector<Buffer*> to;
    for (std::size_t state = 0; state < manifest.state.size(); ++state) {
      from.push_back(buffers.emplace_back(allocate(state)).get());
      to.push_back(in_place(state) ? from.back() : buffers.emplace_back(allocate(state)).get());
    }
    const std::int32_t token = 0;
    const std::vector<float> vector(static_cast<std::size_t>(manifest.input_size), 0.0F);
    const bool tokens = manifest.input_kind == InputKind::kTokens;
    bool same = true;
    std::size_t recordable = 0;
    std::string on_host;  // graphs that cannot be recorded
    for (const EngineGraph& entry : bundle_.graphs()) {
      const Graph& graph = manifest.graphs[entry.graph];
      if (graph.tokens != 1) continue;
      if (graphs_[entry.graph]->any_on_host()) {
        on_host += " " + graph.name;
      } else {
        ++recordable;
      }
      std::vector<std::vector<float>> answers;
      constexpr int kTimes = 3;
      for (int time = 0; time < kTimes; ++time) {
        for (std::size_t state = 0; state < from.size(); ++state) {
          from[state]->upload(bundle_.initial_state().find(manifest.state[state].name)->second.data);
        }
        warm_->run({entry.graph, tokens ? &token : nullptr, tokens ? nullptr : vector.data(), graph.offsets.front(),
                    true, from.data(), to.data()});
        const float* output = warm_->output(0, 1);
        answers.emplace_back(output, output + manifest.output_size);
      }
      const auto bytes = static_cast<std::size_t>(manifest.output_size) * sizeof(float);
      same = same && std::memcmp(answers[0].data(), answers[1].data(), bytes) == 0 &&
             std::memcmp(answers[0].data(), answers[2].data(), bytes) == 0;
    }
    const std::string why_not = text("the vendor wants an input in host memory, of", on_host);
    if (recordable == 0) {
      cuda_graphs_ = "none: " + why_not;
    } else if (warm_->recorded() < recordable) {
      cuda_graphs_ = text("none: ", one_line(warm_->why_not_recorded()));
    } else if (!same) {
      recording_.turn_off();
      cuda_graphs_ = "none: the recorded graph gave other numbers";
    } else {
      cuda_graphs_ = on_host.empty() ? "decode" : "decode, in part: " + why_not;
    }
  }

  const VendorLibrary& library_;
  const Bundle& bundle_;
  const EngineRecord& record_;
  cuda::DeviceInfo device_;
  cuda::Context context_;
  Copies copies_;
  Recording recording_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;       // must outlive its engines
  std::vector<std::unique_ptr<GraphEngine>> graphs_;  // by index in the manifest's graphs; NULL if the engine lacks it
  WorkspaceShare share_;
  std::string cuda_graphs_;
  std::mutex mutex_;                       // guards the members below
  std::unique_ptr<DeviceWorkspace> warm_;  // from rehearse(); taken by the first caller
};

std::unique_ptr<Executor> open_executor(const Bundle& bundle, const ExecutorOptions& options) {
  if (bundle.engine() == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0605", kVendor, "this backend runs engines, got the plain graphs",
                "run titans-export build for this device, or open with another backend");
  }
  return std::make_unique<DeviceExecutor>(bundle, options);
}

LibraryInfo look_for_library(const std::string& path) {
  LibraryInfo info;
  try {
    info.version = VendorLibrary::load(path).version();
  } catch (const Error& error) {
    info.why_not = error.problem();
    return info;
  }
  const PluginLibrary plugin = find_plugin_library();
  info.plugin_version = plugin.version;
  info.plugin_why_not = plugin.why_not;
  return info;
}

}  // namespace
}  // namespace titans::core

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &titans::core::open_executor,
                                                &titans::core::look_for_library};
  return &entry;
}
