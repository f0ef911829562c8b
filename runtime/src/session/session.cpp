#include "session/session.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <limits>
#include <optional>
#include <thread>
#include <utility>

#include <nlohmann/json.hpp>

#include "backends/backend_loader.h"
#include "base/error.h"
#include "base/forks.h"
#include "base/log.h"
#include "state/journal.h"

namespace titans::core {
namespace {

KernelChoice read_kernel_choice(const std::string& name) {
  if (name == "auto") return KernelChoice::kAuto;
  if (name == "require") return KernelChoice::kRequire;
  if (name == "off") return KernelChoice::kOff;
  throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session", text("unknown memory_kernel: ", quoted(name)),
              "choose auto, require or off");
}

// The path of the vendor library for a backend, from `lines`. The environment variable takes precedence; the backend
// reads it itself. TITANS_TENSORRT serves tensorrt_10 and tensorrt_11.
std::string hinted_library(const std::string& lines, const std::string& module, const std::string& backend) {
  std::string variable = "TITANS_" + backend;
  std::transform(variable.begin(), variable.end(), variable.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::toupper(letter)); });
  const char* named = std::getenv(variable.c_str());
  if (named != nullptr && *named != '\0') return {};
  std::size_t at = 0;
  while (at < lines.size()) {
    const std::size_t end = std::min(lines.find('\n', at), lines.size());
    const std::string line = lines.substr(at, end - at);
    if (line.compare(0, module.size() + 1, module + "=") == 0) return line.substr(module.size() + 1);
    at = end + 1;
  }
  return {};
}

std::string library_for(const SessionOptions& options, const std::string& module) {
  if (!options.backend_library.empty()) return options.backend_library;
  // "tensorrt_10" belongs to the backend tensorrt.
  const std::size_t digits = module.find_last_not_of("0123456789");
  const bool numbered = digits + 1 < module.size() && module[digits] == '_';
  return hinted_library(options.libraries, module, numbered ? module.substr(0, digits) : module);
}

std::vector<MemoryView> list_memories(const Manifest& manifest) {
  std::vector<MemoryView> memories;
  for (std::size_t index = 0; index < manifest.state.size(); ++index) {
    const StateTensor& state = manifest.state[index];
    if (state.role != "memory") continue;
    const std::size_t elements = state.bytes / sizeof(float);
    const auto row = static_cast<std::size_t>(state.shape.back());
    if (state.layout.empty()) {
      memories.push_back({state.name, state.shape, elements, index, 0, row, row, FieldDtype::kFloat32});
    }
    for (const MemoryField& field : state.layout) {
      Shape shape(state.shape.begin(), state.shape.end() - 1);
      shape.insert(shape.end(), field.shape.begin(), field.shape.end());
      std::size_t extent = 1;
      for (const std::int64_t dimension : field.shape) extent *= static_cast<std::size_t>(dimension);
      const std::size_t columns = field.shape.empty() ? 1 : static_cast<std::size_t>(field.shape.back());
      memories.push_back({field_name(state, field), shape, elements / row * extent, index, field.offset, extent,
                          columns, field.dtype});
    }
  }
  return memories;
}

// A memory diverges if a norm exceeds the bundle's limit or, without one, this many times the norm that calibration
// saw. Healthy memories of trained models stay within 4 times; divergence grows by powers of ten.
constexpr double kDivergingFactor = 32;

std::vector<NormField> list_norm_fields(const Manifest& manifest, const std::vector<MemoryView>& memories) {
  std::vector<NormField> fields;
  std::int32_t layer = -1;
  for (std::size_t index = 0; index < memories.size(); ++index) {
    const MemoryView& memory = memories[index];
    const StateTensor& state = manifest.state[memory.state];
    if (index == 0 || memory.state != memories[index - 1].state) ++layer;
    const auto named = std::find_if(state.layout.begin(), state.layout.end(),
                                    [&](const MemoryField& field) { return field_name(state, field) == memory.name; });
    if (!(named == state.layout.end() ? state.layout.empty() : has_norm(*named)) || memory.extent == 0) continue;
    const auto row = static_cast<std::size_t>(state.shape.back());
    constexpr double kNone = std::numeric_limits<double>::infinity();
    NormField field{memory.name,   index,          memory.state, layer, memory.offset,
                    memory.extent, memory.columns, memory.dtype, row,   state.bytes / sizeof(float) / row,
                    kNone,         kNone};
    const std::vector<GuardField>& known = manifest.guard.fields;
    const auto found =
        std::find_if(known.begin(), known.end(), [&](const GuardField& one) { return one.name == memory.name; });
    if (found != known.end()) {
      field.limit = found->limit.value_or(kNone);
      // A field that calibration saw empty has no scale.
      const double seen = found->seen.value_or(0);
      field.diverging = found->limit.value_or(seen > 0 ? kDivergingFactor * seen : kNone);
    }
    fields.push_back(std::move(field));
  }
  return fields;
}

