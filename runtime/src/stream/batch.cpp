#include "stream/batch.h"

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <utility>

#include "base/thread_pool.h"
#include "stream/feed.h"

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

InputKind kind_of(const BatchItem& item) {
  const bool none = item.tokens == nullptr && item.vectors == nullptr;  // an empty sequence
  if (none) return item.stream->session().manifest().input_kind;
  return item.vectors != nullptr ? InputKind::kVectors : InputKind::kTokens;
}

// The stream must be in use.
void run_item(const BatchItem& item) {
  if (kind_of(item) == InputKind::kVectors) {
    item.stream->feed_vectors(item.vectors, item.count, item.which, item.output, item.capacity);
  } else {
    item.stream->feed(item.tokens, item.count, item.which, item.output, item.capacity);
  }
}

// Feeds streams in rounds. In each round every stream makes its next call; the streams that need the same graph share
// one. A decoding stream waits for at most one call of several tokens per round.
class GroupedBatch {
 public:
  GroupedBatch(Session& session, const std::vector<BatchItem>& items, std::vector<Failure>& outcomes)
      : session_(session), threads_(session.batch_threads()), members_(items.size()) {
    for (std::size_t index = 0; index < items.size(); ++index) {
      members_[index].item = &items[index];
      members_[index].outcome = &outcomes[index];
    }
  }

  void run() {
    try {
      run_rounds();
    } catch (...) {  // out of memory
      const Failure failure = current_failure();
      for (Member& member : members_) {
        if (member.done) continue;
        *member.outcome = failure;
        close(member);
      }
    }
  }

 private:
  struct Member {
    const BatchItem* item = nullptr;
    Failure* outcome = nullptr;
    std::unique_ptr<Stream::Use> use;
    std::unique_ptr<Feed> feed;  // NULL before the stream's turn and once it is over
    Call call{};                 // the prepared call
    bool prepared = false;
    bool shares = false;  // its calls may include other streams
    bool done = false;
    std::size_t waited = 0;  // rounds that the prepared call has waited
  };
  // The members of one graph call.
  using Group = std::vector<Member*>;
  using Members = std::vector<Member>::iterator;

  void run_rounds() {
    const std::size_t most = session_.streams_in_budget();
    std::size_t begin = 0;
    while (begin < members_.size()) {
      const std::size_t count = std::min(most, members_.size() - begin);
      const auto first = members_.begin() + static_cast<std::ptrdiff_t>(begin);
      threads_.run(count, [&](std::size_t index) { open(members_[begin + index]); });
      while (prepare(first, first + static_cast<std::ptrdiff_t>(count))) {
        const std::vector<Group> groups = make_groups();
        threads_.run(groups.size(), [&](std::size_t index) { run_group(groups[index]); });
      }
      begin += count;
    }
  }

  // Runs `step` of a member. Its failure ends the member's part.
  template <typename Step>
  static void attempt(Member& member, Step&& step) {
    try {
      step();
    } catch (...) {
      *member.outcome = current_failure();
      close(member);
    }
  }

  static void close(Member& member) {
    member.feed.reset();
    member.use.reset();
    member.prepared = false;
    member.done = true;
  }

  static void open(Member& member) {
    attempt(member, [&] {
      const BatchItem& item = *member.item;
      member.use = std::make_unique<Stream::Use>(*item.stream);
      member.feed = item.stream->begin(kind_of(item), {item.tokens, item.vectors, item.count}, item.which, item.output,
                                       item.capacity);
      member.shares = item.stream->shares_calls();
    });
    if (member.feed == nullptr) close(member);
  }

  // Collects the prepared calls in ready_. False if all members are done.
  bool prepare(Members first, Members end) {
    ready_.clear();
    for (Members member = first; member != end; ++member) {
      if (member->feed == nullptr) continue;
      if (!member->prepared) {
        member->waited = 0;
        attempt(*member, [&] {
          member->prepared = member->feed->next(member->call);
          if (!member->prepared) close(*member);
        });
      }
      if (member->prepared) ready_.push_back(&*member);
    }
    return !ready_.empty();
  }

  std::size_t tokens_of(const Member& member) const {
    return static_cast<std::size_t>(session_.manifest().graphs[member.call.graph].tokens);
  }

