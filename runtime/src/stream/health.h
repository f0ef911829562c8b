// Whether a stream's memory diverges: norms of the memory against those that calibration saw (docs/guard.md).
//
// Without a guard the check runs after graphs that complete a chunk, once in Session::check_interval tokens, so that it
// costs less than 1 % of the stream's time.
#pragma once

#include <cstdint>
#include <vector>

#include "stream/norms.h"
#include "titans/titans.h"

namespace titans::core {

class Health {
 public:
  explicit Health(Session& session);
  ~Health();
  Health(const Health&) = delete;
  Health& operator=(const Health&) = delete;

  // True if the check is due after a call of `tokens` tokens at `position`.
  bool due(std::uint64_t position, std::uint64_t tokens) const {
    return !norms_.norms().empty() &&
           (position + tokens) / session_.check_interval() > position / session_.check_interval();
  }
  // Checks the state at `position`.
  void check(const std::vector<Buffer*>& state, std::uint64_t position);
  // Takes over norms that a guard has measured.
  void observe(const std::vector<Norm>& norms, std::uint64_t position);

  // Calls begin() and, if they fail, undo().
  void begin() { changed_ = false; }
  void undo();
  // For a stream that is reset.
  void reset();
  void copy_from(const Health& other);

  titans_health report() const;
  // The largest norms seen, one per field of Session::norm_fields.
  const std::vector<double>& peaks() const { return now_.peaks; }

 private:
  struct Record {
    bool diverging = false;
    bool logged = false;
    std::uint64_t divergences = 0;
    std::uint64_t position = 0;
    std::uint64_t checks = 0;
    std::size_t field = 0;
    Norm norm;
    std::vector<double> peaks;
  };
  void set_diverging(bool diverging);
  void judge(const std::vector<Norm>& norms, std::uint64_t position);

  Session& session_;
  NormReader norms_;
  Record now_, before_;  // before_: at the call's start, if changed_
  bool changed_ = false;
};

}  // namespace titans::core