// Every token reads the weights, so reading the memory's norms once in this many tokens takes less than 1 % of the
// time. Copies from a device are slower by another factor.
std::uint64_t find_check_interval(const Manifest& manifest, const std::vector<NormField>& fields, bool on_host) {
  constexpr std::uint64_t kHostShare = 1000, kDeviceShare = 64000, kLongest = 4096;
  std::uint64_t bytes = 0;
  for (const NormField& field : fields) bytes += field.extent * field.heads * sizeof(float);
  const auto weights = manifest.files.find(manifest.weights_file);
  const std::uint64_t read = weights == manifest.files.end() ? 0 : weights->second.bytes;
  if (read == 0) return kLongest;
  const std::uint64_t share = on_host ? kHostShare : kDeviceShare;
  return std::clamp<std::uint64_t>(bytes / read >= kLongest ? kLongest : share * bytes / read, 1, kLongest);
}

titans_guard find_default_guard(const Manifest& manifest, const std::string& name) {
  constexpr float kNone = std::numeric_limits<float>::infinity();
  titans_guard guard{sizeof(titans_guard), manifest.guard.policy, kNone, kNone, manifest.guard.restart_every, 1};
  if (name == "bundle") return guard;
  const std::optional<std::int32_t> policy = guard_policy_named(name);
  if (!policy) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session", text("unknown guard: ", quoted(name)),
                "choose bundle, off, raise, freeze, skip, rewind, decay or restart");
  }
  guard.policy = *policy;
  return guard;
}

// True if the streams of a batch may share graph calls.
bool read_batch(const std::string& name) {
  if (name == "exact") return false;
  if (name == "fast") return true;
  throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session", text("unknown batch: ", quoted(name)),
              "choose exact or fast");
}

// Bytes that a stream allocates: two buffers for a tensor updated in place, three for a swapped one.
std::uint64_t stream_bytes(const Manifest& manifest, const Executor& executor) {
  std::uint64_t bytes = static_cast<std::uint64_t>(manifest.output_size) * sizeof(float);
  for (std::size_t index = 0; index < manifest.state.size(); ++index) {
    bytes += manifest.state[index].bytes * (executor.in_place(index) ? 2U : 3U);
  }
  return bytes;
}

bool read_operator_choice(const std::string& name) {
  if (name == "known") return false;
  if (name == "any") return true;
  throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session", text("unknown operators: ", quoted(name)),
              "choose known or any");
}

// An empty text is refused: it may come from a variable that was not set.
void check_digits(const std::optional<std::string>& sha256) {
  if (!sha256) return;
  const bool digits = sha256->find_first_not_of("0123456789abcdefABCDEF") == std::string::npos;
  if (digits && sha256->size() == 64) return;
  throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session",
              text("expected expect_sha256 as 64 hexadecimal digits, got ", quoted(sha256->substr(0, 80))),
              "give the digits that titans-export inspect prints");
}

