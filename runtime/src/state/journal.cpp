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
  Entry entry{&live, &backup, state.chunk.value_or(1), state.rows, {}, {}, {}, pitch, rows};
  const auto add = [&](Part& part, std::size_t begin, std::size_t end) {
    if (begin < end) part.stripes.push_back({begin * element, (end - begin) * element, pitch, rows});
  };
  std::vector<Words> others = words_written_by_token(state);
  for (const Words& words : others) add(entry.tokenwise, words.begin, words.end);
  for (const MemoryField& field : state.layout) {
    if (!state.chunk || field.written != Written::kRow) continue;
    const std::size_t words = field_words(field.dtype, field.shape);
    const bool halves = field.dtype == FieldDtype::kBFloat16 || field.dtype == FieldDtype::kFloat16;
    const bool apart = !field.shape.empty() && static_cast<std::uint64_t>(field.shape[0]) == *state.chunk &&
                       (halves || field.dtype == FieldDtype::kFloat32);
    std::size_t elements = apart ? 1 : 0;
    for (std::size_t i = 1; i < field.shape.size(); ++i) elements *= static_cast<std::size_t>(field.shape[i]);
    entry.row_fields.push_back({field.offset, words, elements, halves});
    others.push_back({field.offset, field.offset + words});
  }
  std::sort(others.begin(), others.end(), [](const Words& a, const Words& b) { return a.begin < b.begin; });
  std::size_t at = 0;
  for (const Words& words : others) {
    add(entry.chunkwise, at, words.begin);
    at = std::max(at, words.end);
  }
  add(entry.chunkwise, at, row);
  entries_.push_back(std::move(entry));
}

void Journal::begin() {
  start_.reset();
  for (Cache& cache : caches_) cache.begin = cache.end = 0;
  for (Entry& entry : entries_) {
    entry.chunkwise.saved = entry.tokenwise.saved = false;
    entry.begin = entry.end = 0;
  }
}

void Journal::save_for(std::uint64_t position, std::uint64_t tokens) {
  if (!start_) start_ = position;
  for (Cache& cache : caches_) save_for(cache, position, tokens);
  for (Entry& entry : entries_) {
    save(entry, entry.tokenwise);
    if (!entry.row_fields.empty()) save_rows_for(entry, position, tokens);
    const std::uint64_t first = entry.rows.before(position), end = entry.rows.before(position + tokens);
    if (first / entry.chunk != end / entry.chunk) {
      save(entry, entry.chunkwise);
      save_rows(entry, entry.end, entry.chunk);
      save_rows(entry, 0, entry.begin);
    }
  }
}

// As for a cache: the rows of a chunk are places that return with each chunk.
void Journal::save_rows_for(Entry& entry, std::uint64_t position, std::uint64_t tokens) const {
  const std::uint64_t start = entry.rows.before(*start_), first = entry.rows.before(position),
                      last = entry.rows.before(position + tokens) - 1;
  // Only once: a guard may have set the stream back to the start, but leaves rows of the open chunk.
  if (entry.begin == entry.end) entry.begin = entry.end = first % entry.chunk;
  if (last / entry.chunk == start / entry.chunk) {
    save_rows(entry, entry.end, last % entry.chunk + 1);
  } else {
    save_rows(entry, entry.end, entry.chunk);
    save_rows(entry, 0, entry.begin);
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
    save_rows(entry, entry.end, entry.chunk);
    save_rows(entry, 0, entry.begin);
  }
}

void Journal::restore() {
  for (const Cache& cache : caches_) copy(*cache.live, *cache.backup, cache.places, cache.begin, cache.end);
  for (const Entry& entry : entries_) {
    restore(entry, entry.tokenwise);
    restore(entry, entry.chunkwise);
    restore_rows(entry);
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

// Saves rows [begin, end), which adjoin the saved ones. A word that two rows share was saved with the first of them.
void Journal::save_rows(Entry& entry, std::uint64_t begin, std::uint64_t end) {
  if (begin >= end) return;
  const bool first = entry.begin == entry.end, above = !first && begin == entry.end;
  for (const RowField& field : entry.row_fields) {
    const auto elements = [&](std::uint64_t row) { return static_cast<std::size_t>(row) * field.elements; };
    std::size_t from = 0, to = field.words;
    if (field.elements == 0) {
      if (!first) continue;
    } else if (field.halves) {
      from = (elements(begin) + (above ? 1 : 0)) / 2;
      to = (elements(end) + (first || above ? 1 : 0)) / 2;
    } else {
      from = elements(begin);
      to = elements(end);
    }
    if (from >= to) continue;
    constexpr std::size_t kWord = sizeof(float);
    entry.backup->copy_stripe_from(*entry.live,
                                   {(field.offset + from) * kWord, (to - from) * kWord, entry.pitch, entry.heads});
  }
  entry.begin = std::min(entry.begin, begin);
  entry.end = std::max(entry.end, end);
}

void Journal::restore_rows(const Entry& entry) {
  if (entry.begin == entry.end) return;
  constexpr std::size_t kWord = sizeof(float);
  for (const RowField& field : entry.row_fields) {
    std::size_t from = 0, to = field.words;
    if (field.elements > 0) {
      from = static_cast<std::size_t>(entry.begin) * field.elements;
      to = static_cast<std::size_t>(entry.end) * field.elements;
      if (field.halves) {
        from /= 2;
        to = (to + 1) / 2;
      }
    }
    entry.live->copy_stripe_from(*entry.backup,
                                 {(field.offset + from) * kWord, (to - from) * kWord, entry.pitch, entry.heads});
  }
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
