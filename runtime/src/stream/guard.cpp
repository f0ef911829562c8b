#include "stream/guard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"

namespace titans::core {
namespace {

// Propagates NaN, unlike std::max.
float larger(float a, float b) { return std::isnan(a) || a > b ? a : b; }

}  // namespace

void check_guard(const titans_guard& guard) {
  if (guard.policy < TITANS_GUARD_OFF || guard.policy > TITANS_GUARD_RESTART) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0501", "guard", text("unknown policy: ", guard.policy),
                "pass a titans_guard_policy");
  }
  for (const float limit : {guard.max_update_norm, guard.max_surprise}) {
    if (limit > 0) continue;
    throw Error(TITANS_INVALID_ARGUMENT, "E0501", "guard", text("expected limits above 0, got ", limit),
                "begin with titans_guard_init, and give infinity for no limit");
  }
  if (guard.bundle_limits != 0 && guard.bundle_limits != 1) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0501", "guard",
                text("expected bundle_limits of 0 or 1, got ", guard.bundle_limits), "begin with titans_guard_init");
  }
}

Guard::Guard(const Session& session, const titans_guard& limits, bool measures_updates)
    : session_(session),
      limits_(limits),
      measures_updates_(measures_updates),
      backups_(session.manifest().state.size()),
      norms_(session) {
  for (const NormField& field : session.norm_fields()) {
    norm_limits_.push_back(limits.bundle_limits != 0 ? field.limit : std::numeric_limits<double>::infinity());
    mark_limits_.push_back(norm_limits_.back() * kHealthyShare);
  }
  const std::vector<StateTensor>& states = session.manifest().state;
  for (std::size_t index = 0; index < states.size(); ++index) {
    const StateTensor& state = states[index];
    if (state.role != "memory" || state.shape.empty() || state.shape.back() == 0) continue;
    Memory memory{};
    memory.state = index;
    memory.name = &state.name;
    memory.chunk = state.chunk.value_or(1);
    memory.known = state.chunk.has_value();
    memory.rows = state.rows;
    memory.row = static_cast<std::size_t>(state.shape.back());
    memory.heads = state.bytes / sizeof(float) / memory.row;
    if (memory.known) memory.resets = resets_of(state);
    if (!memory.known) measures_updates_ = true;  // moves_on needs to see whether the memory changed
    for (const MemoryField& field : state.layout) {
      const bool surprise = field.kind == field_kinds::kSurprise;
      if (!surprise && field.kind != field_kinds::kWeights) continue;
      std::size_t extent = 1;
      for (const std::int64_t dimension : field.shape) extent *= static_cast<std::size_t>(dimension);
      const std::size_t columns = field.shape.empty() ? 1 : static_cast<std::size_t>(field.shape.back());
      memory.fields.push_back({field.offset, extent, columns, field.dtype, surprise});
    }
    // A memory with an unknown layout is treated as weights only.
    if (memory.fields.empty()) {
      memory.fields.push_back({0, memory.row, memory.row, FieldDtype::kFloat32, false});
      measures_updates_ = true;  // nothing else finds NaN in it
    }
    memories_.push_back(std::move(memory));
  }
  if (std::isfinite(limits.max_update_norm) || std::isfinite(limits.max_surprise)) measures_updates_ = true;
  report_.layer = report_.head = -1;
}

// Empty unless every field written by each token has a known value at the start of a chunk.
std::vector<Guard::Reset> Guard::resets_of(const StateTensor& state) {
  std::vector<Reset> resets;
  for (const MemoryField& field : state.layout) {
    if (field.written != Written::kToken) continue;
    if (!field.at_start || field.dtype != FieldDtype::kFloat32) return {};
    resets.push_back({field.offset, field_words(field.dtype, field.shape), *field.at_start});
  }
  return resets;
}

void Guard::watch(std::size_t state, Buffer& live, Buffer& backup) {
  backups_[state] = &backup;
  journal_.watch(session_.manifest().state[state], live, backup);
}

void Guard::set_checkpoint(std::uint64_t position, std::size_t set) {
  position_ = position;
  set_ = set;
  tokens_.clear();
  vectors_.clear();
  journal_.begin();
  droppable_ = std::any_of(memories_.begin(), memories_.end(), [&](const Memory& memory) {
    return !memory.resets.empty() && memory.rows.before(position) % memory.chunk != 0;
  });
}