std::string describe(const Bundle& bundle, const Executor& executor, const SessionOptions& options,
                     const DeviceInfo& device_info, const EngineChoice& choice, const titans_guard& guard) {
  using nlohmann::json;
  const Manifest& manifest = bundle.manifest();
  json graphs = json::array();
  for (const EngineGraph& one : bundle.graphs()) {
    const Graph& graph = manifest.graphs[one.graph];
    graphs.push_back(
        {{"name", graph.name}, {"tokens", graph.tokens}, {"stride", graph.stride}, {"offsets", graph.offsets}});
  }
  json others = json::array();
  for (const auto& [name, reason] : choice.others) others.push_back({{"name", name}, {"reason", reason}});
  json state = json::array();
  for (std::size_t index = 0; index < manifest.state.size(); ++index) {
    const StateTensor& tensor = manifest.state[index];
    json fields = json::object();
    for (const MemoryField& field : tensor.layout) fields[field.name] = field.kind;
    state.push_back({{"name", tensor.name},
                     {"role", tensor.role},
                     {"dtype", dtype_info(tensor.dtype).name},
                     {"shape", tensor.shape},
                     {"in_place", executor.in_place(index)},
                     {"fields", fields}});
  }
  const bool tokens = manifest.input_kind == InputKind::kTokens;
  const json input{{"kind", input_kind_name(manifest.input_kind)},
                   {"name", manifest.input},
                   {"dtype", dtype_info(manifest.input_dtype()).name},
                   {"size", manifest.input_size}};
  const json output{{"kind", tokens ? "logits" : "vectors"},
                    {"name", manifest.output},
                    {"dtype", "float32"},
                    {"size", manifest.output_size}};
  const json info{{"bundle", bundle.folder().string()},
                  {"model", json::parse(manifest.model)},
                  {"device", options.device},
                  {"device_name", device_info.name.empty() ? json() : json(device_info.name)},
                  {"engine", choice.engine == nullptr ? json() : json(choice.engine->name)},
                  {"engine_reason", choice.reason},
                  {"engines_not_chosen", others},
                  {"details", executor.details()},
                  {"backend", options.backend},
                  {"backend_version", executor.version()},
                  {"memory_kernel", executor.memory_kernel()},
                  {"vocab_size", tokens ? json(manifest.input_size) : json()},
                  {"input", input},
                  {"output", output},
                  {"graphs", graphs},
                  {"state", state},
                  {"batch", {{"mode", options.batch}, {"streams_per_call", executor.most_streams()}}},
                  {"guard", {{"policy", guard_policy_name(guard.policy)}, {"restart_every", guard.restart_every}}},
                  {"tokenizer", json::parse(manifest.tokenizer)}};
  // A path may not be UTF-8, but JSON must be.
  return info.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace

std::shared_ptr<Session> Session::open(const std::filesystem::path& path, const SessionOptions& options) {
  const ForkSensitive sensitive;
  SessionOptions chosen = options;
  if (chosen.threads < 0) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session", text("expected threads >= 0, got ", chosen.threads),
                "give 0 for the default");
  }
  if (chosen.batch_threads < 0) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session",
                text("expected batch_threads >= 0, got ", chosen.batch_threads), "give 0 for one per processor");
  }
  if (chosen.memory_budget > 0 && chosen.spill_dir.empty()) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session", "memory_budget without spill_dir",
                "name a folder for the spilled streams");
  }
  read_batch(chosen.batch);
  find_default_guard({}, chosen.guard);  // refuses an unknown name before any file is read
  const KernelChoice memory_kernel = read_kernel_choice(chosen.memory_kernel);
  const bool any_operator = read_operator_choice(chosen.operators);
  check_digits(chosen.expect_sha256);
  if (!chosen.backend.empty()) check_backend(chosen.backend);
  DeviceInfo device_info = find_device_info(chosen.device);
  EngineChoice choice;
  const auto choose = [&](const Manifest& manifest) {
    const EngineRequest request{path.string(), chosen.device, chosen.engine, chosen.backend, chosen.memory_kernel};
    for (const std::string& module : modules_to_look_at(manifest, device_info, request)) {
      device_info.libraries[module] = find_library(module, chosen.plugin_dir, library_for(chosen, module));
    }
    choice = choose_engine(manifest, device_info, request, default_backend(device_info.kind));
    return choice.engine;
  };
  auto bundle = std::make_unique<const Bundle>(path, choose, chosen.expect_sha256.value_or(""));
  chosen.backend = choice.backend;
  const BackendEntry& backend = load_backend(choice.module, chosen.plugin_dir);
  if (any_operator && log_wanted(TITANS_LOG_WARNING)) {
    log(TITANS_LOG_WARNING, "session",
        text("operators=\"any\": the graphs of ", path.string(),
             " may have any operator, and some read and write memory outside of their tensors; for your own bundles "
             "only"));
  }
  auto executor = backend.open(
      *bundle, {chosen.device, library_for(chosen, choice.module), chosen.threads, memory_kernel, any_operator});
  auto session = std::make_shared<Session>(std::move(bundle), std::move(executor), chosen, device_info, choice);
  if (log_wanted(TITANS_LOG_INFO)) {
    log(TITANS_LOG_INFO, "session",
        text("opened ", path.string(), " on ", chosen.device, " with ", chosen.backend, ' ',
             session->executor().version(), ", memory by ", session->executor().memory_kernel(), "; ", choice.reason));
  }
  return session;
}

