#include "stream.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "error.h"
#include "log.h"
#include "logits.h"

namespace titans::core {
namespace {

constexpr std::uint64_t kAlways = std::numeric_limits<std::uint64_t>::max();

float log_probability(const float* logits, std::size_t vocab, std::int32_t token) {
  const float most = finite_maximum(logits, vocab, "score");
  double sum = 0.0;  // of at least exp(0), so its logarithm is finite
  for (std::size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i]) - static_cast<double>(most));
  return static_cast<float>(static_cast<double>(logits[token]) - static_cast<double>(most) - std::log(sum));
}

}  // namespace

void require_input(const Manifest& manifest, InputKind kind) {
  if (manifest.input_kind == kind) return;
  throw Error(TITANS_INVALID_ARGUMENT, "stream", text("a bundle that takes ", input_kind_name(kind)),
              text("one that takes ", input_kind_name(manifest.input_kind)),
              kind == InputKind::kTokens ? "feed it vectors: it has neither tokens nor logits" : "feed it tokens");
}

Stream::Use::Use(const Stream& stream) : stream_(stream) {
  if (stream.used_.exchange(true, std::memory_order_acquire)) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", "a stream that no other call is in",
                "one in use by another thread, or by the call that this one is made within",
                "let one thread at a time use a stream");
  }
  try {
    stream.place_.hold();
  } catch (...) {
    stream.used_.store(false, std::memory_order_release);
    throw;
  }
}

Stream::Use::~Use() {
  stream_.place_.let_go();
  stream_.used_.store(false, std::memory_order_release);
}

Stream::Stream(std::shared_ptr<Session> session) : Stream(std::move(session), Allocate{}) {
  reset();
  place_.let_go();
}

Stream::Stream(std::shared_ptr<Session> session, const StreamState& state) : Stream(std::move(session), Allocate{}) {
  set_state(state);
  place_.let_go();
}

Stream::Stream(std::shared_ptr<Session> session, Allocate)
    : session_(std::move(session)), place_(session_->residency(), *this) {
  const std::vector<StateTensor>& states = session_->manifest().state;
  for (std::size_t state = 0; state < states.size(); ++state) {
    if (session_->engine().in_place(state)) {
      Buffer* live = add_buffer(state);
      journal_.watch(states[state], *live, *add_buffer(state));
      for (std::size_t set = 0; set < kSets; ++set) sets_[set].push_back(live);
    } else {
      for (std::size_t set = 0; set < kSets; ++set) sets_[set].push_back(add_buffer(state));
    }
  }
  place_.grow(session_->output_size() * sizeof(float));
  last_output_.resize(session_->output_size());
  session_->metrics().streams.add();
  session_->metrics().state_bytes.add(state_bytes());
  session_->metrics().resident_bytes.add(state_bytes());
}

Stream::~Stream() {
  const bool in_memory = place_.retire();
  session_->metrics().streams.subtract();
  session_->metrics().state_bytes.subtract(state_bytes());
  if (in_memory) session_->metrics().resident_bytes.subtract(state_bytes());
  drop_last_output();
}

void Stream::drop_last_output() noexcept {
  wipe(last_output_.data(), last_output_.size() * sizeof(float));
  std::vector<float>().swap(last_output_);
}

Buffer* Stream::add_buffer(std::size_t state) {
  const std::size_t bytes = session_->manifest().state[state].bytes;
  place_.grow(bytes);
  state_bytes_ += bytes;
  OwnBuffer& own = buffers_.emplace_back(OwnBuffer{state, nullptr, nullptr});
  own.buffer = session_->engine().allocate(state);
  return own.known_as = own.buffer.get();
}

StreamState Stream::copy_of(const BufferSet& buffers) const {
  const std::vector<StateTensor>& states = session_->manifest().state;
  StreamState out;
  out.position = position_;
  out.last_output.assign(last_output_.begin(), last_output_.end());
  out.tensors.reserve(states.size());
  for (std::size_t index = 0; index < states.size(); ++index) {
    buffers[index]->download(out.tensors.emplace_back(states[index].bytes).data());
  }
  return out;
}

// What no file has to keep: position and learning, which do not take part, and what calls save before they overwrite.
std::vector<StreamState> Stream::copy_out() const {
  std::vector<StreamState> parts;
  parts.push_back(copy_of(sets_[current_]));
  if (guard_ && guard_->on()) parts.push_back(copy_of(checkpoint_buffers()));
  for (const auto& [position, state] : marks_) parts.push_back(state);
  return parts;
}

