#include "state/journal.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

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

std::optional<OpenChunk> find_open_chunk(const StateTensor& state) {
  constexpr std::array<std::string_view, 5> kCoefficients{"e", "a", "m", "f", "beta"};
  const bool counted = !state.layout.empty() && state.layout.back().name == "chunk_updates";
  const std::size_t count = state.layout.size() - (counted ? 1 : 0);
  if (state.role != "memory" || count <= kCoefficients.size()) return std::nullopt;
  const std::size_t first = count - kCoefficients.size();
  const Shape& tokens = state.layout[first].shape;
  if (tokens.size() != 1 || tokens[0] < 1) return std::nullopt;
  const OpenChunk chunk{static_cast<std::size_t>(tokens[0]), state.layout[first].offset};
  std::size_t offset = chunk.coefficients;
  for (std::size_t i = 0; i < kCoefficients.size(); ++i) {
    const MemoryField& field = state.layout[first + i];
    const bool each_token = i < 2;  // e and a; the others are numbers
    if (field.name != kCoefficients[i] || field.offset != offset || field.shape != (each_token ? tokens : Shape())) {
      return std::nullopt;
    }
    offset += each_token ? chunk.rows : 1;
  }
  if (counted && state.layout.back().offset != offset) return std::nullopt;
  const bool others_before = std::all_of(
      state.layout.begin(), state.layout.begin() + static_cast<std::ptrdiff_t>(first), [&](const MemoryField& field) {
        const std::optional<std::size_t> elements = tensor_bytes(field.shape, DType::kInt8);
        return elements && field.offset + field_words(field.dtype, field.shape) <= chunk.coefficients;
      });
  return others_before ? std::optional(chunk) : std::nullopt;
}

std::uint64_t rows_of_chunk(const StateTensor& state) {
  if (state.chunk) return *state.chunk;
  const std::optional<OpenChunk> chunk = find_open_chunk(state);
  return chunk ? chunk->rows : 1;
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
  // Of a state that is something else, every token may change everything.
  OpenChunk chunk = find_open_chunk(state).value_or(OpenChunk{1, row});
  if (state.chunk) chunk = {static_cast<std::size_t>(*state.chunk), row};
  const std::size_t split = chunk.coefficients * element;
  entries_.push_back({&live,
                      &backup,
                      chunk.rows,
                      state.rows,
                      {{0, split, pitch, rows}, false},
                      {{split, pitch - split, pitch, rows}, false}});
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

// The change writes place after place. Once it comes to another period, the places before its start are next, so then
// all that is not saved yet is.
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

// Saves places [begin, end), which lie at one end of those that are saved.
void Journal::save(Cache& cache, std::uint64_t begin, std::uint64_t end) {
  if (begin >= end) return;
  copy(*cache.backup, *cache.live, cache.places, begin, end);
  cache.begin = std::min(cache.begin, begin);
  cache.end = std::max(cache.end, end);
}

void Journal::save(const Entry& entry, Part& part) {
  if (part.saved) return;
  if (part.stripe.bytes > 0) entry.backup->copy_stripe_from(*entry.live, part.stripe);
  part.saved = true;
}

void Journal::restore(const Entry& entry, const Part& part) {
  if (part.saved && part.stripe.bytes > 0) entry.live->copy_stripe_from(*entry.backup, part.stripe);
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