std::uint64_t Guard::completed(const Memory& memory, std::uint64_t position, std::uint64_t tokens) const {
  return memory.rows.before(position + tokens) / memory.chunk - memory.rows.before(position) / memory.chunk;
}

bool Guard::looks_closely(std::uint64_t position) const {
  return std::isfinite(limits_.max_update_norm) || std::isfinite(limits_.max_surprise) || position < closely_until_;
}

std::size_t Guard::reach(std::uint64_t position, std::size_t remaining) const {
  std::size_t reach = remaining;
  if (limits_.restart_every > 0) {
    reach = std::min<std::uint64_t>(reach, limits_.restart_every - position % limits_.restart_every);
  }
  if (!looks_closely(position)) return reach;
  for (const Memory& memory : memories_) {
    const std::uint64_t rows = memory.rows.before(position);
    const std::uint64_t end = (rows / memory.chunk + 1) * memory.chunk;
    // Every token has at least one row, so this is an upper bound.
    std::uint64_t tokens = end - rows;
    while (tokens > 1 && memory.rows.before(position + tokens - 1) >= end) --tokens;
    reach = std::min<std::uint64_t>(reach, tokens);
  }
  return reach;
}

bool Guard::saw_several(std::uint64_t position, std::uint64_t tokens) const {
  return tokens > 1 && std::any_of(memories_.begin(), memories_.end(),
                                   [&](const Memory& memory) { return completed(memory, position, tokens) > 1; });
}

const float* Guard::rows_of(const Buffer& buffer, const Memory& memory, Floats& copy) {
  if (const std::byte* host = buffer.host()) return reinterpret_cast<const float*>(host);
  copy.resize(memory.row * memory.heads);
  buffer.download(reinterpret_cast<std::byte*>(copy.data()));
  return copy.data();
}

const float* Guard::values_of(const Field& field, const float* row, Floats& values) const {
  if (field.dtype == FieldDtype::kFloat32) return row + field.offset;
  values.resize(std::max(values.size(), field.extent));
  unpack_field(field.dtype, row + field.offset, field.extent, field.columns, values.data());
  return values.data();
}

void Guard::look_at_head(const Memory& memory, std::size_t head, const float* before, const float* after,
                         Violation& violation) {
  double weights = 0, change = 0, now = 0, surprise = 0, surprise_change = 0;
  for (const Field& field : memory.fields) {
    const float* values = values_of(field, after + head * memory.row, after_values_);
    const float* old = values_of(field, before + head * memory.row, before_values_);
    if (field.surprise) {
      surprise += squares(values, field.extent);
      surprise_change += squares_of_change(old, values, field.extent);
      continue;
    }
    weights += squares(old, field.extent);
    change += squares_of_change(old, values, field.extent);
    now += squares(values, field.extent);
  }
  const auto update_norm = static_cast<float>(std::sqrt(change / (weights > 0 ? weights : 1.0)));
  const auto surprise_norm = static_cast<float>(std::sqrt(surprise));
  const bool changed = change != 0 || surprise_change != 0;
  violation.changed = violation.changed || changed;
  violation.update_norm = larger(update_norm, violation.update_norm);
  violation.surprise = larger(surprise_norm, violation.surprise);
  std::int32_t reason = TITANS_GUARD_GOOD;
  if (!std::isfinite(now) || !std::isfinite(surprise)) {
    reason = TITANS_GUARD_NOT_FINITE;
  } else if (changed && !(update_norm <= limits_.max_update_norm)) {
    reason = TITANS_GUARD_UPDATE_NORM;
  } else if (changed && !(surprise_norm <= limits_.max_surprise)) {
    reason = TITANS_GUARD_SURPRISE;
  }
  if (reason == TITANS_GUARD_GOOD || violation.reason != TITANS_GUARD_GOOD) return;
  violation.reason = reason;
  violation.head = static_cast<std::int32_t>(head);
  violation.name = memory.name;
}

// A logit of -infinity rules a token out. Any other value that is not finite is an error.
bool Guard::output_is_good(const float* output) const {
  const bool logits = session_.manifest().input_kind == InputKind::kTokens;
  float most = -std::numeric_limits<float>::infinity(), sum = 0;
  for (std::size_t i = 0; i < session_.output_size(); ++i) {
    most = std::max(most, output[i]);
    sum += output[i] * 0.0F;  // NaN if the value is not finite
  }
  if (!std::isnan(sum)) return true;
  if (!logits || !std::isfinite(most)) return false;
  return std::none_of(output, output + session_.output_size(), [](float value) { return std::isnan(value); });
}