void Stream::give_up() noexcept {
  for (OwnBuffer& own : buffers_) own.buffer.reset();
  drop_last_output();
  for (auto& [position, state] : marks_) state = StreamState{state.position, state.learning, {}, {}};
}

void Stream::take_back(std::vector<StreamState> parts) {
  BufferMap moved;
  std::vector<std::unique_ptr<Buffer>> fresh;
  for (const OwnBuffer& own : buffers_) {
    moved[own.known_as] = fresh.emplace_back(session_->engine().allocate(own.state)).get();
  }
  const auto fill = [&](const BufferSet& buffers, const StreamState& from) {
    for (std::size_t index = 0; index < buffers.size(); ++index) {
      moved.at(buffers[index])->upload(from.tensors[index].data());
    }
  };
  auto part = parts.begin();
  const auto current = part++;
  fill(sets_[current_], *current);
  if (guard_ && guard_->on()) fill(checkpoint_buffers(), *part++);
  last_output_.assign(current->last_output.begin(), current->last_output.end());
  // Nothing below fails.
  for (auto& [position, state] : marks_) {
    state.last_output = std::move(part->last_output);
    state.tensors = std::move(part++->tensors);
  }
  journal_.move_to(moved);
  if (guard_) guard_->move_to(moved);
  for (BufferSet& set : sets_) move_to(moved, set);
  move_to(moved, guard_backups_);
  for (std::size_t index = 0; index < fresh.size(); ++index) {
    buffers_[index].known_as = fresh[index].get();
    buffers_[index].buffer = std::move(fresh[index]);
  }
}

// What of the guard's checkpoint is in buffers: of a state in place, the parts that were overwritten since.
Stream::BufferSet Stream::checkpoint_buffers() const {
  BufferSet buffers = sets_[guard_->set()];
  for (std::size_t state = 0; state < buffers.size(); ++state) {
    if (guard_backups_[state] != nullptr) buffers[state] = guard_backups_[state];
  }
  return buffers;
}

std::unique_ptr<Stream> Stream::fork() const {
  std::unique_ptr<Stream> twin(new Stream(session_, Allocate{}));
  for (std::size_t state = 0; state < sets_[current_].size(); ++state) {
    twin->sets_[twin->current_][state]->copy_from(*sets_[current_][state]);
  }
  twin->position_ = position_;
  twin->learning_ = learning_;
  twin->last_output_ = last_output_;
  if (guard_ && guard_->on()) twin->set_guard(guard_->limits());
  twin->place_.let_go();
  return twin;
}

void Stream::reset() {
  const std::size_t next = free_set(current_, current_);
  transact([&] {
    journal_.save_all();
    const std::vector<StateTensor>& states = session_->manifest().state;
    for (std::size_t index = 0; index < states.size(); ++index) {
      sets_[next][index]->upload(session_->bundle().initial_state().find(states[index].name)->second.data);
    }
  });
  current_ = next;
  position_ = 0;
  std::fill(last_output_.begin(), last_output_.end(), 0.0F);
  drop_marks(marks_.begin(), marks_.end());
  rebase_guard();
}

StreamState Stream::state() const {
  StreamState out = copy_of(sets_[current_]);
  out.learning = learning_;
  return out;
}

StateView Stream::view(std::vector<Bytes>& copies) const {
  StateView out;
  out.position = position_;
  out.learning = learning_;
  out.last_output = last_output_.data();
  out.outputs = last_output_.size();
  const std::vector<StateTensor>& states = session_->manifest().state;
  copies.reserve(copies.size() + states.size());
  for (std::size_t index = 0; index < states.size(); ++index) {
    const Buffer& buffer = *sets_[current_][index];
    const std::byte* data = buffer.host();
    if (data == nullptr) {
      Bytes& copy = copies.emplace_back(states[index].bytes);
      buffer.download(copy.data());
      data = copy.data();
    }
    out.tensors.push_back(data);
  }
  return out;
}