Session::Session(std::unique_ptr<const Bundle> bundle, std::unique_ptr<Executor> executor,
                 const SessionOptions& options, const DeviceInfo& device_info, const EngineChoice& choice)
    : bundle_(std::move(bundle)),
      executor_(std::move(executor)),
      memories_(list_memories(bundle_->manifest())),
      norm_fields_(list_norm_fields(bundle_->manifest(), memories_)),
      check_interval_(find_check_interval(bundle_->manifest(), norm_fields_, options.device == "cpu")),
      default_guard_(find_default_guard(bundle_->manifest(), options.guard)),
      info_(describe(*bundle_, *executor_, options, device_info, choice, default_guard_)),
      state_schema_(bundle_->manifest(), options.backend, options.device),
      batch_thread_count_(options.batch_threads),
      groups_batches_(read_batch(options.batch) && executor_->most_streams() > 1) {
  for (const StateTensor& state : manifest().state) {
    if (state.role != "memory") continue;
    const std::uint64_t chunk = state.chunk.value_or(1);
    const auto same = std::find_if(chunk_groups_.begin(), chunk_groups_.end(), [&](const ChunkGroup& one) {
      return one.chunk == chunk && one.rows.segment == state.rows.segment && one.rows.longterm == state.rows.longterm;
    });
    if (same != chunk_groups_.end()) {
      ++same->memories;
    } else {
      chunk_groups_.push_back({chunk, state.rows, 1});
    }
  }
  if (options.memory_budget == 0) return;
  const std::uint64_t least = stream_bytes(manifest(), *executor_);
  if (options.memory_budget < least) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0502", "session",
                text("expected a memory_budget of at least one stream, ", least, " bytes, got ", options.memory_budget),
                "give more, or 0 for no limit");
  }
  cache_ = std::make_unique<StateCache>(state_schema_, metrics_, options.memory_budget, options.spill_dir);
}

Session::~Session() {
  const ForkSensitive sensitive(true);
  batch_threads_.reset();
  idle_.clear();
  executor_.reset();
}

std::string Session::metrics_text() const {
  std::filesystem::path folder = bundle_->folder();
  if (!folder.has_filename()) folder = folder.parent_path();  // the path ended with a slash
  return metrics_.text(folder.filename().string());
}

std::uint64_t Session::chunk_updates(std::uint64_t position, std::uint64_t tokens) const {
  std::uint64_t chunk_updates = 0;
  for (const ChunkGroup& one : chunk_groups_) {
    chunk_updates +=
        one.memories * (one.rows.before(position + tokens) / one.chunk - one.rows.before(position) / one.chunk);
  }
  return chunk_updates;
}

std::size_t Session::most_streams(std::size_t graph) const {
  // More tokens make no matmul faster and let the other streams wait longer.
  constexpr std::size_t kMostTokens = 4096, kMostOutputBytes = std::size_t{64} << 20;
  const auto tokens = static_cast<std::size_t>(manifest().graphs[graph].tokens);
  const std::size_t by_tokens = kMostTokens / tokens;
  const std::size_t by_outputs = kMostOutputBytes / sizeof(float) / output_size() / tokens;
  return std::max<std::size_t>(1, std::min({executor_->most_streams(), by_tokens, by_outputs}));
}

std::size_t Session::streams_in_budget() const {
  if (cache_ == nullptr) return std::numeric_limits<std::size_t>::max();
  return std::max<std::size_t>(1, cache_->budget() / stream_bytes(manifest(), *executor_));
}

ThreadPool& Session::batch_threads() {
  const std::lock_guard lock(mutex_);
  if (batch_threads_ == nullptr) {
    const auto wanted = static_cast<unsigned>(batch_thread_count_);
    batch_threads_ =
        std::make_unique<ThreadPool>(std::max(1U, wanted > 0 ? wanted : std::thread::hardware_concurrency()));
  }
  return *batch_threads_;
}

Session::WorkspaceLease::WorkspaceLease(Session& session) : session_(session) {
  {
    const std::lock_guard lock(session.mutex_);
    if (!session.idle_.empty()) {
      workspace_ = std::move(session.idle_.back());
      session.idle_.pop_back();
      return;
    }
  }
  workspace_ = session.executor_->make_workspace();
  // Reserved here so that returning a workspace cannot fail.
  const std::lock_guard lock(session.mutex_);
  session.idle_.reserve(++session.workspaces_);
}

Session::WorkspaceLease::~WorkspaceLease() {
  const std::lock_guard lock(session_.mutex_);
  session_.idle_.push_back(std::move(workspace_));
}

}  // namespace titans::core
