#include "stream/stream.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace titans::core {

Stream::ExclusiveUse::ExclusiveUse(const Stream& stream) : stream_(stream) {
  if (stream.used_.exchange(true, std::memory_order_acquire)) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0503", "stream", "the stream is in use by another call",
                "use a stream from one thread at a time, and not from its callbacks");
  }
}

Stream::ExclusiveUse::~ExclusiveUse() { stream_.used_.store(false, std::memory_order_release); }

Stream::Use::Use(const Stream& stream) : exclusive_(stream), stream_(stream) { stream.handle_.hold(); }

Stream::Use::~Use() { stream_.handle_.let_go(); }

Stream::Stream(std::shared_ptr<Session> session) : Stream(std::move(session), Allocate{}) {
  set_guard(session_->default_guard(), false);
  reset();
  handle_.let_go();
}

Stream::Stream(std::shared_ptr<Session> session, const StreamState& state) : Stream(std::move(session), Allocate{}) {
  set_guard(session_->default_guard(), false);
  set_state(state);
  handle_.let_go();
}

Stream::Stream(std::shared_ptr<Session> session, Allocate)
    : session_(std::move(session)), handle_(session_->state_cache(), *this), health_(*session_) {
  const std::vector<StateTensor>& states = session_->manifest().state;
  sets_[0] = add_current_buffers();
  for (std::size_t state = 0; state < states.size(); ++state) {
    const bool in_place = session_->executor().in_place(state);
    if (in_place) journal_.watch(states[state], *sets_[0][state], *add_buffer(state));
    for (std::size_t set = 1; set < kSets; ++set) {
      sets_[set].push_back(in_place ? sets_[0][state] : add_buffer(state));
    }
  }
  handle_.grow(session_->output_size() * sizeof(float));
  last_output_.resize(session_->output_size());
  session_->metrics().streams.add();
  session_->metrics().state_bytes.add(state_bytes());
  session_->metrics().resident_bytes.add(state_bytes());
}

Stream::~Stream() {
  const bool in_memory = handle_.retire();
  session_->metrics().streams.subtract();
  session_->metrics().state_bytes.subtract(state_bytes());
  if (in_memory) session_->metrics().resident_bytes.subtract(state_bytes());
  drop_last_output();
}

void Stream::drop_last_output() noexcept {
  wipe(last_output_.data(), last_output_.size() * sizeof(float));
  std::vector<float>().swap(last_output_);
}

Stream::BufferSet Stream::add_current_buffers() {
  const std::vector<StateTensor>& states = session_->manifest().state;
  std::uint64_t bytes = 0;
  for (const StateTensor& state : states) bytes += state.bytes;
  handle_.grow(bytes);
  BufferSet added;
  try {
    std::vector<std::unique_ptr<Buffer>> buffers = session_->executor().allocate_current(states.size());
    for (std::size_t state = 0; state < states.size(); ++state) {
      added.push_back(buffers[state].get());
      buffers_.push_back({state, std::move(buffers[state]), added.back(), true});
    }
  } catch (...) {
    handle_.shrink(bytes);
    throw;
  }
  state_bytes_ += bytes;
  return added;
}

Buffer* Stream::add_buffer(std::size_t state) {
  const std::size_t bytes = session_->manifest().state[state].bytes;
  handle_.grow(bytes);
  try {
    OwnBuffer own{state, session_->executor().allocate(state), nullptr, false};
    own.known_as = own.buffer.get();
    buffers_.push_back(std::move(own));
  } catch (...) {
    handle_.shrink(bytes);
    throw;
  }
  state_bytes_ += bytes;
  return buffers_.back().known_as;
}

// Drops the newest buffers and keeps the first `kept`.
void Stream::drop_buffers(std::size_t kept) noexcept {
  while (buffers_.size() > kept) {
    const std::size_t bytes = session_->manifest().state[buffers_.back().state].bytes;
    buffers_.pop_back();
    state_bytes_ -= bytes;
    handle_.shrink(bytes);
  }
}

