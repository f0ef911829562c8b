// Fuzzes the C interface: any sequence of functions with any arguments that the contract of titans.h allows. Handles
// are valid, a generator is closed before its stream, and a pointer covers its declared size. A model computes the
// expected state of every stream.
#include <array>
#include <cmath>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "echo_executor.h"
#include "fuzz.h"
#include "titans/titans.h"

namespace titans::fuzz {
namespace {

using nlohmann::json;

constexpr std::size_t kVocab = 8;
constexpr std::size_t kInputs = 2;
constexpr std::size_t kOutputs = 3;
constexpr std::size_t kMemoryFloats = 4;
constexpr std::size_t kMostStreams = 5;
constexpr std::size_t kMostSteps = 80;
constexpr std::size_t kStepsBetweenReads = 8;

// The expected state of a stream.
struct Model {
  std::uint64_t position = 0;
  int learning = 1;
  std::array<float, kMemoryFloats> memory{0.5F, 0.25F, 0.0F, 3.0F};
  float last = 1.0F;
  bool known = true;  // false: a guard with limits may have frozen it

  void take(float token) {
    if (learning != 0) {
      for (float& value : memory) value = echo(value, token);
    }
    last = echo(last, token);
    ++position;
  }
  // The first output number for the next token.
  float next_output() const { return static_cast<float>(position % 256) + memory[0] + last; }
};

struct Handle {
  titans_stream* stream = nullptr;
  std::size_t session = 0;
  Model model;
  std::map<std::uint64_t, Model> marks;
  int calls_before_cancel = -1;  // by the progress function
  bool guarded = false;
  std::list<titans_generator*> generators;
};

struct Saved {
  Model model;
  std::size_t session;
  std::uint8_t key;  // 0: no key
};

struct Sessions {
  Sessions() {
    const std::filesystem::path tokens = write_bundle("tokens", false), vectors = write_bundle("vectors", true);
    std::filesystem::create_directory(scratch() / "spill");
    std::filesystem::copy(ECHO_BACKEND, scratch() / "libtitans_backend_onnxruntime.so");
    all = {open(tokens, 0, 0), open(vectors, 1, 0), open(tokens, 3, 200)};
  }
  ~Sessions() {
    for (titans_session* session : all) titans_session_close(session);
  }

  static titans_session* open(const std::filesystem::path& bundle, int in_place, std::uint64_t budget) {
    titans_session_options options{};
    const std::string folder = scratch().string(), spill = (scratch() / "spill").string();
    options.struct_size = sizeof(options);
    options.plugin_dir = folder.c_str();
    options.threads = in_place;
    options.batch_threads = budget == 0 ? 1 : 2;
    options.memory_budget = budget;
    options.spill_dir = spill.c_str();
    options.batch = in_place == 3 ? "fast" : "exact";
    titans_session* session = nullptr;
    const titans_status status = titans_session_open(bundle.c_str(), &options, &session);
    check(status == TITANS_OK, std::string("a session: ") + titans_last_error());
    return session;
  }