void Stream::set_state(const StreamState& state) {
  const std::vector<StateTensor>& states = session_->manifest().state;
  bool fits = state.tensors.size() == states.size() && state.last_output.size() == last_output_.size();
  for (std::size_t index = 0; fits && index < states.size(); ++index) {
    fits = state.tensors[index].size() == states[index].bytes;
  }
  if (!fits) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", "a state of this model", "one of another", "take one of its own");
  }
  const std::size_t next = free_set(current_, current_);
  transact([&] {
    journal_.save_all();
    for (std::size_t index = 0; index < states.size(); ++index) sets_[next][index]->upload(state.tensors[index].data());
  });
  current_ = next;
  position_ = state.position;
  learning_ = state.learning;
  std::copy(state.last_output.begin(), state.last_output.end(), last_output_.begin());
  rebase_guard();
}

std::uint64_t Stream::mark() {
  StreamState now = state();
  const auto found = marks_.find(position_);
  if (found != marks_.end()) {
    found->second = std::move(now);  // of the same size
  } else {
    const std::uint64_t bytes = now.bytes();
    place_.grow(bytes);
    try {
      marks_.emplace(position_, std::move(now));
    } catch (...) {
      place_.shrink(bytes);
      throw;
    }
    session_->metrics().state_bytes.add(bytes);
    session_->metrics().resident_bytes.add(bytes);
  }
  return position_;
}

void Stream::rewind(std::uint64_t position) {
  const Mark mark = find_mark(position);
  set_state(mark->second);
  drop_marks(std::next(mark), marks_.end());
}

void Stream::unmark(std::uint64_t position) {
  const Mark mark = find_mark(position);
  drop_marks(mark, std::next(mark));
}

std::vector<std::uint64_t> Stream::marks() const {
  std::vector<std::uint64_t> positions;
  for (const auto& [position, state] : marks_) positions.push_back(position);
  return positions;
}

Stream::Mark Stream::find_mark(std::uint64_t position) {
  const Mark mark = marks_.find(position);
  if (mark != marks_.end()) return mark;
  std::string there;
  for (const std::uint64_t one : marks()) there += text(there.empty() ? "" : ", ", one);
  throw Error(TITANS_INVALID_ARGUMENT, "stream", text("a mark at position ", position),
              there.empty() ? "a stream without marks" : text("marks at ", there), "mark the stream there first");
}

void Stream::drop_marks(Mark first, Mark end) {
  std::uint64_t bytes = 0;
  for (Mark mark = first; mark != end; ++mark) bytes += mark->second.bytes();
  session_->metrics().state_bytes.subtract(bytes);
  session_->metrics().resident_bytes.subtract(bytes);
  marks_.erase(first, end);
  if (bytes > 0) place_.shrink(bytes);
}

std::size_t Stream::free_set(std::size_t a, std::size_t b) const {
  std::size_t set = 0;
  while (set == a || set == b || (guard_ && set == guard_->set())) ++set;
  return set;
}

void Stream::set_guard(const titans_guard& limits) {
  check_guard(limits);
  if (!guard_ && limits.policy == TITANS_GUARD_OFF) return;
  auto guard = std::make_unique<Guard>(*session_, limits);
  const std::uint64_t before = state_bytes();
  if (sets_[kSets].empty()) add_guard_buffers();
  session_->metrics().state_bytes.add(state_bytes() - before);
  session_->metrics().resident_bytes.add(state_bytes() - before);
  for (std::size_t state = 0; state < guard_backups_.size(); ++state) {
    if (guard_backups_[state] != nullptr) guard->watch(state, *sets_[current_][state], *guard_backups_[state]);
  }
  guard_ = std::move(guard);
  rebase_guard();
}

void Stream::add_guard_buffers() {
  BufferSet set;
  std::vector<Buffer*> backups;
  for (std::size_t state = 0; state < sets_[0].size(); ++state) {
    Buffer* buffer = add_buffer(state);
    const bool in_place = session_->engine().in_place(state);
    set.push_back(in_place ? sets_[0][state] : buffer);
    backups.push_back(in_place ? buffer : nullptr);
  }
  sets_[kSets] = std::move(set);
  guard_backups_ = std::move(backups);
}

void Stream::rebase_guard() {
  if (guard_) guard_->set_checkpoint(position_, current_);
}

titans_guard_report Stream::guard_report() const {
  if (guard_) return guard_->report();
  titans_guard_report none{};
  none.layer = none.head = -1;
  return none;
}