void Stream::clear_unused_sets() noexcept {
  try {
    for (std::size_t set = 0; set < sets_.size(); ++set) {
      if (set == current_ || (guard_ && set == guard_->set())) continue;
      for (std::size_t state = 0; state < sets_[set].size(); ++state) {
        const Buffer* current = sets_[current_][state];
        if (sets_[set][state] != current) sets_[set][state]->copy_from(*current);
      }
    }
  } catch (...) {  // the device failed; its error was reported when it first did
  }
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

// Position and learning stay in memory, and the journal saves its parts before each call overwrites them.
std::vector<StreamState> Stream::copy_out() const {
  std::vector<StreamState> parts;
  parts.push_back(copy_of(sets_[current_]));
  if (guard_ && guard_->on()) parts.push_back(copy_of(checkpoint_buffers()));
  for (const auto& [position, state] : marks_) parts.push_back(state);
  if (guard_ && guard_->has_mark()) parts.push_back(*guard_->copy_mark());
  return parts;
}

void Stream::give_up() noexcept {
  for (OwnBuffer& own : buffers_) own.buffer.reset();
  drop_last_output();
  for (auto& [position, state] : marks_) state = StreamState{state.position, state.learning, {}, {}};
  if (guard_) guard_->give_mark_up();
}

void Stream::take_back(std::vector<StreamState> parts) {
  BufferMap moved;
  std::vector<std::unique_ptr<Buffer>> fresh;
  std::vector<std::unique_ptr<Buffer>> current_buffers = session_->executor().allocate_current(sets_[0].size());
  for (const OwnBuffer& own : buffers_) {
    fresh.push_back(own.current ? std::move(current_buffers[own.state]) : session_->executor().allocate(own.state));
    moved[own.known_as] = fresh.back().get();
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
  if (guard_ && guard_->has_mark()) guard_->take_mark(parts.back());
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

// The buffers that hold the guard's checkpoint. For a tensor updated in place, its backup holds the parts overwritten
// since.
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
  if (guard_ && guard_->on()) {
    twin->set_guard(guard_->limits(), guard_->measures_updates());
    twin->guard_->copy_marks(*guard_);
  }
  twin->health_.copy_from(health_);
  twin->handle_.let_go();
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
  health_.reset();
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
    throw Error(TITANS_INVALID_ARGUMENT, "E0407", "stream", "state of another model", "give a state of this model");
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
  health_.check(sets_[current_], position_);
}

std::uint64_t Stream::mark() {
  StreamState now = state();
  const auto found = marks_.find(position_);
  if (found != marks_.end()) {
    found->second = std::move(now);  // has the same size
  } else {
    const std::uint64_t bytes = now.bytes();
    handle_.grow(bytes);
    try {
      marks_.emplace(position_, std::move(now));
    } catch (...) {
      handle_.shrink(bytes);
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
  throw Error(
      TITANS_INVALID_ARGUMENT, "E0408", "stream",
      text("no mark at position ", position, there.empty() ? "; the stream has no marks" : "; marks are at ", there),
      "mark the stream there first");
}

void Stream::drop_marks(Mark first, Mark end) {
  std::uint64_t bytes = 0;
  for (Mark mark = first; mark != end; ++mark) bytes += mark->second.bytes();
  session_->metrics().state_bytes.subtract(bytes);
  session_->metrics().resident_bytes.subtract(bytes);
  marks_.erase(first, end);
  if (bytes > 0) handle_.shrink(bytes);
}

std::size_t Stream::free_set(std::size_t a, std::size_t b) const {
  std::size_t set = 0;
  while (set == a || set == b || (guard_ && set == guard_->set())) ++set;
  return set;
}

void Stream::set_guard(const titans_guard& limits, bool measures_updates) {
  check_guard(limits);
  if (!guard_ && limits.policy == TITANS_GUARD_OFF) return;
  auto guard = std::make_unique<Guard>(*session_, limits, measures_updates);
  const std::uint64_t before = state_bytes();
  const std::uint64_t marks = guard->mark_bytes(), old_marks = guard_ ? guard_->mark_bytes() : 0;
  const std::uint64_t more_marks = marks > old_marks ? marks - old_marks : 0;
  handle_.grow(more_marks);
  try {
    if (sets_[kSets].empty()) add_guard_buffers();
  } catch (...) {
    handle_.shrink(more_marks);
    throw;
  }
  for (std::size_t state = 0; state < guard_backups_.size(); ++state) {
    if (guard_backups_[state] != nullptr) guard->watch(state, *sets_[current_][state], *guard_backups_[state]);
  }
  if (marks < old_marks) handle_.shrink(old_marks - marks);
  guard_ = std::move(guard);
  // The sums wrap around if marks of an earlier guard were freed.
  session_->metrics().state_bytes.add(state_bytes() - before);
  session_->metrics().resident_bytes.add(state_bytes() - before);
  rebase_guard();
}

void Stream::add_guard_buffers() {
  BufferSet set;
  std::vector<Buffer*> backups;
  const std::size_t before = buffers_.size();
  try {
    for (std::size_t state = 0; state < sets_[0].size(); ++state) {
      Buffer* buffer = add_buffer(state);
      const bool in_place = session_->executor().in_place(state);
      set.push_back(in_place ? sets_[0][state] : buffer);
      backups.push_back(in_place ? buffer : nullptr);
    }
  } catch (...) {
    drop_buffers(before);
    throw;
  }
  sets_[kSets] = std::move(set);
  guard_backups_ = std::move(backups);
}

void Stream::rebase_guard() {
  if (!guard_) return;
  guard_->set_checkpoint(position_, current_);
  guard_->forget_marks(position_);
}

titans_guard_report Stream::guard_report() const {
  if (guard_) return guard_->report();
  titans_guard_report none{};
  none.layer = none.head = -1;
  return none;
}

void Stream::peak_norms(float* norms, std::size_t capacity) const {
  const std::size_t count = session_->memories().size();
  if (capacity < count) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0507", "stream", text("expected room for ", count, " norms, got ", capacity),
                "pass a larger buffer");
  }
  std::fill_n(norms, count, -1.0F);
  for (std::size_t index = 0; index < session_->norm_fields().size(); ++index) {
    norms[session_->norm_fields()[index].memory] = static_cast<float>(health_.peaks()[index]);
  }
}

std::uint64_t Stream::state_bytes() const {
  const std::uint64_t output_bytes = session_->output_size() * sizeof(float);
  std::uint64_t mark_bytes = output_bytes;
  for (const StateTensor& state : session_->manifest().state) mark_bytes += state.bytes;
  // Spilled buffers count too.
  const std::uint64_t guard_bytes = guard_ ? guard_->mark_bytes() : 0;
  return state_bytes_ + output_bytes + marks_.size() * mark_bytes + guard_bytes;
}

void Stream::read_memory(std::size_t index, float* values, std::size_t capacity) const {
  const MemoryView& memory = session_->memories()[index];
  if (capacity < memory.elements) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0507", "stream",
                text("expected room for ", memory.elements, " values of ", memory.name, ", got ", capacity),
                "pass a larger buffer");
  }
  const StateTensor& state = session_->manifest().state[memory.state];
  Floats packed(state.bytes / sizeof(float));
  sets_[current_][memory.state]->download(reinterpret_cast<std::byte*>(packed.data()));
  const auto row = static_cast<std::size_t>(state.shape.back());
  for (std::size_t start = memory.offset; start < packed.size(); start += row) {
    unpack_field(memory.dtype, packed.data() + start, memory.extent, memory.columns, values);
    values += memory.extent;
  }
}

}  // namespace titans::core