  static std::filesystem::path write_bundle(const char* name, bool vectors) {
    const std::filesystem::path folder = scratch() / name;
    std::filesystem::create_directory(folder);
    json manifest = json::parse(R"({
      "format": "titans-bundle", "schema_version": 2,
      "input": {"kind": "tokens", "name": "tokens", "dtype": "int64", "vocab_size": 8},
      "output": {"kind": "logits", "name": "logits", "dtype": "float32", "size": 8},
      "controls": {"position": "position", "learn": "learn"},
      "state": [
        {"name": "m", "input": "m.in", "output": "m.next", "dtype": "float32", "shape": [1, 1, 4], "role": "memory",
         "layout": [{"name": "W0", "offset": 0, "shape": [1, 2], "kind": "weights"},
                    {"name": "S0", "offset": 2, "shape": [1, 2], "kind": "surprise"}]},
        {"name": "last", "input": "last.in", "output": "last.next", "dtype": "float32", "shape": [1, 1],
         "role": "cache"}],
      "graphs": [{"name": "decode", "file": "decode.onnx", "tokens": 1, "stride": 1, "weights": []},
                 {"name": "prefill", "file": "prefill.onnx", "tokens": 4, "stride": 2, "weights": []}],
      "weights": {"file": "weights.safetensors"}, "initial_state": {"file": "state.safetensors"}})");
    manifest["model"] = {{"name", name}, {"source", {{"weights_sha256", name}}}};
    if (vectors) {
      manifest["input"] = {{"kind", "vectors"}, {"name", "x"}, {"dtype", "float32"}, {"size", kInputs}};
      manifest["output"] = {{"kind", "vectors"}, {"name", "y"}, {"dtype", "float32"}, {"size", kOutputs}};
    }
    const Model fresh;
    std::string data(5 * sizeof(float), '\0');
    std::memcpy(data.data(), fresh.memory.data(), kMemoryFloats * sizeof(float));
    std::memcpy(data.data() + kMemoryFloats * sizeof(float), &fresh.last, sizeof(float));
    const std::string header = R"({"m": {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [0, 16]},
                                   "last": {"dtype": "F32", "shape": [1, 1], "data_offsets": [16, 20]}})";
    const std::pair<const char*, std::string> files[] = {{"decode.onnx", "a graph"},
                                                         {"prefill.onnx", "another"},
                                                         {"weights.safetensors", safetensors("{}", {})},
                                                         {"state.safetensors", safetensors(header, data)}};
    for (const auto& [file, content] : files) {
      write(folder / file, content);
      manifest["files"][file] = file_record(content);
    }
    write(folder / "manifest.json", manifest.dump());
    return folder;
  }

  std::array<titans_session*, 3> all{};
};

// A copy of `value` that ends at struct_size, so that the address sanitizer detects accesses beyond it.
template <typename Struct>
class Sized {
 public:
  Sized(Struct value, std::size_t struct_size) {
    value.struct_size = struct_size;
    const std::size_t bytes = std::max(sizeof(std::size_t), std::min(struct_size, sizeof(Struct)));
    data_.reset(new (std::align_val_t{alignof(std::max_align_t)}) std::byte[bytes]);
    std::memcpy(data_.get(), &value, bytes);
  }
  Struct* get() const { return reinterpret_cast<Struct*>(data_.get()); }

 private:
  struct Delete {
    void operator()(std::byte* data) const { operator delete[](data, std::align_val_t{alignof(std::max_align_t)}); }
  };
  std::unique_ptr<std::byte[], Delete> data_;
};

int count_down(void* user, std::uint64_t done, std::uint64_t total) {
  check(done <= total, "no more done than there is");
  int& left = *static_cast<int*>(user);
  return left-- == 0 ? 1 : 0;
}

void count_messages(void* user, std::int32_t level, const char* message) {
  check(level >= TITANS_LOG_ERROR && level <= TITANS_LOG_DEBUG && message[0] == '[', "a message of a level");
  ++*static_cast<std::size_t*>(user);
}

class Caller {
 public:
  Caller(Choices choices, Sessions& sessions) : choices_(choices), sessions_(sessions) {}

  ~Caller() {
    titans_set_log(nullptr, nullptr, TITANS_LOG_ERROR);
    while (!handles_.empty()) destroy(handles_.begin());
    for (const auto& [path, saved] : saved_) std::filesystem::remove(path);
  }

  void run() {
    for (std::size_t step = 0; step < kMostSteps && choices_.any_left(); ++step) {
      act();
      for (const Handle& handle : handles_) verify(handle);
      if (touched_ != nullptr) read(*touched_);
      if (step % kStepsBetweenReads == kStepsBetweenReads - 1) read_all();
    }
    read_all();
  }

 private:
  using Place = std::list<Handle>::iterator;

  // Checks the promises that every function makes about its status.
  static bool ok(titans_status status) {
    if (status == TITANS_OK) return true;
    check(status == TITANS_FAILED || status == TITANS_INVALID_ARGUMENT || status == TITANS_UNSUPPORTED ||
              status == TITANS_CANCELLED,
          "a status of the enumeration");
    const std::string message = titans_last_error();
    for (const char* part : {"[", "] ", ". Fix: ", " (TITANS-E"}) {
      check(message.find(part) != std::string::npos, "an error of the one form, unlike: " + message);
    }
    check(message.find('\n') == std::string::npos, "an error of one line");
    return false;
  }