void Stream::check_tokens(const std::int32_t* tokens, std::size_t count) const {
  const std::int64_t vocab = session_->manifest().input_size;
  for (std::size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab) {
      throw Error(TITANS_INVALID_ARGUMENT, "stream", text("token ", i, " in [0, ", vocab, ")"), text(tokens[i]),
                  "encode the text with the model's own tokenizer");
    }
  }
}

void Stream::check_vectors(const float* vectors, std::size_t count) const {
  const std::size_t size = session_->input_size();
  if (count > std::numeric_limits<std::size_t>::max() / sizeof(float) / size) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", "a count whose vectors fit into memory", text(count),
                "feed in blocks");
  }
  const float* end = vectors + count * size;
  const float* wrong = std::find_if(vectors, end, [](float value) { return !std::isfinite(value); });
  if (wrong == end) return;
  const auto at = static_cast<std::size_t>(wrong - vectors);
  throw Error(TITANS_INVALID_ARGUMENT, "stream", text("vector ", at / size, " of finite numbers"),
              text(*wrong, " as its element ", at % size), "feed numbers that are neither NaN nor infinite");
}

template <typename Change>
void Stream::transact(Change&& change) {
  journal_.begin();
  try {
    change();
  } catch (...) {
    journal_.restore();
    throw;
  }
}

Call Stream::next_call(const Sequence& sequence, const Passage& passage, std::uint64_t end) const {
  const bool again = passage.position < position_;
  auto remaining = static_cast<std::size_t>((again ? position_ : end) - passage.position);
  if (guard_ && guard_->on()) remaining = guard_->reach(passage.position, remaining);
  const std::size_t graph = session_->next_graph(passage.position, remaining);
  const std::size_t done = again ? 0 : static_cast<std::size_t>(passage.position - position_);
  const std::int32_t* tokens = nullptr;
  const float* vectors = nullptr;
  if (sequence.tokens != nullptr) tokens = again ? guard_->tokens_at(passage.position) : sequence.tokens + done;
  if (sequence.vectors != nullptr) {
    vectors = again ? guard_->vectors_at(passage.position) : sequence.vectors + done * session_->input_size();
  }
  const bool learn = learning_ && passage.position >= passage.frozen_until;
  return {graph,  tokens, vectors, static_cast<std::int64_t>(passage.position), learn, sets_[passage.set].data(),
          nullptr};
}

void Stream::report_progress(std::uint64_t done, std::uint64_t total) const {
  if (progress_.function == nullptr || progress_.function(progress_.user, done, total) == 0) return;
  throw Error(TITANS_CANCELLED, "stream", text(total, " tokens to be consumed"),
              text("a progress function that ended the call after ", done), "feed them again");
}

Finding Stream::run_guarded(const Call& call, std::size_t tokens, Workspace& workspace) {
  try {
    session_->engine().run(call, workspace);
  } catch (const Error& error) {
    if (!call.learn || error.status() != TITANS_FAILED || guard_->limits().policy == TITANS_GUARD_RAISE) throw;
    // Kernels refuse gates that are not finite, which a memory that overflows makes of the next layer's.
    Finding finding;
    finding.reason = TITANS_GUARD_CALL;
    finding.failure = error.what();
    return finding;
  }
  BufferSet after(call.next_state, call.next_state + sets_[0].size());
  return guard_->look(sets_[guard_->set()], after, static_cast<std::uint64_t>(call.position), tokens,
                      workspace.output(tokens - 1, 1));
}

