#include "backends/tensorrt/captures.h"

#include <algorithm>
#include <utility>

namespace titans::core {

cuda::GraphExec* Captures::find(const Key& key, bool& wanted) {
  ++calls_;
  wanted = false;
  const auto recording = recordings_.find(key);
  if (recording != recordings_.end()) {
    recording->second.used = calls_;
    return recording->second.exec.get();
  }
  const auto [seen, first] = seen_.emplace(key, calls_);
  seen->second = calls_;
  wanted = !first && has_room();
  if (seen_.size() > 2 * kMost) {
    const auto oldest =
        std::min_element(seen_.begin(), seen_.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    seen_.erase(oldest);
  }
  return nullptr;
}

bool Captures::has_room() const {
  if (recordings_.size() < kMost) return true;
  return std::any_of(recordings_.begin(), recordings_.end(),
                     [&](const auto& entry) { return entry.second.used + kLongUnused < calls_; });
}

void Captures::add(const Key& key, std::unique_ptr<cuda::GraphExec> recording) {
  if (recordings_.size() >= kMost) {
    const auto oldest = std::min_element(recordings_.begin(), recordings_.end(),
                                         [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
    recordings_.erase(oldest);
  }
  seen_.erase(key);
  recordings_.insert_or_assign(key, Recording{std::move(recording), calls_});
}

}  // namespace titans::core
