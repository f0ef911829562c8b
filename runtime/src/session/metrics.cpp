#include "session/metrics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <locale>
#include <nlohmann/json.hpp>
#include <sstream>

namespace titans::core {
namespace {

// Prometheus buckets: powers of four, 1 us to 69 s. Each bucket is a series on the server, so finer ones would be
// costly.
constexpr unsigned kFirstExponent = 10, kLastExponent = 36, kExponentStep = 2;

std::string escape_label(std::string_view value) {
  using nlohmann::json;
  // The name of a folder may not be UTF-8, but the format must be.
  const std::string utf8 =
      json::parse(json(value).dump(-1, ' ', false, json::error_handler_t::replace)).get<std::string>();
  std::string escaped;
  for (const char character : utf8) {
    if (character == '\\' || character == '"') escaped += '\\';
    escaped += character == '\n' ? "\\n" : std::string(1, character);
  }
  return escaped;
}

class Exposition {
 public:
  explicit Exposition(std::string_view bundle) : label_("bundle=\"" + escape_label(bundle) + "\"") {
    out_.imbue(std::locale::classic());
    out_.precision(17);
  }

  void head(std::string_view name, std::string_view kind, std::string_view help) {
    out_ << "# HELP " << name << ' ' << help << "\n# TYPE " << name << ' ' << kind << '\n';
  }
  template <typename Value>
  void sample(std::string_view name, Value value, std::string_view labels = {}) {
    out_ << name << '{' << label_ << labels << "} " << value << '\n';
  }
  void counter(std::string_view name, const Counter& counter, std::string_view help) {
    head(name, "counter", help);
    sample(name, counter.value());
  }
  void gauge(std::string_view name, const Counter& counter, std::string_view help) {
    head(name, "gauge", help);
    sample(name, counter.value());
  }
  void histogram(std::string_view kind, const DurationHistogram& durations) {
    const std::string label = ",kind=\"" + std::string(kind) + "\"";
    for (unsigned exponent = kFirstExponent; exponent <= kLastExponent; exponent += kExponentStep) {
      std::ostringstream bound;
      bound.imbue(std::locale::classic());
      bound << std::ldexp(1e-9, static_cast<int>(exponent));
      sample("titans_call_seconds_bucket", durations.below(exponent), label + ",le=\"" + bound.str() + "\"");
    }
    // Read once, because calls end concurrently.
    const std::uint64_t count = durations.count();
    sample("titans_call_seconds_bucket", count, label + ",le=\"+Inf\"");
    sample("titans_call_seconds_sum", durations.sum(), label);
    sample("titans_call_seconds_count", count, label);
  }
  std::string text() const { return out_.str(); }