  void verify(const Handle& handle) {
    check(titans_stream_position(handle.stream) == handle.model.position, "the position that is due");
    if (!handle.model.known) return;
    check(titans_stream_learning(handle.stream) == handle.model.learning, "whether it learns as told");
  }

  // Reads all streams and reloads spilled ones. This takes most of the target's time.
  void read_all() {
    for (const Handle& handle : handles_) read(handle);
  }

  void read(const Handle& handle) {
    if (!handle.model.known) return;
    std::array<float, kMemoryFloats> found{};
    check(ok(titans_stream_memory_read(handle.stream, 0, found.data(), 2)), "W0");
    check(ok(titans_stream_memory_read(handle.stream, 1, found.data() + 2, 2)), "S0");
    check(found == handle.model.memory, "a memory that has learned what the stream was fed, and nothing else");
  }

  Place any() {
    touched_ = nullptr;
    if (handles_.empty()) return handles_.end();
    const Place place = std::next(handles_.begin(), static_cast<std::ptrdiff_t>(choices_.below(handles_.size())));
    touched_ = &*place;
    return place;
  }

  // Sometimes NULL.
  titans_session* any_session(std::size_t& index) {
    index = choices_.below(sessions_.all.size() + 1) % sessions_.all.size();
    return choices_.byte() == 255 ? nullptr : sessions_.all[index];
  }

  bool takes_vectors(const Handle& handle) const { return handle.session == 1; }
  std::size_t output_size(const Handle& handle) const { return takes_vectors(handle) ? kOutputs : kVocab; }

  std::vector<std::int32_t> any_tokens() {
    std::vector<std::int32_t> tokens(choices_.below(12));
    for (std::int32_t& token : tokens) {
      const std::uint8_t byte = choices_.byte();
      token = byte < 250 ? static_cast<std::int32_t>(byte % kVocab) : choices_.number<std::int32_t>();
    }
    return tokens;
  }

  std::vector<float> any_vectors() {
    std::vector<float> vectors(choices_.below(12) * kInputs);
    for (float& value : vectors) {
      const std::uint8_t byte = choices_.byte();
      value = byte < 250 ? static_cast<float>(byte) / 4 : choices_.number<float>();
    }
    return vectors;
  }

  titans_output any_choice() {
    const std::uint8_t byte = choices_.byte();
    return static_cast<titans_output>(byte > 250 ? 3 : byte % 3);  // 3 is the largest value in the enumeration's range
  }

  // A size near the right one, or any.
  std::size_t any_size(std::size_t right) {
    const std::uint8_t byte = choices_.byte();
    if (byte < 200) return right;
    if (byte < 240) return right + byte % 8 - 4;
    return choices_.number<std::size_t>();
  }

  std::filesystem::path any_path() {
    std::string name = "s" + std::to_string(choices_.below(3));
    if (choices_.byte() > 240) name = choices_.text(300);
    for (char& letter : name) {
      if (letter == '/' || letter == '.') letter = '_';
    }
    return scratch() / (name.substr(0, name.find('\0')) + ".tstate");
  }

  // Options, sometimes NULL, and the key in them: 0 for none.
  struct StateOptions {
    std::array<std::uint8_t, 32> key{};
    std::optional<Sized<titans_state_options>> options;
    std::uint8_t number = 0;
    const titans_state_options* get() const { return options ? options->get() : nullptr; }
  };
  void choose(StateOptions& out) {
    const std::uint8_t byte = choices_.byte();
    if (byte < 128) return;
    out.number = static_cast<std::uint8_t>(byte % 3);
    out.key.fill(out.number);
    const bool keyed = out.number != 0;
    titans_state_options options{};
    options.key = keyed ? out.key.data() : nullptr;
    options.key_bytes = keyed ? (byte == 255 ? choices_.below(33) : out.key.size()) : 0;
    out.options.emplace(options, any_size(sizeof(options)));
  }

  void add(titans_stream* stream, std::size_t session, const Model& model) {
    Handle& handle = handles_.emplace_back();
    handle.stream = stream;
    handle.session = session;
    handle.model = model;
  }