void Guard::look_at_norms(const Memory& memory, const Buffer& before, const Buffer& after, Violation& violation) {
  const std::vector<NormField>& fields = session_.norm_fields();
  for (std::size_t index = 0; index < fields.size(); ++index) {
    if (fields[index].state != memory.state) continue;
    const Norm& norm = norms_.norms()[index];
    const bool finite = std::isfinite(norm.value);
    if (finite && norm.value <= norm_limits_[index]) continue;
    // A frozen memory breaks no limit, even if it is above one.
    if (finite && !field_changed(memory, fields[index], before, after)) continue;
    violation.reason = finite ? TITANS_GUARD_NORM : TITANS_GUARD_NOT_FINITE;
    violation.head = norm.head;
    violation.name = memory.name;
    violation.field = index;
    violation.norm = norm.value;
    return;
  }
}

bool Guard::field_changed(const Memory& memory, const NormField& field, const Buffer& before, const Buffer& after) {
  const float* old_rows = rows_of(before, memory, before_copy_);
  const float* new_rows = rows_of(after, memory, after_copy_);
  const std::size_t bytes = field_words(field.dtype, {static_cast<std::int64_t>(field.extent / field.columns),
                                                      static_cast<std::int64_t>(field.columns)}) *
                            sizeof(float);
  for (std::size_t head = 0; head < memory.heads; ++head) {
    const std::size_t at = head * memory.row + field.offset;
    if (std::memcmp(old_rows + at, new_rows + at, bytes) != 0) return true;
  }
  return false;
}

Violation Guard::look(const BufferSet& before, const BufferSet& after, std::uint64_t position, std::uint64_t tokens,
                      const float* output) {
  Violation violation;
  measured_ = false;
  for (std::size_t layer = 0; layer < memories_.size(); ++layer) {
    const Memory& memory = memories_[layer];
    const std::uint64_t chunks = completed(memory, position, tokens);
    if (chunks == 0) continue;
    const bool good = violation.reason == TITANS_GUARD_GOOD;
    const Buffer& then = backups_[memory.state] == nullptr ? *before[memory.state] : *backups_[memory.state];
    if (measures_updates_) {
      const float* old_rows = rows_of(then, memory, before_copy_);
      const float* new_rows = rows_of(*after[memory.state], memory, after_copy_);
      for (std::size_t head = 0; head < memory.heads; ++head) {
        look_at_head(memory, head, old_rows, new_rows, violation);
      }
    }
    norms_.read(memory.state, *after[memory.state]);
    measured_ = true;
    if (violation.reason == TITANS_GUARD_GOOD) {
      look_at_norms(memory, then, *after[memory.state], violation);
    }
    if (good && violation.reason != TITANS_GUARD_GOOD) violation.layer = static_cast<std::int32_t>(layer);
    report_.chunks += chunks;
  }
  if (violation.reason == TITANS_GUARD_GOOD && !output_is_good(output)) violation.reason = TITANS_GUARD_OUTPUT;
  if (violation.reason == TITANS_GUARD_GOOD && measures_updates_ && !saw_several(position, tokens)) {
    report_.peak_update_norm = std::max(report_.peak_update_norm, violation.update_norm);
    report_.peak_surprise = std::max(report_.peak_surprise, violation.surprise);
  }
  return violation;
}

bool Guard::moves_on(const Violation& violation, std::uint64_t position, std::uint64_t tokens) const {
  if (position + tokens - position_ >= kMostRemembered) return true;
  return std::any_of(memories_.begin(), memories_.end(), [&](const Memory& memory) {
    return memory.known ? completed(memory, position, tokens) > 0 : violation.changed;
  });
}

void Guard::count(const Violation& violation, std::uint64_t position) {
  ++report_.rollbacks;
  report_.position = position;
  report_.reason = violation.reason;
  report_.layer = violation.layer;
  report_.head = violation.head;
  report_.update_norm = violation.update_norm;
  report_.surprise = violation.surprise;
  const bool norm = violation.reason == TITANS_GUARD_NORM;
  report_.field = norm ? session_.norm_fields()[violation.field].name.c_str() : nullptr;
  report_.value = norm ? static_cast<float>(violation.norm) : 0.0F;
  report_.limit = norm ? static_cast<float>(norm_limits_[violation.field]) : 0.0F;
}

