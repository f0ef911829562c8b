// The ONNX Runtime backend: one session per graph, all of them over the same weights, state in host memory.
#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "backend.h"
#include "backends/onnxruntime/graph_nodes.h"
#include "backends/onnxruntime/graph_session.h"
#include "backends/onnxruntime/host_tensor.h"
#include "backends/onnxruntime/library.h"
#include "backends/onnxruntime/memory_kernel.h"
#include "backends/onnxruntime/memory_nodes.h"
#include "error.h"
#include "mapped_file.h"

namespace titans::core {
namespace {

class OrtBuffer final : public Buffer {
 public:
  OrtBuffer(const OrtLibrary& library, const OrtMemoryInfo& host, const StateTensor& state)
      : memory_(state.bytes),
        value_(view_tensor(library, host, memory_.data(), state.bytes, state.dtype, state.shape)) {}

  void upload(const std::byte* host) override { std::memcpy(memory_.data(), host, memory_.size()); }
  void download(std::byte* host) const override { std::memcpy(host, memory_.data(), memory_.size()); }
  void copy_from(const Buffer& other) override { upload(static_cast<const OrtBuffer&>(other).memory_.data()); }
  void copy_stripe_from(const Buffer& other, const Stripe& stripe) override {
    const std::byte* from = static_cast<const OrtBuffer&>(other).memory_.data();
    for (std::size_t row = 0; row < stripe.rows; ++row) {
      const std::size_t at = row * stripe.pitch + stripe.offset;
      std::memcpy(memory_.data() + at, from + at, stripe.bytes);
    }
  }
  OrtValue* value() const { return value_.get(); }

 private:
  HostMemory memory_;
  OrtHandle<OrtValue> value_;
};

class OrtWorkspace final : public Workspace {
 public:
  OrtWorkspace(const OrtLibrary& library, const OrtMemoryInfo& host, const Manifest& manifest)
      : vocab_(static_cast<std::size_t>(manifest.vocab_size)),
        // The first graph consumes most tokens.
        tokens_(static_cast<std::size_t>(manifest.graphs[0].tokens) * sizeof(std::int64_t)),
        logits_(static_cast<std::size_t>(manifest.graphs[0].tokens) * vocab_ * sizeof(float)),
        position_(sizeof(std::int64_t)),
        learn_(sizeof(bool)),
        position_value_(view_tensor(library, host, position_.data(), position_.size(), DType::kInt64, {1})),
        learn_value_(view_tensor(library, host, learn_.data(), learn_.size(), DType::kBool, {1})),
        inputs_(3 + manifest.state.size()),
        outputs_(1 + manifest.state.size()) {
    for (const Graph& graph : manifest.graphs) {
      const auto count = static_cast<std::size_t>(graph.tokens);
      token_values_.push_back(
          view_tensor(library, host, tokens_.data(), count * sizeof(std::int64_t), DType::kInt64, {1, graph.tokens}));
      logit_values_.push_back(view_tensor(library, host, logits_.data(), count * vocab_ * sizeof(float),
                                          DType::kFloat32, {1, graph.tokens, manifest.vocab_size}));
    }
  }

  const float* logits(std::size_t first_row, std::size_t) override {
    return reinterpret_cast<const float*>(logits_.data()) + first_row * vocab_;
  }

  void bind(const Call& call, std::size_t token_count) {
    std::copy_n(call.tokens, token_count, reinterpret_cast<std::int64_t*>(tokens_.data()));
    std::memcpy(position_.data(), &call.position, sizeof(call.position));
    std::memcpy(learn_.data(), &call.learn, sizeof(call.learn));
    inputs_[0] = token_values_[call.graph].get();
    inputs_[1] = position_value_.get();
    inputs_[2] = learn_value_.get();
    outputs_[0] = logit_values_[call.graph].get();
    for (std::size_t state = 0; state + 1 < outputs_.size(); ++state) {
      inputs_[3 + state] = static_cast<const OrtBuffer*>(call.state[state])->value();
      outputs_[1 + state] = static_cast<const OrtBuffer*>(call.next_state[state])->value();
    }
  }

  // What bind has set.
  const std::vector<const OrtValue*>& inputs() const { return inputs_; }
  std::vector<OrtValue*>& outputs() { return outputs_; }