 private:
  std::string label_;
  std::ostringstream out_;
};

}  // namespace

std::size_t DurationHistogram::bucket_of(std::uint64_t nanoseconds) noexcept {
  if (nanoseconds < 8) return static_cast<std::size_t>(nanoseconds);
  const auto exponent = static_cast<unsigned>(63 - __builtin_clzll(nanoseconds));
  return (exponent - 2) * 8 + static_cast<std::size_t>((nanoseconds >> (exponent - 3)) & 7U);
}

std::uint64_t DurationHistogram::first_of(std::size_t bucket) noexcept {
  if (bucket < 8) return bucket;
  return (8 + bucket % 8) << (bucket / 8 - 1);
}

void DurationHistogram::add(std::uint64_t nanoseconds) noexcept {
  buckets_[bucket_of(nanoseconds)].fetch_add(1, std::memory_order_relaxed);
  sum_.add(nanoseconds);
  std::uint64_t longest = longest_.load(std::memory_order_relaxed);
  while (nanoseconds > longest && !longest_.compare_exchange_weak(longest, nanoseconds, std::memory_order_relaxed)) {
  }
}

std::uint64_t DurationHistogram::count() const {
  std::uint64_t count = 0;
  for (const auto& bucket : buckets_) count += bucket.load(std::memory_order_relaxed);
  return count;
}

std::uint64_t DurationHistogram::below(unsigned exponent) const {
  std::uint64_t count = 0;
  for (std::size_t bucket = 0; bucket < (exponent - 2) * 8; ++bucket) {
    count += buckets_[bucket].load(std::memory_order_relaxed);
  }
  return count;
}

double DurationHistogram::quantile(double quantile) const {
  std::array<std::uint64_t, kBuckets> counts{};
  std::uint64_t total = 0;
  for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
    counts[bucket] = buckets_[bucket].load(std::memory_order_relaxed);
    total += counts[bucket];
  }
  if (total == 0) return 0;
  const auto wanted =
      std::max<std::uint64_t>(1, static_cast<std::uint64_t>(std::ceil(quantile * static_cast<double>(total))));
  std::size_t bucket = 0;
  for (std::uint64_t seen = counts[0]; seen < wanted && bucket + 1 < kBuckets; seen += counts[bucket]) ++bucket;
  // The middle of the bucket, limited to the longest measured duration.
  const auto first = static_cast<double>(first_of(bucket));
  const double width = bucket < 8 ? 1.0 : std::ldexp(1.0, static_cast<int>(bucket / 8) - 1);
  return std::min((first + width / 2) * 1e-9, longest());
}

void Metrics::read(titans_metrics* into) const {
  titans_metrics all{};
  all.struct_size = into->struct_size;
  all.streams = streams.value();
  all.tokens = tokens.value();
  all.chunk_updates = chunk_updates.value();
  all.rollbacks = rollbacks.value();
  all.cancelled = cancelled.value();
  all.failed = failed.value();
  all.spilled = spilled.value();
  all.restored = restored.value();
  all.state_bytes = state_bytes.value();
  all.resident_bytes = resident_bytes.value();
  all.diverging = diverging.value();
  all.divergences = divergences.value();
  all.repairs = repairs.value();
  const auto durations = [](const DurationHistogram& from) {
    return titans_durations{from.count(),       from.sum(),          from.quantile(0.5),
                            from.quantile(0.9), from.quantile(0.99), from.longest()};
  };
  all.step = durations(steps);
  all.feed = durations(feeds);
  all.calls = all.step.count + all.feed.count + all.cancelled + all.failed;
  std::memcpy(into, &all, std::min(into->struct_size, sizeof(all)));
}

std::string Metrics::text(std::string_view bundle) const {
  Exposition out(bundle);
  out.gauge("titans_streams", streams, "Streams that are open.");
  out.gauge("titans_diverging_streams", diverging, "Open streams whose memory diverges.");
  out.gauge("titans_state_bytes", state_bytes, "State of all open streams, in memory or spilled.");
  out.gauge("titans_resident_bytes", resident_bytes, "State of open streams that is in memory.");
  out.counter("titans_tokens_total", tokens, "Tokens or vectors consumed by calls that succeeded.");
  out.counter("titans_chunk_updates_total", chunk_updates, "Chunks completed, of each memory.");
  out.counter("titans_rollbacks_total", rollbacks, "Chunks that a guard took back.");
  out.counter("titans_divergences_total", divergences, "Times that a stream's memory began to diverge.");
  out.counter("titans_repairs_total", repairs, "Times that a guard set a memory back.");
  out.counter("titans_calls_cancelled_total", cancelled, "Calls that were cancelled.");
  out.counter("titans_calls_failed_total", failed, "Calls that failed after they began to work.");
  out.counter("titans_spilled_total", spilled, "Streams written to files to save memory.");
  out.counter("titans_restored_total", restored, "Streams read back from such files.");
  out.head("titans_call_seconds", "histogram", "Calls that succeeded, of one token (step) and of more (feed).");
  out.histogram("step", steps);
  out.histogram("feed", feeds);
  return out.text();
}

}  // namespace titans::core