std::string Guard::describe(const Violation& violation) const {
  if (violation.reason == TITANS_GUARD_CALL) return text("a graph failed: ", violation.failure);
  if (violation.reason == TITANS_GUARD_OUTPUT) {
    const bool tokens = session_.manifest().input_kind == InputKind::kTokens;
    return tokens ? "logits without a finite maximum" : "outputs that are not finite";
  }
  const std::string where = text(" in ", *violation.name, ", head ", violation.head);
  if (violation.reason == TITANS_GUARD_NORM) {
    return text("expected a norm of ", session_.norm_fields()[violation.field].name, " of at most ",
                norm_limits_[violation.field], ", got ", violation.norm, " in head ", violation.head);
  }
  switch (violation.reason) {
    case TITANS_GUARD_UPDATE_NORM:
      return text("expected an update norm of at most ", limits_.max_update_norm, ", got ", violation.update_norm,
                  where);
    case TITANS_GUARD_SURPRISE:
      return text("expected a surprise of at most ", limits_.max_surprise, ", got ", violation.surprise, where);
    default:
      return "NaN or infinity" + where;
  }
}

void Guard::drop_open_chunk(const BufferSet& state, std::size_t set) {
  for (const Memory& memory : memories_) {
    if (memory.resets.empty() || memory.rows.before(position_) % memory.chunk == 0) continue;
    std::vector<float> rows(memory.row * memory.heads);
    Buffer& buffer = *state[memory.state];
    buffer.download(reinterpret_cast<std::byte*>(rows.data()));
    for (std::size_t head = 0; head < memory.heads; ++head) {
      for (const Reset& reset : memory.resets) {
        std::fill_n(rows.data() + head * memory.row + reset.offset, reset.extent, reset.value);
      }
    }
    buffer.upload(reinterpret_cast<const std::byte*>(rows.data()));
  }
  journal_.begin();
  set_ = set;
  droppable_ = false;
}

void Guard::remember(std::uint64_t position, const std::int32_t* tokens, const float* vectors, std::size_t count) {
  // The input before the checkpoint is not needed.
  const std::size_t skipped = position_ > position ? static_cast<std::size_t>(position_ - position) : 0;
  if (tokens != nullptr) tokens_.insert(tokens_.end(), tokens + skipped, tokens + count);
  if (vectors != nullptr) {
    const std::size_t size = session_.input_size();
    vectors_.insert(vectors_.end(), vectors + skipped * size, vectors + count * size);
  }
}

bool Guard::repairs() const { return limits_.policy >= TITANS_GUARD_REWIND; }

bool Guard::restart_due(std::uint64_t position) const {
  return limits_.restart_every > 0 && position % limits_.restart_every == 0;
}

bool Guard::can_use_mark() const {
  const std::optional<HealthyMark>& latest = pending_ ? pending_ : mark_;
  return latest && !latest->used && !latest->rows.empty();
}

std::string Guard::describe_repair() const {
  switch (limits_.policy) {
    case TITANS_GUARD_REWIND:
      if (can_use_mark()) {
        return text(" and then returns to the mark at position ", (pending_ ? pending_ : mark_)->position);
      }
      return " and is then reset, as there is no unused mark";
    case TITANS_GUARD_DECAY:
      return " and then goes half of the way back to the initial memory";
    case TITANS_GUARD_RESTART:
      return " and is then reset";
    default:
      return {};
  }
}

void Guard::repair(const BufferSet& state, std::uint64_t position, std::int32_t policy) {
  ++report_.repairs;
  norms_.clear();
  const bool rewinds = policy == TITANS_GUARD_REWIND && can_use_mark();
  HealthyMark used{position, {}, true};
  if (rewinds) {
    used = pending_ ? *pending_ : *mark_;
    used.used = true;
  }
  for (std::size_t index = 0; index < memories_.size(); ++index) {
    const Memory& memory = memories_[index];
    const StateTensor& tensor = session_.manifest().state[memory.state];
    const float* source =
        rewinds ? used.rows[index].data()
                : reinterpret_cast<const float*>(session_.bundle().initial_state().find(tensor.name)->second.data);
    Floats rows(memory.row * memory.heads);
    state[memory.state]->download(reinterpret_cast<std::byte*>(rows.data()));
    for (std::size_t head = 0; head < memory.heads; ++head) {
      const std::size_t at = head * memory.row;
      if (policy == TITANS_GUARD_DECAY) {
        decay(tensor, source + at, rows.data() + at);
      } else {
        set_back(tensor, source + at, rows.data() + at);
      }
    }
    state[memory.state]->upload(reinterpret_cast<const std::byte*>(rows.data()));
  }
  if (limits_.policy == TITANS_GUARD_REWIND) pending_ = std::move(used);
}

