#include "state/journal.h"

#include <algorithm>
#include <utility>

namespace titans::core {
namespace {

// Copies places [begin, end) of a cache.
void copy(Buffer& to, const Buffer& from, const std::vector<Stripe>& places, std::uint64_t begin, std::uint64_t end) {
  if (begin >= end) return;
  for (Stripe stripe : places) {
    stripe.offset += static_cast<std::size_t>(begin) * stripe.bytes;
    stripe.bytes *= static_cast<std::size_t>(end - begin);
    to.copy_stripe_from(from, stripe);
  }
}

}  // namespace

std::vector<Words> words_written_by_token(const StateTensor& state) {
  const auto row = static_cast<std::size_t>(state.shape.back());
  if (!state.chunk) return {{0, row}};
  std::vector<Words> fields;
  for (const MemoryField& field : state.layout) {
    if (field.written == Written::kToken) {
      fields.push_back({field.offset, field.offset + field_words(field.dtype, field.shape)});
    }
  }
  std::sort(fields.begin(), fields.end(), [](const Words& a, const Words& b) { return a.begin < b.begin; });
  std::vector<Words> joined;
  for (const Words& field : fields) {
    if (joined.empty() || field.begin > joined.back().end) {
      joined.push_back(field);
    } else {
      joined.back().end = std::max(joined.back().end, field.end);
    }
  }
  return joined;
}

void Journal::watch(const StateTensor& state, Buffer& live, Buffer& backup) {
  const std::size_t element = dtype_info(state.dtype).bytes;
  if (state.written) {
    const auto axis = state.shape.begin() + static_cast<std::ptrdiff_t>(state.written->axis);
    std::size_t row = element;
    for (auto extent = axis + 1; extent != state.shape.end(); ++extent) row *= static_cast<std::size_t>(*extent);
    const std::size_t pitch = row * static_cast<std::size_t>(*axis);
    std::vector<Stripe> places;
    for (const std::size_t first : state.written->first) {
      places.push_back({first * row, row, pitch, pitch == 0 ? 0 : state.bytes / pitch});
    }
    caches_.push_back({&live, &backup, state.written->period, state.rows, std::move(places), 0, 0});
    return;
  }
  const auto row = static_cast<std::size_t>(state.shape.back());
  const std::size_t pitch = row * element;
  const std::size_t rows = pitch == 0 ? 0 : state.bytes / pitch;
  Entry entry{&live, &backup, state.chunk.value_or(1), state.rows, {}, {}};
  const auto add = [&](Part& part, std::size_t begin, std::size_t end) {
    if (begin < end) part.stripes.push_back({begin * element, (end - begin) * element, pitch, rows});
  };
  std::size_t at = 0;
  for (const Words& words : words_written_by_token(state)) {
    add(entry.chunkwise, at, words.begin);
    add(entry.tokenwise, words.begin, words.end);
    at = words.end;
  }
  add(entry.chunkwise, at, row);
  entries_.push_back(std::move(entry));
}

void Journal::begin() {
  start_.reset();
  for (Cache& cache : caches_) cache.begin = cache.end = 0;
  for (Entry& entry : entries_) entry.chunkwise.saved = entry.tokenwise.saved = false;
}

void Journal::save_for(std::uint64_t position, std::uint64_t tokens) {
  if (!start_) start_ = position;
  for (Cache& cache : caches_) save_for(cache, position, tokens);
  for (Entry& entry : entries_) {
    save(entry, entry.tokenwise);
    const std::uint64_t first = entry.rows.before(position), end = entry.rows.before(position + tokens);
    if (first / entry.chunk != end / entry.chunk) save(entry, entry.chunkwise);
  }
}

// The change writes consecutive places. When it enters another period it wraps to the places before its start, so
// everything that is not saved yet is saved.
void Journal::save_for(Cache& cache, std::uint64_t position, std::uint64_t tokens) const {
  const std::uint64_t start = cache.rows.before(*start_), first = cache.rows.before(position),
                      last = cache.rows.before(position + tokens) - 1;
  if (first == start) cache.begin = cache.end = first % cache.period;
  if (last / cache.period == start / cache.period) {
    save(cache, cache.end, last % cache.period + 1);
  } else {
    save(cache, cache.end, cache.period);
    save(cache, 0, cache.begin);
  }
}

void Journal::save_all() {
  for (Cache& cache : caches_) {
    save(cache, cache.end, cache.period);
    save(cache, 0, cache.begin);
  }
  for (Entry& entry : entries_) {
    save(entry, entry.tokenwise);
    save(entry, entry.chunkwise);
  }
}

void Journal::restore() {
  for (const Cache& cache : caches_) copy(*cache.live, *cache.backup, cache.places, cache.begin, cache.end);
  for (const Entry& entry : entries_) {
    restore(entry, entry.tokenwise);
    restore(entry, entry.chunkwise);
  }
}

// Saves places [begin, end), which adjoin the saved range.
void Journal::save(Cache& cache, std::uint64_t begin, std::uint64_t end) {
  if (begin >= end) return;
  copy(*cache.backup, *cache.live, cache.places, begin, end);
  cache.begin = std::min(cache.begin, begin);
  cache.end = std::max(cache.end, end);
}

void Journal::save(const Entry& entry, Part& part) {
  if (part.saved) return;
  for (const Stripe& stripe : part.stripes) entry.backup->copy_stripe_from(*entry.live, stripe);
  part.saved = true;
}

void Journal::restore(const Entry& entry, const Part& part) {
  if (!part.saved) return;
  for (const Stripe& stripe : part.stripes) entry.live->copy_stripe_from(*entry.backup, stripe);
}

void Journal::move_to(const BufferMap& moved) {
  for (Entry& entry : entries_) {
    entry.live = moved.at(entry.live);
    entry.backup = moved.at(entry.backup);
  }
  for (Cache& cache : caches_) {
    cache.live = moved.at(cache.live);
    cache.backup = moved.at(cache.backup);
  }
}

}  // namespace titans::core
