// The ONNX Runtime backend: one session per graph over shared weights.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backends/backend.h"
#include "backends/onnxruntime/device_context.h"
#include "backends/onnxruntime/external_data.h"
#include "backends/onnxruntime/graph_check.h"
#include "backends/onnxruntime/graph_nodes.h"
#include "backends/onnxruntime/graph_session.h"
#include "backends/onnxruntime/library.h"
#include "backends/onnxruntime/memory_kernel.h"
#include "backends/onnxruntime/memory_nodes.h"
#include "backends/onnxruntime/page_releaser.h"
#include "backends/onnxruntime/workspace.h"
#include "base/error.h"
#include "base/mapped_file.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace titans::core {
namespace {

// glibc keeps what ONNX Runtime frees while it rearranges weights, as much as the weights of each quantised graph.
void return_free_memory() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

class OrtExecutor final : public Executor {
 public:
  OrtExecutor(const Bundle& bundle, const ExecutorOptions& options)
      : library_(OrtLibrary::load(options.library)),
        manifest_(bundle.manifest()),
        context_(make_device_context(library_, options.device)),
        memory_kernel_(options.memory_kernel, context_->cuda_ordinal()),
        in_place_(manifest_.state.size(), memory_kernel_.used()),
        host_(describe_host(library_)),
        prepacked_(nullptr, library_.api().ReleasePrepackedWeightsContainer) {
    if (!memory_kernel_.used()) require_float32_memories(options.memory_kernel);
    create_container();
    {
      const PageReleaser releaser(bundle);
      share_weights(bundle);
      for (const EngineGraph& graph : bundle.graphs()) {
        open(bundle, graph, options);
        return_free_memory();
      }
    }
    if (options.memory_kernel == KernelChoice::kRequire && memory_nodes_ == 0) {
      throw Error(TITANS_UNSUPPORTED, "E0607", "onnxruntime",
                  "memory_kernel=\"require\", but the graphs contain the memory as standard operators",
                  R"(pass memory_kernel="auto")");
    }
    name_bindings();
    const bool all_in_place = std::find(in_place_.begin(), in_place_.end(), false) == in_place_.end();
    pooled_ =
        manifest_.takes_streams() && all_in_place && !manifest_.state.empty() && context_->open_pools(manifest_.state);
  }

  std::string version() const override { return library_.version(); }

  std::string memory_kernel() const override {
    return memory_nodes_ == 0 ? std::string(MemoryKernel::kNone) : memory_kernel_.name();
  }

  // Only with our kernel. Without it, ONNX Runtime's own behaviour is unchanged.
  bool in_place(std::size_t state) const override { return in_place_[state]; }

  std::unique_ptr<Buffer> allocate(std::size_t state) override { return context_->allocate(manifest_.state[state]); }

  std::vector<std::unique_ptr<Buffer>> allocate_current(std::size_t states) override {
    std::vector<std::unique_ptr<Buffer>> buffers;
    if (pooled_) buffers = context_->allocate_slot();
    return buffers.empty() ? Executor::allocate_current(states) : std::move(buffers);
  }

  std::unique_ptr<Workspace> make_workspace() override {
    return std::make_unique<OrtWorkspace>(library_, *host_, *context_, manifest_);
  }

  void run(const Call& call, Workspace& workspace) override {
    auto& bound = static_cast<OrtWorkspace&>(workspace);
    bound.bind(call);
    run_bound(call.graph, bound);
  }

  std::size_t most_streams() const override { return pooled_ ? kMostStreams : 1; }

  void run_together(const Call* calls, std::size_t count, Workspace& workspace) override {
    auto& bound = static_cast<OrtWorkspace&>(workspace);
    if (count == 1) {
      bound.bind(calls[0]);
    } else {
      bound.bind_together(calls, count);
    }
    run_bound(calls[0].graph, bound);
  }

 private:
  void run_bound(std::size_t graph, OrtWorkspace& bound) {
    const std::string problem = text("graph ", manifest_.graphs[graph].name, " failed");
    constexpr std::string_view kFix = "check the input and the bundle";
    context_->before_run();
    library_.check(
        library_.api().Run(sessions_.find(graph)->second.get(), nullptr, input_names_.data(), bound.inputs().data(),
                           bound.inputs().size(), output_names_.data(), bound.outputs().size(), bound.outputs().data()),
        problem, kFix);
    const std::string error = memory_kernel_.take_gpu_error();
    if (!error.empty()) throw Error(TITANS_FAILED, "E0609", "onnxruntime", text(problem, ": ", error), kFix);
  }

  // ONNX has no operators that decode other memory dtypes.
  void require_float32_memories(KernelChoice choice) const {
    for (const StateTensor& state : manifest_.state) {
      for (const MemoryField& field : state.layout) {
        if (field.dtype == FieldDtype::kFloat32) continue;
        const bool off = choice == KernelChoice::kOff;
        throw Error(
            TITANS_UNSUPPORTED, "E0607", "onnxruntime",
            text(field_name(state, field), " has memory dtype ", field_dtype_name(field.dtype),
                 ", which needs our memory kernel, got ", off ? R"(memory_kernel="off")" : "a runtime without it"),
            off ? R"(pass memory_kernel="auto")" : "install the runtime with its kernels");
      }
    }
  }