namespace {

// The fields that make up what a memory has learned. The others belong to the open chunk.
bool is_learned(const MemoryField& field) {
  return has_norm(field) || field.kind == field_kinds::kGradientPoint || field.kind == field_kinds::kRoundingError;
}

}  // namespace

void Guard::set_back(const StateTensor& tensor, const float* source, float* row) {
  if (tensor.layout.empty()) std::copy_n(source, static_cast<std::size_t>(tensor.shape.back()), row);
  for (const MemoryField& field : tensor.layout) {
    if (!is_learned(field)) continue;
    std::copy_n(source + field.offset, field_words(field.dtype, field.shape), row + field.offset);
  }
}

void Guard::decay(const StateTensor& tensor, const float* source, float* row) {
  const auto halve = [](const float* from, float* to, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] = from[i] + (to[i] - from[i]) / 2;
  };
  if (tensor.layout.empty()) halve(source, row, static_cast<std::size_t>(tensor.shape.back()));
  Floats from, to;
  for (const MemoryField& field : tensor.layout) {
    if (!is_learned(field)) continue;
    float* words = row + field.offset;
    std::size_t extent = 1;
    for (const std::int64_t dimension : field.shape) extent *= static_cast<std::size_t>(dimension);
    const std::size_t columns = field.shape.empty() ? 1 : static_cast<std::size_t>(field.shape.back());
    if (field.dtype == FieldDtype::kFloat32) {
      halve(source + field.offset, words, extent);
      continue;
    }
    from.resize(extent);
    to.resize(extent);
    unpack_field(field.dtype, source + field.offset, extent, columns, from.data());
    unpack_field(field.dtype, words, extent, columns, to.data());
    halve(from.data(), to.data(), extent);
    pack_field(field.dtype, to.data(), extent, columns, words);
  }
}

void Guard::mark_if_healthy(const BufferSet& state, std::uint64_t position) {
  if (limits_.policy != TITANS_GUARD_REWIND) return;
  const std::optional<HealthyMark>& latest = pending_ ? pending_ : mark_;
  if (position < (latest ? latest->position : since_) + kMarkEvery) return;
  if (norms_.first_above(mark_limits_) < mark_limits_.size()) return;
  HealthyMark mark{position, {}, false};
  for (const Memory& memory : memories_) {
    Floats& rows = mark.rows.emplace_back(memory.row * memory.heads);
    state[memory.state]->download(reinterpret_cast<std::byte*>(rows.data()));
  }
  pending_ = std::move(mark);
}

void Guard::keep_marks() {
  if (pending_) mark_ = std::move(pending_);
  pending_.reset();
}

void Guard::forget_marks(std::uint64_t position) {
  pending_.reset();
  since_ = position;
  if (mark_ && mark_->position > position) mark_.reset();
}

std::uint64_t Guard::mark_bytes() const {
  if (limits_.policy != TITANS_GUARD_REWIND) return 0;
  std::uint64_t bytes = 0;
  for (const Memory& memory : memories_) bytes += 2 * memory.row * memory.heads * sizeof(float);
  return bytes;
}

std::optional<StreamState> Guard::copy_mark() const {
  if (!has_mark()) return std::nullopt;
  StreamState copy;
  copy.position = mark_->position;
  copy.last_output.resize(session_.output_size());
  for (const StateTensor& tensor : session_.manifest().state) copy.tensors.emplace_back(tensor.bytes);
  for (std::size_t index = 0; index < memories_.size(); ++index) {
    std::memcpy(copy.tensors[memories_[index].state].data(), mark_->rows[index].data(),
                mark_->rows[index].size() * sizeof(float));
  }
  return copy;
}

void Guard::give_mark_up() noexcept {
  if (!has_mark()) return;
  for (Floats& rows : mark_->rows) Floats().swap(rows);
}

void Guard::take_mark(const StreamState& state) {
  for (std::size_t index = 0; index < memories_.size(); ++index) {
    const Memory& memory = memories_[index];
    Floats& rows = mark_->rows[index];
    rows.resize(memory.row * memory.heads);
    std::memcpy(rows.data(), state.tensors[memory.state].data(), rows.size() * sizeof(float));
  }
}

}  // namespace titans::core