 private:
  std::size_t vocab_;
  HostMemory tokens_;
  HostMemory logits_;
  HostMemory position_;
  HostMemory learn_;
  OrtHandle<OrtValue> position_value_;
  OrtHandle<OrtValue> learn_value_;
  std::vector<OrtHandle<OrtValue>> token_values_;  // one per graph, all over tokens_
  std::vector<OrtHandle<OrtValue>> logit_values_;  // one per graph, all over logits_
  std::vector<const OrtValue*> inputs_;
  std::vector<OrtValue*> outputs_;
};

class OrtEngine final : public Engine {
 public:
  OrtEngine(const Bundle& bundle, const EngineOptions& options)
      : library_(OrtLibrary::load(options.library)),
        manifest_(bundle.manifest()),
        memory_kernel_(options.memory_kernel),
        in_place_(manifest_.state.size(), memory_kernel_.used()),
        host_(nullptr, library_.api().ReleaseMemoryInfo),
        prepacked_(nullptr, library_.api().ReleasePrepackedWeightsContainer) {
    create_shared();
    share_weights(bundle);
    const SessionShare share{library_, bundle, weights_, *prepacked_, memory_kernel_, options.threads};
    for (const Graph& graph : manifest_.graphs) {
      if (memory_kernel_.used()) look_into(bundle, graph);
      // The graph of fewest tokens decodes: there a call is short and waking threads would cost most.
      sessions_.push_back(open_graph(share, graph, &graph == &manifest_.graphs.back()));
    }
    name_bindings();
  }

  std::string version() const override { return library_.version(); }

  std::string memory_kernel() const override { return memory_kernel_.name(); }

  // Only with our kernel: without it everything is as ONNX Runtime alone would have it.
  bool in_place(std::size_t state) const override { return in_place_[state]; }

  std::unique_ptr<Buffer> allocate(std::size_t state) override {
    return std::make_unique<OrtBuffer>(library_, *host_, manifest_.state[state]);
  }

  std::unique_ptr<Workspace> make_workspace() override {
    return std::make_unique<OrtWorkspace>(library_, *host_, manifest_);
  }

  void run(const Call& call, Workspace& workspace) override {
    auto& bound = static_cast<OrtWorkspace&>(workspace);
    const Graph& graph = manifest_.graphs[call.graph];
    bound.bind(call, static_cast<std::size_t>(graph.tokens));
    library_.check(
        library_.api().Run(sessions_[call.graph].get(), nullptr, input_names_.data(), bound.inputs().data(),
                           bound.inputs().size(), output_names_.data(), bound.outputs().size(), bound.outputs().data()),
        "a graph that runs", text("check the bundle's graph ", graph.name));
  }

 private:
  void create_shared() {
    constexpr std::string_view kAdvice = "free some memory";
    OrtMemoryInfo* host = nullptr;
    library_.check(library_.api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &host), "host memory",
                   kAdvice);
    host_.reset(host);
    OrtPrepackedWeightsContainer* prepacked = nullptr;
    library_.check(library_.api().CreatePrepackedWeightsContainer(&prepacked), "a container for weights", kAdvice);
    prepacked_.reset(prepacked);
  }

  void look_into(const Bundle& bundle, const Graph& graph) {
    const MappedFile file(bundle.folder() / graph.file);
    const GraphNodes nodes = read_nodes(file.text(), graph.file);
    check_memory_attributes(nodes, graph.file);
    const StateFlow flow(nodes);
    for (std::size_t state = 0; state < in_place_.size(); ++state) {
      const StateTensor& tensor = manifest_.state[state];
      in_place_[state] = in_place_[state] && flow.in_place(tensor.input, tensor.output);
    }
  }

  void share_weights(const Bundle& bundle) {
    for (const Graph& graph : manifest_.graphs) {
      for (const std::string& name : graph.weights) {
        if (weights_.find(name) != weights_.end()) continue;
        const TensorView& tensor = bundle.weights().find(name)->second;
        // ONNX Runtime wants a pointer to what it could write and never writes initialisers; the pages are read-only.
        weights_.emplace(name, view_tensor(library_, *host_, const_cast<std::byte*>(tensor.data), tensor.bytes,
                                           tensor.dtype, tensor.shape));
      }
    }
  }

  void name_bindings() {
    input_names_ = {manifest_.tokens_input.c_str(), manifest_.position_input.c_str(), manifest_.learn_input.c_str()};
    output_names_ = {manifest_.logits_output.c_str()};
    for (const StateTensor& state : manifest_.state) {
      input_names_.push_back(state.input.c_str());
      output_names_.push_back(state.output.c_str());
    }
  }

  const OrtLibrary& library_;
  const Manifest& manifest_;
  const MemoryKernel memory_kernel_;
  std::vector<bool> in_place_;  // one for each of the manifest's state
  OrtHandle<OrtMemoryInfo> host_;
  OrtHandle<OrtPrepackedWeightsContainer> prepacked_;                // outlives the sessions
  std::map<std::string, OrtHandle<OrtValue>, std::less<>> weights_;  // as these do
  std::vector<OrtHandle<OrtSession>> sessions_;
  std::vector<const char*> input_names_;
  std::vector<const char*> output_names_;
};

std::unique_ptr<Engine> open_engine(const Bundle& bundle, const EngineOptions& options) {
  if (options.device != "cpu") {
    throw Error(TITANS_UNSUPPORTED, "onnxruntime", "the device cpu", options.device, "open the session on cpu");
  }
  return std::make_unique<OrtEngine>(bundle, options);
}

}  // namespace
}  // namespace titans::core

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &titans::core::open_engine};
  return &entry;
}
