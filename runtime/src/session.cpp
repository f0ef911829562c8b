#include "session.h"

#include <utility>

#include <nlohmann/json.hpp>

#include "backend_loader.h"
#include "error.h"

namespace titans::core {
namespace {

KernelChoice read_kernel_choice(const std::string& name) {
  if (name == "auto") return KernelChoice::kAuto;
  if (name == "require") return KernelChoice::kRequire;
  if (name == "off") return KernelChoice::kOff;
  throw Error(TITANS_INVALID_ARGUMENT, "session", "memory_kernel out of: auto, require, off", name,
              "choose one of these");
}

std::vector<MemoryView> list_memories(const Manifest& manifest) {
  std::vector<MemoryView> memories;
  for (std::size_t index = 0; index < manifest.state.size(); ++index) {
    const StateTensor& state = manifest.state[index];
    if (state.role != "memory") continue;
    const std::size_t elements = state.bytes / sizeof(float);
    const auto row = static_cast<std::size_t>(state.shape.back());
    if (state.layout.empty()) memories.push_back({state.name, state.shape, elements, index, 0, row});
    for (const MemoryField& field : state.layout) {
      Shape shape(state.shape.begin(), state.shape.end() - 1);
      shape.insert(shape.end(), field.shape.begin(), field.shape.end());
      std::size_t extent = 1;
      for (const std::int64_t dimension : field.shape) extent *= static_cast<std::size_t>(dimension);
      memories.push_back({field_name(state, field), shape, elements / row * extent, index, field.offset, extent});
    }
  }
  return memories;
}

std::string describe(const Bundle& bundle, const Engine& engine, const SessionOptions& options) {
  using nlohmann::json;
  const Manifest& manifest = bundle.manifest();
  json graphs = json::array();
  for (const Graph& graph : manifest.graphs) {
    graphs.push_back({{"name", graph.name}, {"tokens", graph.tokens}, {"align", graph.align}});
  }
  json state = json::array();
  for (std::size_t index = 0; index < manifest.state.size(); ++index) {
    const StateTensor& tensor = manifest.state[index];
    state.push_back({{"name", tensor.name},
                     {"role", tensor.role},
                     {"dtype", dtype_info(tensor.dtype).name},
                     {"shape", tensor.shape},
                     {"in_place", engine.in_place(index)}});
  }
  const json info{{"bundle", bundle.folder().string()},
                  {"model", json::parse(manifest.model)},
                  {"device", options.device},
                  {"backend", options.backend},
                  {"backend_version", engine.version()},
                  {"memory_kernel", engine.memory_kernel()},
                  {"vocab_size", manifest.vocab_size},
                  {"graphs", graphs},
                  {"state", state},
                  {"tokenizer", json::parse(manifest.tokenizer)}};
  // A path need not be UTF-8; a description of it must be.
  return info.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace

std::shared_ptr<Session> Session::open(const std::filesystem::path& path, const SessionOptions& options) {
  SessionOptions chosen = options;
  if (chosen.backend.empty()) chosen.backend = default_backend(chosen.device);
  if (chosen.threads < 0) {
    throw Error(TITANS_INVALID_ARGUMENT, "session", "threads >= 0", text(chosen.threads), "give 0 for the default");
  }
  const KernelChoice memory_kernel = read_kernel_choice(chosen.memory_kernel);
  auto bundle = std::make_unique<const Bundle>(path);
  const BackendEntry& backend = load_backend(chosen.backend, chosen.plugin_dir);
  auto engine = backend.open(*bundle, {chosen.device, chosen.backend_library, chosen.threads, memory_kernel});
  return std::make_shared<Session>(std::move(bundle), std::move(engine), chosen);
}

Session::Session(std::unique_ptr<const Bundle> bundle, std::unique_ptr<Engine> engine, const SessionOptions& options)
    : bundle_(std::move(bundle)),
      engine_(std::move(engine)),
      memories_(list_memories(bundle_->manifest())),
      info_(describe(*bundle_, *engine_, options)) {}

Session::WorkspaceLease::WorkspaceLease(Session& session) : session_(session) {
  {
    const std::lock_guard lock(session.mutex_);
    if (!session.idle_.empty()) {
      workspace_ = std::move(session.idle_.back());
      session.idle_.pop_back();
      return;
    }
  }
  workspace_ = session.engine_->make_workspace();
  // So that giving it back needs no memory and cannot fail.
  const std::lock_guard lock(session.mutex_);
  session.idle_.reserve(++session.workspaces_);
}

Session::WorkspaceLease::~WorkspaceLease() {
  const std::lock_guard lock(session_.mutex_);
  session_.idle_.push_back(std::move(workspace_));
}

}  // namespace titans::core