void Stream::roll_back(const Finding& finding, Passage& passage, std::uint64_t tokens) {
  const std::int32_t policy = guard_->limits().policy;
  const std::uint64_t end = passage.position + tokens;
  bool drop = false;
  if (policy != TITANS_GUARD_RAISE && guard_->can_look_closer(passage.position, tokens)) {
    guard_->look_closer(end);
  } else {
    const bool frozen = passage.position < passage.frozen_until;
    drop = frozen && guard_->can_drop_open_chunk();
    if (!frozen) {
      guard_->count(finding, end);
      session_->metrics().rollbacks.add();
    }
    if (policy == TITANS_GUARD_RAISE || (frozen && !drop)) {
      throw Error(TITANS_FAILED, "guard", guard_->describe(finding) + (frozen ? ", with the memory frozen too," : ""),
                  text(guard_->describe_found(finding), ", up to position ", end),
                  frozen ? "reset the stream or go back to a state of it that was good"
                         : "check what the stream is fed, or set the policy to skip or freeze");
    }
    if (!frozen && log_wanted(TITANS_LOG_WARNING)) {
      log(TITANS_LOG_WARNING, "guard",
          text("expected ", guard_->describe(finding), " but got ", guard_->describe_found(finding),
               ", up to position ", end, "; the memory stays as it was at position ", guard_->position()));
    }
    passage.frozen_until = policy == TITANS_GUARD_FREEZE ? kAlways : std::max(passage.frozen_until, end);
  }
  if (guard_->position() < position_ && !passage.all_saved) {
    // What lies before this feed will be overwritten, too.
    journal_.restore();
    journal_.save_all();
    passage.all_saved = true;
  }
  guard_->restore();
  passage.position = guard_->position();
  passage.set = guard_->set();
  if (!drop) return;
  const std::size_t set = free_set(current_, passage.set);
  for (std::size_t state = 0; state < sets_[set].size(); ++state) {
    if (guard_backups_[state] == nullptr) sets_[set][state]->copy_from(*sets_[passage.set][state]);
  }
  guard_->drop_open_chunk(sets_[set], set);
  passage.set = set;
  passage.checkpoint_moved = true;
}

template <typename Sink>
void Stream::advance(const Sequence& sequence, Sink&& sink) {
  const std::size_t count = sequence.count;
  if (count == 0) return;
  // Graphs take a position as an int64, and a state file may tell any.
  constexpr auto kLast = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (count > kLast - position_) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("at most ", kLast - position_, " tokens more"), text(count),
                "go on with a stream that has consumed fewer");
  }
  const std::vector<Graph>& graphs = session_->manifest().graphs;
  const std::uint64_t end = position_ + count;
  const bool guarded = guard_ && guard_->on();
  Passage passage{position_, current_};
  MeasuredCall measured(session_->metrics());
  cancelled_.store(false, std::memory_order_relaxed);
  try {
    transact([&] {
      const Session::WorkspaceLease lease(*session_);
      Workspace& workspace = lease.get();
      std::size_t rows = 0;
      while (passage.position < end) {
        const bool again = passage.position < position_;
        const std::size_t done = again ? 0 : static_cast<std::size_t>(passage.position - position_);
        if (cancelled_.load(std::memory_order_relaxed)) {
          throw Error(TITANS_CANCELLED, "stream", text(count, " tokens to be consumed"), text("cancelled after ", done),
                      "feed them again");
        }
        Call call = next_call(sequence, passage, end);
        const std::size_t next = free_set(current_, passage.set);
        call.next_state = sets_[next].data();
        rows = static_cast<std::size_t>(graphs[call.graph].tokens);
        if (!passage.all_saved) journal_.save_for(passage.position, rows);
        if (guarded) guard_->save_for(passage.position, rows);
        bool checkpoint = false;
        if (!guarded) {
          session_->engine().run(call, workspace);
        } else {
          const Finding finding = run_guarded(call, rows, workspace);
          if (finding.reason != TITANS_GUARD_GOOD) {
            roll_back(finding, passage, rows);
            continue;
          }
          checkpoint = guard_->moves_on(finding, passage.position, rows);
        }
        if (!again) sink(done, rows, workspace);
        passage.position += rows;
        passage.set = next;
        if (checkpoint) {
          guard_->set_checkpoint(passage.position, passage.set);
          passage.checkpoint_moved = true;
        }
        if (!again) report_progress(done + rows, count);
      }
      if (guarded) guard_->remember(position_, sequence.tokens, sequence.vectors, count);
      std::copy_n(workspace.output(rows - 1, 1), last_output_.size(), last_output_.begin());
    });
  } catch (const Error& error) {
    if (passage.checkpoint_moved) rebase_guard();
    if (error.status() == TITANS_CANCELLED) {
      measured.cancelled();
      log(TITANS_LOG_DEBUG, "stream", error.what());
    } else {
      log(TITANS_LOG_ERROR, "stream", error.what());
    }
    throw;
  } catch (...) {
    if (passage.checkpoint_moved) rebase_guard();
    throw;
  }
  if (passage.frozen_until == kAlways) learning_ = false;
  current_ = passage.set;
  measured.succeeded(count, session_->folds(position_, count));
  position_ = end;
}