  // The calls of one round, those of several tokens first because they take longest.
  std::vector<Group> make_groups() {
    std::map<std::size_t, Group> decoding;
    Group longer;
    for (Member* member : ready_) {
      if (tokens_of(*member) > 1) {
        longer.push_back(member);
      } else {
        decoding[member->call.graph].push_back(member);
      }
    }
    // Those that wait longest come first.
    std::stable_sort(longer.begin(), longer.end(),
                     [](const Member* a, const Member* b) { return a->waited > b->waited; });
    std::map<std::size_t, Group> chunks;
    for (Member* member : longer) chunks[member->call.graph].push_back(member);
    std::vector<Group> groups;
    if (!decoding.empty() && !longer.empty()) {
      split(one_call(longer.front(), chunks[longer.front()->call.graph]), groups);
      for (Member* member : longer) ++member->waited;
    } else {
      for (const auto& [graph, group] : chunks) split(group, groups);
    }
    for (const auto& [graph, group] : decoding) split(group, groups);
    return groups;
  }

  // As many of `members` as may share one call with `first`, one of them, while decoding streams wait.
  Group one_call(Member* first, const Group& members) const {
    constexpr std::size_t kMostTokens = 512;
    if (!first->shares) return {first};
    const std::size_t most =
        std::clamp<std::size_t>(kMostTokens / tokens_of(*first), 1, session_.most_streams(first->call.graph));
    Group group;
    for (Member* member : members) {
      if (member->shares && group.size() < most) group.push_back(member);
    }
    return group;
  }

  // Divides members that need one graph into calls: as few as their bound allows, and more to occupy the threads.
  void split(const Group& members, std::vector<Group>& groups) const {
    constexpr std::size_t kFewestTokens = 8;  // of a call that a further thread is worth
    Group sharing;
    for (Member* member : members) {
      if (member->shares) {
        sharing.push_back(member);
      } else {
        groups.push_back({member});
      }
    }
    if (sharing.empty()) return;
    const std::size_t count = sharing.size(), most = session_.most_streams(sharing.front()->call.graph);
    const std::size_t fewest = std::max<std::size_t>(1, kFewestTokens / tokens_of(*sharing.front()));
    const std::size_t calls = std::max((count + most - 1) / most, std::min(threads_.threads(), count / fewest));
    const auto at = [&](std::size_t call) {
      return sharing.begin() + static_cast<std::ptrdiff_t>(call * count / calls);
    };
    for (std::size_t call = 0; call < calls; ++call) groups.emplace_back(at(call), at(call + 1));
  }

  void run_group(const Group& group) noexcept {
    try {
      run_together(group);
    } catch (...) {
      const Failure failure = current_failure();
      for (Member* member : group) {
        if (!member->prepared) continue;
        *member->outcome = failure;
        close(*member);
      }
    }
  }

  void run_together(const Group& group) {
    Group ready;
    std::vector<Call> calls;
    for (Member* member : group) {
      attempt(*member, [&] { member->feed->save(); });
      if (member->feed == nullptr) continue;
      ready.push_back(member);
      calls.push_back(member->call);
    }
    if (ready.empty()) return;
    {
      const Session::WorkspaceLease lease(session_);
      std::exception_ptr failure;
      try {
        if (calls.size() == 1) {
          session_.executor().run(calls[0], lease.get());
        } else {
          session_.executor().run_together(calls.data(), calls.size(), lease.get());
        }
      } catch (...) {
        failure = std::current_exception();
      }
      if (failure == nullptr || ready.size() == 1) {
        for (std::size_t index = 0; index < ready.size(); ++index) {
          Member& member = *ready[index];
          member.prepared = false;
          attempt(member, [&] {
            if (failure != nullptr) return member.feed->fail(failure);
            member.feed->finish(OutputRows(lease.get(), index * tokens_of(member)));
          });
        }
        return;
      }
    }
    // One of the streams may be at fault, so each runs alone from its start.
    for (Member* member : ready) {
      attempt(*member, [&] {
        member->feed->withdraw();
        member->feed.reset();
        run_item(*member->item);
      });
      close(*member);
    }
  }

  Session& session_;
  ThreadPool& threads_;
  std::vector<Member> members_;
  std::vector<Member*> ready_;
};

}  // namespace

std::vector<Failure> run_batch(Session& session, const std::vector<BatchItem>& items) {
  check_streams(session, items);
  std::vector<Failure> outcomes(items.size());
  if (items.empty()) return outcomes;
  if (session.groups_batches()) {
    GroupedBatch(session, items, outcomes).run();
    return outcomes;
  }
  session.batch_threads().run(items.size(), [&](std::size_t index) {
    try {
      const Stream::Use use(*items[index].stream);
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