  void destroy(Place place) {
    if (touched_ == &*place) touched_ = nullptr;
    for (titans_generator* generator : place->generators) titans_generator_destroy(generator);
    titans_stream_destroy(place->stream);
    handles_.erase(place);
  }

  // Updates the model after a successful call that fed these tokens.
  void fed(Handle& handle, const std::vector<std::int32_t>& tokens) {
    for (const std::int32_t token : tokens) {
      check(token >= 0 && token < static_cast<std::int32_t>(kVocab) && token != kFailing, "tokens that can be fed");
      handle.model.take(static_cast<float>(token));
    }
    settle(handle);
  }

  // A guard may have changed state that the model does not track.
  void settle(Handle& handle) {
    if (!handle.guarded) return;
    handle.model.known = false;
    handle.model.learning = titans_stream_learning(handle.stream);
  }

  void check_outputs(const Model& before, const std::vector<float>& inputs, const float* outputs, std::size_t size,
                     titans_output which) const {
    if (!before.known || which == TITANS_OUTPUT_NONE) return;
    Model model = before;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const float expected = model.next_output();
      const std::size_t row = which == TITANS_OUTPUT_ALL ? i : 0;
      if (which == TITANS_OUTPUT_ALL || i + 1 == inputs.size()) {
        check(outputs[row * size] == expected, "the outputs of this stream alone");
      }
      model.take(inputs[i]);
    }
  }

  void feed(Place place) {
    Handle& handle = *place;
    const std::vector<std::int32_t> tokens = any_tokens();
    const titans_output which = any_choice();
    const std::size_t right = which == TITANS_OUTPUT_ALL ? tokens.size() * kVocab : kVocab;
    const std::size_t capacity = any_size(right);
    std::vector<float> logits(std::min<std::size_t>(capacity, 4096));
    float* out = choices_.byte() > 250 ? nullptr : logits.data();
    const Model before = handle.model;
    if (!ok(titans_stream_feed(handle.stream, tokens.data(), tokens.size(), which, out, logits.size()))) return;
    check(!takes_vectors(handle), "tokens for a bundle that takes them");
    fed(handle, tokens);
    if (!handle.guarded && !tokens.empty()) {
      check_outputs(before, {tokens.begin(), tokens.end()}, logits.data(), kVocab, which);
    }
  }

  void feed_vectors(Place place) {
    Handle& handle = *place;
    const std::vector<float> vectors = any_vectors();
    const titans_output which = any_choice();
    std::size_t count = vectors.size() / kInputs;
    std::vector<float> outputs(std::min<std::size_t>(any_size(std::max<std::size_t>(count, 1) * kOutputs), 4096));
    const Model before = handle.model;
    // Counts that overflow are rejected before anything is read.
    const bool absurd = choices_.byte() > 250;
    if (absurd) count = choices_.number<std::size_t>() | std::size_t{1} << 62;
    if (!ok(titans_stream_feed_vectors(handle.stream, vectors.data(), count, which, outputs.data(), outputs.size()))) {
      return;
    }
    check(takes_vectors(handle) && !absurd, "vectors for a bundle that takes them");
    std::vector<float> inputs;
    for (std::size_t i = 0; i < vectors.size(); i += kInputs) {
      check(std::isfinite(vectors[i]) && std::isfinite(vectors[i + 1]), "vectors that can be fed");
      inputs.push_back(echo_token(vectors[i]));
      check(inputs.back() != static_cast<float>(kFailing), "no vector that fails");
      handle.model.take(inputs.back());
    }
    settle(handle);
    if (!handle.guarded && !inputs.empty()) check_outputs(before, inputs, outputs.data(), kOutputs, which);
  }

  void step(Place place) {
    const std::int32_t token =
        choices_.byte() < 200 ? static_cast<std::int32_t>(choices_.below(kVocab)) : choices_.number<std::int32_t>();
    std::vector<float> logits(output_size(*place));
    const Model before = place->model;
    float* out = choices_.byte() > 200 ? nullptr : logits.data();
    if (!ok(titans_stream_step(place->stream, token, out))) return;
    fed(*place, {token});
    if (!place->guarded && out != nullptr) {
      check_outputs(before, {static_cast<float>(token)}, out, kVocab, TITANS_OUTPUT_LAST);
    }
  }

  void score(Place place) {
    const std::vector<std::int32_t> tokens = any_tokens();
    std::vector<float> logprobs(tokens.size());
    if (!ok(titans_stream_score(place->stream, tokens.data(), tokens.size(), logprobs.data()))) return;
    fed(*place, tokens);
    for (const float value : logprobs) check(std::isfinite(value) && value <= 0.0F, "a logarithm of a probability");
  }

  void read_memory(Place place) {
    const std::size_t index = any_size(choices_.below(2));
    titans_memory_info info{};
    if (ok(titans_stream_memory_info(place->stream, index, &info))) {
      check(info.elements == 2 && info.rank == 4, "a field as the bundle has it");
    }
    std::vector<float> values(std::min<std::size_t>(any_size(2), 64));
    if (ok(titans_stream_memory_read(place->stream, index, values.data(), values.size()))) {
      check(index < titans_stream_memory_count(place->stream), "an index of a field");
    }
  }

  void create_generator(Place place) {
    titans_sampling sampling{};
    titans_sampling_init(&sampling);
    const std::uint8_t byte = choices_.byte();
    if ((byte & 1) != 0) sampling.temperature = choices_.number<float>();
    if ((byte & 2) != 0) sampling.top_k = choices_.number<std::int32_t>();
    if ((byte & 4) != 0) sampling.top_p = choices_.number<float>();
    if ((byte & 8) != 0) sampling.min_p = choices_.number<float>();
    if ((byte & 16) != 0) sampling.max_tokens = choices_.number<std::int64_t>();
    const std::vector<std::int32_t> stop = any_tokens();
    sampling.stop_tokens = stop.data();
    sampling.stop_count = stop.size();
    const Sized<titans_sampling> sized(sampling, any_size(sizeof(sampling)));
    titans_generator* generator = nullptr;
    if (ok(titans_generator_create(place->stream, sized.get(), &generator))) {
      place->generators.push_back(generator);
    } else {
      check(generator == nullptr, "no generator of a failed call");
    }
  }

  void generate(Place place) {
    if (place->generators.empty()) return;
    std::int32_t token = -1;
    int done = -1;
    if (!ok(titans_generator_next(place->generators.back(), &token, &done))) return;
    check(done == (token < 0 ? 1 : 0), "a token or the end");
    if (done == 0) fed(*place, {token});
  }

  void rewind(Place place) {
    const std::uint64_t position = choices_.byte() > 240 ? choices_.number<std::uint64_t>() : choices_.byte();
    const auto mark = place->marks.find(position);
    const bool there = ok(titans_stream_rewind(place->stream, position));
    check(there == (mark != place->marks.end()), "a mark where one was made, and nowhere else");
    if (!there) return;
    place->model = mark->second;
    place->marks.erase(std::next(mark), place->marks.end());
  }

  void unmark(Place place) {
    const std::uint64_t position = choices_.byte();
    const bool there = ok(titans_stream_unmark(place->stream, position));
    check(there == (place->marks.erase(position) == 1), "a mark to take away where one was made");
  }

  void list_marks(Place place) {
    std::size_t count = 0;
    std::vector<std::uint64_t> positions(std::min<std::size_t>(any_size(place->marks.size()), 64));
    const bool listed = ok(titans_stream_marks(place->stream, positions.data(), positions.size(), &count));
    check(count == place->marks.size(), "a count of the marks");
    if (!listed || positions.empty()) return;
    std::size_t at = 0;
    for (const auto& [position, model] : place->marks) check(positions[at++] == position, "the marks' positions");
  }

  void save(Place place) {
    const std::filesystem::path path = any_path();
    StateOptions options;
    choose(options);
    if (ok(titans_stream_save(place->stream, path.c_str(), options.get()))) {
      saved_[path] = {place->model, place->session, options.number};
    }
  }

  void restore() {
    const std::filesystem::path path = any_path();
    std::size_t index = 0;
    titans_session* session = any_session(index);
    StateOptions options;
    choose(options);
    std::size_t size = 0;
    if (ok(titans_state_read(path.c_str(), options.get(), nullptr, 0, &size))) {
      std::vector<std::uint8_t> bytes(std::min<std::size_t>(any_size(size), 1 << 16));
      ok(titans_state_read(path.c_str(), options.get(), bytes.data(), bytes.size(), &size));
    }
    titans_stream* stream = nullptr;
    if (!ok(titans_session_restore(session, path.c_str(), options.get(), &stream))) {
      check(stream == nullptr, "no stream of a failed call");
      return;
    }
    const auto saved = saved_.find(path);
    check(saved != saved_.end() && saved->second.key == options.number, "a state under the key that it was saved with");
    check((saved->second.session == 1) == (index == 1), "a state of the model");
    add(stream, index, saved->second.model);
  }

  void set_guard(Place place) {
    titans_guard guard{};
    titans_guard_init(&guard);
    const std::uint8_t byte = choices_.byte();
    guard.policy = byte < 240 ? byte % 7 : choices_.number<std::int32_t>();
    if ((byte & 4) != 0) guard.max_update_norm = choices_.number<float>();
    if ((byte & 8) != 0) guard.max_surprise = choices_.number<float>();
    if ((byte & 16) != 0) guard.restart_every = choices_.number<std::uint8_t>();
    if ((byte & 32) != 0) guard.bundle_limits = choices_.number<std::int32_t>();
    const Sized<titans_guard> sized(guard, any_size(sizeof(guard)));
    if (ok(titans_stream_set_guard(place->stream, sized.get()))) place->guarded = guard.policy != TITANS_GUARD_OFF;
    titans_guard_report report{};
    const Sized<titans_guard_report> out(report, any_size(sizeof(report)));
    ok(titans_stream_guard_report(place->stream, out.get()));
    titans_health health{};
    const Sized<titans_health> healthy(health, any_size(sizeof(health)));
    ok(titans_stream_health(place->stream, healthy.get()));
    std::vector<float> norms(std::min<std::size_t>(any_size(titans_stream_memory_count(place->stream)), 4096));
    ok(titans_stream_peak_norms(place->stream, norms.data(), norms.size()));
  }

  void set_progress(Place place) {
    place->calls_before_cancel = static_cast<int>(choices_.below(6)) - 1;
    const bool none = choices_.byte() > 128;
    ok(titans_stream_set_progress(place->stream, none ? nullptr : &count_down, &place->calls_before_cancel));
  }

  void feed_batch() {
    std::size_t index = 0;
    titans_session* session = any_session(index);
    struct Item {
      Place place;
      std::vector<std::int32_t> tokens;
      std::vector<float> vectors;
      bool of_vectors = false;
    };
    std::vector<Item> chosen;
    std::vector<titans_feed> items;
    std::list<std::vector<float>> buffers;
    for (std::size_t left = choices_.below(kMostStreams); left > 0 && !handles_.empty(); --left) {
      Item item{any(), any_tokens(), any_vectors(), false};
      titans_feed feed{};
      feed.struct_size = sizeof(feed);
      feed.stream = item.place->stream;
      feed.which = any_choice();
      const bool vectors = takes_vectors(*item.place) != (choices_.byte() > 250);
      item.of_vectors = vectors;
      chosen.push_back(std::move(item));
      feed.count = vectors ? chosen.back().vectors.size() / kInputs : chosen.back().tokens.size();
      feed.tokens = vectors ? nullptr : chosen.back().tokens.data();
      feed.vectors = vectors ? chosen.back().vectors.data() : nullptr;
      buffers.emplace_back(std::min<std::size_t>(any_size(std::max<std::size_t>(feed.count, 1) * kVocab), 4096));
      feed.outputs = buffers.back().data();
      feed.capacity = buffers.back().size();
      items.push_back(feed);
    }
    // Never larger than the items, because the size promises readable memory.
    if (!items.empty() && choices_.byte() > 250) items[0].struct_size = choices_.below(sizeof(titans_feed));
    std::vector<titans_status> statuses(items.size());
    const bool told = choices_.byte() < 250;
    const titans_status status =
        titans_session_feed_batch(session, items.data(), items.size(), told ? statuses.data() : nullptr);
    const bool all = ok(status);
    for (std::size_t i = 0; i < items.size(); ++i) {
      Handle& handle = *chosen[i].place;
      // Without statuses, a partial failure does not show which streams were fed.
      if (!told && !all) resync(handle);
      if (told ? statuses[i] != TITANS_OK : !all) continue;
      check(handle.session == index, "streams of the session alone");
      if (!chosen[i].of_vectors) {
        fed(handle, chosen[i].tokens);
      } else {
        for (std::size_t at = 0; at < chosen[i].vectors.size(); at += kInputs) {
          handle.model.take(echo_token(chosen[i].vectors[at]));
        }
        settle(handle);
      }
    }
  }

  void resync(Handle& handle) {
    handle.model.position = titans_stream_position(handle.stream);
    handle.model.known = false;
  }

  void step_batch() {
    std::size_t index = 0;
    titans_session* session = any_session(index);
    std::vector<titans_stream*> streams;
    std::vector<Place> places;
    std::vector<std::int32_t> tokens;
    for (std::size_t left = choices_.below(kMostStreams); left > 0 && !handles_.empty(); --left) {
      places.push_back(any());
      streams.push_back(places.back()->stream);
      tokens.push_back(static_cast<std::int32_t>(choices_.below(kVocab + 1)));
    }
    std::vector<float> logits(streams.size() * kVocab);
    std::vector<titans_status> statuses(streams.size(), TITANS_FAILED);
    ok(titans_session_step_batch(session, streams.data(), tokens.data(), streams.size(),
                                 choices_.byte() > 200 ? nullptr : logits.data(), statuses.data()));
    for (std::size_t i = 0; i < streams.size(); ++i) {
      if (statuses[i] == TITANS_OK) fed(*places[i], {tokens[i]});
    }
  }

  void ask_metrics() {
    std::size_t index = 0;
    const titans_session* session = any_session(index);
    const Sized<titans_metrics> metrics({}, any_size(sizeof(titans_metrics)));
    ok(titans_session_metrics(session, metrics.get()));
    std::size_t size = 0;
    if (!ok(titans_session_metrics_text(session, nullptr, 0, &size))) return;
    std::vector<char> text(std::min<std::size_t>(any_size(size), 1 << 16));
    if (ok(titans_session_metrics_text(session, text.data(), text.size(), &size)) && !text.empty()) {
      check(std::memchr(text.data(), 0, text.size()) != nullptr, "a text with its end");
    }
  }

  void open_session() {
    titans_session_options options{};
    std::array<std::string, 6> texts;
    const char* words[] = {"cpu", "onnxruntime", "auto", "none", "off", ""};
    for (std::string& text : texts) {
      text = choices_.byte() < 200 ? words[choices_.below(std::size(words))] : choices_.text(20);
    }
    const auto pick = [&](std::size_t i) { return choices_.byte() < 100 ? texts[i].c_str() : nullptr; };
    options.device = pick(0);
    options.backend = pick(1);
    options.backend_library = pick(2);
    options.memory_kernel = pick(3);
    options.engine = pick(4);
    options.libraries = pick(5);
    const std::string folder = scratch().string();
    options.plugin_dir = folder.c_str();  // the application is responsible for the libraries in it
    options.threads = choices_.number<std::int32_t>();
    options.batch_threads = static_cast<std::int32_t>(choices_.byte()) - 2;
    options.memory_budget = choices_.byte();
    options.batch = pick(choices_.below(texts.size()));
    const Sized<titans_session_options> sized(options, any_size(sizeof(options)));
    titans_session* session = nullptr;
    const std::string bundle = (scratch() / (choices_.byte() > 200 ? "spill" : "tokens")).string();
    if (ok(titans_session_open(choices_.byte() > 250 ? nullptr : bundle.c_str(), sized.get(), &session))) {
      titans_stream* stream = nullptr;
      check(ok(titans_stream_create(session, &stream)), "a stream of a session");
      titans_session_close(session);  // streams keep what they need
      ok(titans_stream_step(stream, 1, nullptr));
      titans_stream_destroy(stream);
    } else {
      check(session == nullptr, "no session of a failed call");
    }
  }

  void with_nothing() {
    titans_stream* stream = nullptr;
    std::int32_t token = 0;
    int done = 0;
    std::size_t count = 0;
    for (const titans_status status :
         {titans_stream_fork(nullptr, &stream), titans_stream_reset(nullptr), titans_stream_mark(nullptr, nullptr),
          titans_stream_feed(nullptr, &token, 1, TITANS_OUTPUT_NONE, nullptr, 0), titans_stream_cancel(nullptr),
          titans_stream_save(nullptr, "", nullptr), titans_session_restore(nullptr, nullptr, nullptr, &stream),
          titans_stream_marks(nullptr, nullptr, 0, &count), titans_generator_next(nullptr, &token, &done),
          titans_stream_set_guard(nullptr, nullptr), titans_stream_guard_report(nullptr, nullptr),
          titans_stream_health(nullptr, nullptr), titans_stream_peak_norms(nullptr, nullptr, 0),
          titans_session_metrics(nullptr, nullptr), titans_state_read(nullptr, nullptr, nullptr, 0, nullptr)}) {
      check(!ok(status) && status == TITANS_INVALID_ARGUMENT, "NULL to be refused");
    }
  }

  // Functions that need no stream.
  void act_alone(std::size_t choice) {
    std::size_t index = 0;
    if (choice == 0) {
      titans_session* session = any_session(index);
      titans_stream* stream = nullptr;
      if (handles_.size() < kMostStreams && ok(titans_stream_create(session, &stream))) add(stream, index, Model());
    } else if (choice == 1) {
      if (handles_.size() < kMostStreams) restore();
    } else if (choice == 2) {
      feed_batch();
    } else if (choice == 3) {
      step_batch();
    } else if (choice == 4) {
      ask_metrics();
    } else if (choice == 5) {
      open_session();
    } else if (choice == 6) {
      with_nothing();
    } else {
      ok(titans_set_log(choices_.byte() > 128 ? nullptr : &count_messages, &messages_,
                        static_cast<std::int32_t>(choices_.below(7)) - 1));
    }
  }

  void act() {
    constexpr std::size_t kAlone = 8;
    const std::size_t choice = choices_.below(kAlone + 18);
    const Place place = any();
    if (choice < kAlone || place == handles_.end()) return act_alone(choice % kAlone);
    switch (choice - kAlone) {
      case 0:
        return destroy(place);
      case 1: {
        titans_stream* twin = nullptr;
        if (handles_.size() == kMostStreams || !ok(titans_stream_fork(place->stream, &twin))) return;
        add(twin, place->session, place->model);
        handles_.back().guarded = place->guarded;
        return;
      }
      case 2:
        check(ok(titans_stream_reset(place->stream)), "a reset");
        place->model = Model();
        place->model.learning = titans_stream_learning(place->stream);
        place->marks.clear();
        return;
      case 3:
        return feed(place);
      case 4:
        return feed_vectors(place);
      case 5:
        return step(place);
      case 6:
        return score(place);
      case 7:
        place->model.learning = choices_.byte() % 2;
        check(ok(titans_stream_set_learning(place->stream, place->model.learning * 3)), "learning to be set");
        return;
      case 8:
        return read_memory(place);
      case 9:
        return create_generator(place);
      case 10:
        return generate(place);
      case 11: {
        std::uint64_t position = 0;
        check(ok(titans_stream_mark(place->stream, &position)), "a mark");
        check(position == place->model.position, "the mark's position");
        place->marks[position] = place->model;
        return;
      }
      case 12:
        return rewind(place);
      case 13:
        return unmark(place);
      case 14:
        return list_marks(place);
      case 15:
        return save(place);
      case 16:
        return set_guard(place);
      default:
        set_progress(place);
        ok(titans_stream_cancel(place->stream));  // no call is running, so this has no effect
    }
  }

  Choices choices_;
  Sessions& sessions_;
  std::list<Handle> handles_;
  const Handle* touched_ = nullptr;  // index into handles_ of the last one from any()
  std::map<std::filesystem::path, Saved> saved_;
  std::size_t messages_ = 0;
};

}  // namespace
}  // namespace titans::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace titans::fuzz;
  scratch();  // outlives the sessions
  static Sessions sessions;
  Caller(Choices(data, size), sessions).run();
  return 0;
}
