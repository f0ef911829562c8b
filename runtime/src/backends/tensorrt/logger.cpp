#include "backends/tensorrt/logger.h"

namespace titans::core {
namespace {

constexpr std::size_t kMostBytes = 2000;  // longest text; the first errors show the cause

thread_local std::string said;

}  // namespace

VendorLogger& VendorLogger::get() {
  static auto& logger = *new VendorLogger;
  return logger;
}

void VendorLogger::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kERROR || message == nullptr) return;
  try {
    if (said.size() > kMostBytes) return;
    if (!said.empty()) said += " | ";
    said += message;
  } catch (...) {
    said.clear();  // out of memory for the text
  }
}

void VendorLogger::clear() noexcept { said.clear(); }

std::string VendorLogger::errors(const std::string& otherwise) { return said.empty() ? otherwise : said; }

}  // namespace titans::core