  void create_container() {
    OrtPrepackedWeightsContainer* prepacked = nullptr;
    library_.check(library_.api().CreatePrepackedWeightsContainer(&prepacked), "cannot create a container for weights",
                   "free some memory");
    prepacked_.reset(prepacked);
  }

  void open(const Bundle& bundle, const EngineGraph& entry, const ExecutorOptions& options) {
    const SessionShare share{library_, bundle, weights_, *prepacked_, *context_, memory_kernel_, options.threads};
    // Threads that spin after a call slow the next graph down. So only the decode graph's threads spin, and only if it
    // decodes every token. Its calls are short, so waking threads would cost most there.
    const EngineGraph& decoding = bundle.graphs()[bundle.schedule().decoding_graph()];
    const auto singles = std::count_if(bundle.graphs().begin(), bundle.graphs().end(), [&](const EngineGraph& each) {
      return manifest_.graphs[each.graph].tokens == 1;
    });
    const bool spin = entry.graph == decoding.graph && singles == 1 && context_->cuda_ordinal() < 0;
    const auto open_session = [&] { sessions_.emplace(entry.graph, open_graph(share, entry, spin)); };
    const MappedFile file(bundle.folder() / entry.file);
    check_external_data(file.text(), entry.file, weights_files(bundle));
    check_encoding(file.text(), entry.file);
    if (!options.any_operator) check_operators(file.text(), entry.file, bundle.engine() != nullptr);
    if (!memory_kernel_.used()) return open_session();
    const GraphNodes nodes = read_nodes(file.text(), entry.file);
    memory_nodes_ += count_memory_nodes(nodes);
    check_memory_attributes(nodes, entry.file);
    find_in_place(nodes);
    memory_kernel_.open_on_gpu(nodes, entry.file, open_session);
  }

  // Files that a graph may reference. They have been checked against the manifest.
  static std::set<std::string, std::less<>> weights_files(const Bundle& bundle) {
    std::set<std::string, std::less<>> files{bundle.manifest().weights_file};
    if (bundle.engine() != nullptr && !bundle.engine()->weights_file.empty()) {
      files.insert(bundle.engine()->weights_file);
    }
    return files;
  }

  void find_in_place(const GraphNodes& nodes) {
    const StateFlow flow(nodes, context_->cuda_ordinal() < 0);  // our kernels of caches are for the CPU
    for (std::size_t state = 0; state < in_place_.size(); ++state) {
      const StateTensor& tensor = manifest_.state[state];
      in_place_[state] = in_place_[state] && flow.in_place(tensor.input, tensor.output);
    }
  }

  void share_weights(const Bundle& bundle) {
    std::map<std::string, Shape> shapes;
    for (const EngineGraph& graph : bundle.graphs()) {
      for (const auto& [name, declared] : shared_initializers(bundle, graph)) {
        const auto [known, added] = shapes.emplace(name, declared.shape);
        if (known->second != declared.shape) {  // int4 bytes alone do not determine the shape
          throw Error(TITANS_FAILED, "E0207", graph.file,
                      text("initialiser ", name, ": expected shape ", shape_text(known->second),
                           " as in the other graphs, got ", shape_text(declared.shape)),
                      "export the bundle again");
        }
        if (!added) continue;
        const auto type = static_cast<ONNXTensorElementDataType>(declared.type);
        weights_.emplace(name, context_->share_weight(bundle.weights().find(name)->second, type, declared.shape));
      }
    }
  }

  void name_bindings() {
    input_names_ = {manifest_.input.c_str(), manifest_.position_input.c_str(), manifest_.learn_input.c_str()};
    if (!manifest_.valid_input.empty()) input_names_.push_back(manifest_.valid_input.c_str());
    if (!manifest_.slots_input.empty()) input_names_.push_back(manifest_.slots_input.c_str());
    output_names_ = {manifest_.output.c_str()};
    for (const StateTensor& state : manifest_.state) {
      input_names_.push_back(state.input.c_str());
      output_names_.push_back(state.output.c_str());
    }
  }

  const OrtLibrary& library_;
  const Manifest& manifest_;
  const std::unique_ptr<DeviceContext> context_;
  const MemoryKernel memory_kernel_;
  std::vector<bool> in_place_;    // one per state tensor of the manifest
  std::size_t memory_nodes_ = 0;  // of all graphs, if the kernel is used
  bool pooled_ = false;           // state lies in pools, and a call takes several streams
  OrtHandle<OrtMemoryInfo> host_;
  OrtHandle<OrtPrepackedWeightsContainer> prepacked_;                // must outlive the sessions
  std::map<std::string, OrtHandle<OrtValue>, std::less<>> weights_;  // must outlive the sessions
  std::map<std::size_t, OrtHandle<OrtSession>> sessions_;            // by index in the manifest's graphs
  std::vector<const char*> input_names_;
  std::vector<const char*> output_names_;
};

LibraryInfo find_library(const std::string& path) {
  LibraryInfo info;
  try {
    info.version = OrtLibrary::load(path).version();
  } catch (const Error& error) {
    info.why_not = error.problem();
  }
  return info;
}

std::unique_ptr<Executor> open_executor(const Bundle& bundle, const ExecutorOptions& options) {
  return std::make_unique<OrtExecutor>(bundle, options);
}

}  // namespace
}  // namespace titans::core

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &titans::core::open_executor,
                                                &titans::core::find_library};
  return &entry;
}
