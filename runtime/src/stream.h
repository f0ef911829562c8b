// One sequence: its state, its position, and the logits after its last token.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "journal.h"
#include "session.h"
#include "titans/titans.h"

namespace titans::core {

// An Error where the bundle's input is of another kind: what is asked for is meant for `kind` alone.
void require_input(const Manifest& manifest, InputKind kind);

class Stream {
 public:
  explicit Stream(std::shared_ptr<Session> session);
  std::unique_ptr<Stream> fork() const;
  void reset();

  // See titans_stream_feed, titans_stream_feed_vectors and titans_stream_score. Any failure leaves the stream as it
  // was.
  void feed(const std::int32_t* tokens, std::size_t count, titans_logits which, float* logits, std::size_t capacity);
  void feed_vectors(const float* vectors, std::size_t count, titans_logits which, float* outputs, std::size_t capacity);
  void score(const std::int32_t* tokens, std::size_t count, float* logprobs);

  bool learning() const { return learning_; }
  void set_learning(bool learning) { learning_ = learning; }
  std::uint64_t position() const { return position_; }
  std::uint64_t state_bytes() const;
  // Logits, or the vector, after the last token. Meaningless before the first.
  const std::vector<float>& last_output() const { return last_output_; }

  void read_memory(std::size_t index, float* values, std::size_t capacity) const;
  const Session& session() const { return *session_; }

 private:
  // A state tensor that swaps has one buffer in each of three sets: where the running feed began, where it stands, and
  // where the next call writes. Begin stays untouched until the feed has succeeded, so a failure costs no copy. One
  // that the engine updates in place has one buffer, in every set, and the journal another.
  static constexpr std::size_t kSets = 3;
  using BufferSet = std::vector<Buffer*>;

  struct Allocate {};  // memory only: reset or fork fills it
  Stream(std::shared_ptr<Session> session, Allocate);

  Buffer* add_buffer(std::size_t state);
  std::size_t free_set(std::size_t a, std::size_t b) const;
  void check_tokens(const std::int32_t* tokens, std::size_t count) const;
  void check_vectors(const float* vectors, std::size_t count) const;

  // Runs `change`, which saves in the journal what it overwrites in place; where it throws, that is put back.
  template <typename Change>
  void transact(Change&& change);
  // What a feed consumes, checked: tokens or vectors, the other NULL.
  struct Sequence {
    const std::int32_t* tokens;
    const float* vectors;
    std::size_t count;
  };
  // Consumes the sequence; after each call of a graph sink(first token, how many, workspace).
  template <typename Sink>
  void advance(const Sequence& sequence, Sink&& sink);
  // That `capacity` floats at `output` have room for what `which` asks for.
  void check_room(std::size_t count, titans_logits which, const float* output, std::size_t capacity) const;
  void feed(const Sequence& sequence, titans_logits which, float* output);

  std::shared_ptr<Session> session_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::array<BufferSet, kSets> sets_;
  Journal journal_;
  std::uint64_t state_bytes_ = 0;
  std::size_t current_ = 0;  // the set that holds the state
  std::uint64_t position_ = 0;
  bool learning_ = true;
  std::vector<float> last_output_;
};

}  // namespace titans::core