void Stream::check_room(std::size_t count, titans_logits which, const float* output, std::size_t capacity) const {
  const std::size_t size = session_->output_size();
  const char* what = session_->manifest().input_kind == InputKind::kTokens ? "logits" : "outputs";
  if (which == TITANS_LOGITS_LAST && count == 0 && position_ == 0) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream",
                text("at least one token consumed before its last ", what, " are asked for"), "a fresh stream",
                "feed a token first");
  }
  if (which == TITANS_LOGITS_ALL && count > std::numeric_limits<std::size_t>::max() / size) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("a count whose ", what, " fit into memory"), text(count),
                "feed in blocks");
  }
  const std::size_t needed = which == TITANS_LOGITS_ALL ? count * size : which == TITANS_LOGITS_LAST ? size : 0;
  if (capacity < needed || (needed > 0 && output == nullptr)) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("room for ", needed, " ", what),
                output == nullptr ? std::string("NULL") : text(capacity), "pass a larger buffer");
  }
}

void Stream::feed(const Sequence& sequence, titans_logits which, float* output) {
  const std::size_t size = session_->output_size();
  advance(sequence, [&](std::size_t first, std::size_t rows, Workspace& workspace) {
    if (which != TITANS_LOGITS_ALL) return;
    std::copy_n(workspace.output(0, rows), rows * size, output + first * size);
  });
  if (which == TITANS_LOGITS_LAST) std::copy(last_output_.begin(), last_output_.end(), output);
}

void Stream::feed(const std::int32_t* tokens, std::size_t count, titans_logits which, float* logits,
                  std::size_t capacity) {
  require_input(session_->manifest(), InputKind::kTokens);
  check_room(count, which, logits, capacity);
  check_tokens(tokens, count);
  feed({tokens, nullptr, count}, which, logits);
}

void Stream::feed_vectors(const float* vectors, std::size_t count, titans_logits which, float* outputs,
                          std::size_t capacity) {
  require_input(session_->manifest(), InputKind::kVectors);
  check_room(count, which, outputs, capacity);
  check_vectors(vectors, count);
  feed({nullptr, vectors, count}, which, outputs);
}

void Stream::score(const std::int32_t* tokens, std::size_t count, float* logprobs) {
  require_input(session_->manifest(), InputKind::kTokens);
  check_tokens(tokens, count);
  if (count == 0) return;
  const std::size_t vocab = session_->output_size();
  const float first_logprob =
      position_ == 0 ? -std::log(static_cast<float>(vocab)) : log_probability(last_output_.data(), vocab, tokens[0]);
  advance({tokens, nullptr, count}, [&](std::size_t first, std::size_t rows, Workspace& workspace) {
    const std::size_t scored = std::min(rows, count - first - 1);  // the row after the last token scores none of these
    const float* logits = workspace.output(0, scored);
    for (std::size_t row = 0; row < scored; ++row) {
      const std::size_t next = first + row + 1;
      logprobs[next] = log_probability(logits + row * vocab, vocab, tokens[next]);
    }
  });
  logprobs[0] = first_logprob;
}

std::uint64_t Stream::state_bytes() const {
  const std::uint64_t output_bytes = session_->output_size() * sizeof(float);
  std::uint64_t mark_bytes = output_bytes;
  for (const StateTensor& state : session_->manifest().state) mark_bytes += state.bytes;
  // As it is in memory, also where it is not.
  return state_bytes_ + output_bytes + marks_.size() * mark_bytes;
}

void Stream::read_memory(std::size_t index, float* values, std::size_t capacity) const {
  const MemoryView& memory = session_->memories()[index];
  if (capacity < memory.elements) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("room for ", memory.elements, " values of ", memory.name),
                text(capacity), "pass a larger buffer");
  }
  const StateTensor& state = session_->manifest().state[memory.state];
  Floats packed(state.bytes / sizeof(float));
  sets_[current_][memory.state]->download(reinterpret_cast<std::byte*>(packed.data()));
  const auto row = static_cast<std::size_t>(state.shape.back());
  for (std::size_t start = memory.offset; start < packed.size(); start += row) {
    unpack_field(memory.storage, packed.data() + start, memory.extent, memory.columns, values);
    values += memory.extent;
  }
}

}  // namespace titans::core
