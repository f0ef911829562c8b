#include "stream/health.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/log.h"

namespace titans::core {

Health::Health(Session& session) : session_(session), norms_(session) {
  now_.peaks.resize(session.norm_fields().size());
}

Health::~Health() { set_diverging(false); }

void Health::set_diverging(bool diverging) {
  if (diverging == now_.diverging) return;
  now_.diverging = diverging;
  if (diverging) {
    session_.metrics().diverging.add();
  } else {
    session_.metrics().diverging.subtract();
  }
}

void Health::check(const std::vector<Buffer*>& state, std::uint64_t position) {
  norms_.read_all(state);
  observe(norms_.norms(), position);
}

void Health::observe(const std::vector<Norm>& norms, std::uint64_t position) {
  if (norms.empty()) return;
  if (!changed_) before_ = now_;
  changed_ = true;
  ++now_.checks;
  judge(norms, position);
}

void Health::judge(const std::vector<Norm>& norms, std::uint64_t position) {
  const std::vector<NormField>& fields = session_.norm_fields();
  std::size_t found = fields.size();
  double excess = 0;
  for (std::size_t index = 0; index < fields.size(); ++index) {
    const double value = norms[index].value;
    if (!std::isfinite(value)) {
      found = index;
      break;
    }
    now_.peaks[index] = std::max(now_.peaks[index], value);
    if (value <= fields[index].diverging || value / fields[index].diverging <= excess) continue;
    excess = value / fields[index].diverging;
    found = index;
  }
  if (found == fields.size()) return set_diverging(false);
  if (now_.diverging) return;
  set_diverging(true);
  ++now_.divergences;
  session_.metrics().divergences.add();
  now_.position = position;
  now_.field = found;
  now_.norm = norms[found];
  if (now_.logged || !log_wanted(TITANS_LOG_WARNING)) return;
  now_.logged = true;
  log(TITANS_LOG_WARNING, "stream",
      text("the memory diverges at position ", position, ": the norm of ", fields[found].name, ", head ",
           norms[found].head, ", is ", norms[found].value, ", above ", fields[found].diverging));
}

void Health::undo() {
  if (!changed_) return;
  const bool diverging = before_.diverging;
  const bool logged = now_.logged;
  set_diverging(diverging);
  now_ = before_;
  now_.logged = logged;
  changed_ = false;
}

void Health::reset() {
  set_diverging(false);
  now_ = Record{};
  now_.peaks.resize(session_.norm_fields().size());
  changed_ = false;
}

void Health::copy_from(const Health& other) {
  set_diverging(other.now_.diverging);
  now_ = other.now_;
}

titans_health Health::report() const {
  titans_health report{};
  report.state = now_.diverging ? TITANS_DIVERGING : TITANS_HEALTHY;
  report.divergences = now_.divergences;
  report.position = now_.position;
  report.layer = report.head = -1;
  report.checks = now_.checks;
  if (now_.divergences == 0) return report;
  const NormField& field = session_.norm_fields()[now_.field];
  report.field = field.name.c_str();
  report.layer = field.layer;
  report.head = now_.norm.head;
  report.value = static_cast<float>(now_.norm.value);
  report.limit = static_cast<float>(field.diverging);
  return report;
}

}  // namespace titans::core
