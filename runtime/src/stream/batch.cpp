#include "stream/batch.h"

#include <algorithm>
#include <numeric>

#include "base/thread_pool.h"

namespace titans::core {
namespace {

void refuse(std::string_view problem, std::string_view fix) {
  throw Error(TITANS_INVALID_ARGUMENT, "E0514", "batch", problem, fix);
}

void check_streams(const Session& session, const std::vector<BatchItem>& items) {
  for (std::size_t index = 0; index < items.size(); ++index) {
    const Stream* stream = items[index].stream;
    if (stream == nullptr) refuse(text("stream ", index, " is NULL"), "pass a stream");
    if (&stream->session() != &session) {
      refuse(text("stream ", index, " belongs to another session"), "make one call per session");
    }
  }
  std::vector<std::size_t> order(items.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto stream_of = [&](std::size_t index) { return items[index].stream; };
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return stream_of(a) != stream_of(b) ? std::less<>()(stream_of(a), stream_of(b)) : a < b;
  });
  const auto twice = std::adjacent_find(order.begin(), order.end(),
                                        [&](std::size_t a, std::size_t b) { return stream_of(a) == stream_of(b); });
  if (twice != order.end()) {
    refuse(text("one stream twice: stream ", *twice, " is also stream ", *(twice + 1)),
           "feed a stream all its tokens at once, or in successive calls");
  }
}

void run_item(const BatchItem& item) {
  const Stream::Use use(*item.stream);
  const bool none = item.tokens == nullptr && item.vectors == nullptr;  // an empty sequence
  if (none ? item.stream->session().manifest().input_kind == InputKind::kVectors : item.vectors != nullptr) {
    item.stream->feed_vectors(item.vectors, item.count, item.which, item.output, item.capacity);
  } else {
    item.stream->feed(item.tokens, item.count, item.which, item.output, item.capacity);
  }
}

}  // namespace

std::vector<Failure> run_batch(Session& session, const std::vector<BatchItem>& items) {
  check_streams(session, items);
  std::vector<Failure> outcomes(items.size());
  if (items.empty()) return outcomes;
  session.batch_threads().run(items.size(), [&](std::size_t index) {
    try {
      run_item(items[index]);
    } catch (...) {
      outcomes[index] = current_failure();
    }
  });
  return outcomes;
}

void require_success(const std::vector<Failure>& outcomes) {
  const auto failed = [](const Failure& outcome) { return outcome.status != TITANS_OK; };
  const auto first = std::find_if(outcomes.begin(), outcomes.end(), failed);
  if (first == outcomes.end()) return;
  const auto count = std::count_if(outcomes.begin(), outcomes.end(), failed);
  throw Error(first->status, "E0513", "batch",
              text(count, " of ", outcomes.size(), " streams failed, stream ", first - outcomes.begin(),
                   " first: ", first->text),
              "check the status of each stream; failed streams are unchanged");
}

}  // namespace titans::core
