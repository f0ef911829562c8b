// The exception type of the runtime and the format of its texts.
#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "base/names.h"
#include "titans/titans.h"

// Not in titans::, the namespace of titans.hpp.
namespace titans::core {

inline constexpr std::string_view kReport = "report this message";

// Concatenates anything that can be streamed.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Collapses each run of white space and control characters into one space, and escapes other hidden characters: error
// texts are one line.
inline std::string one_line(std::string_view raw) {
  std::string line;
  for (const char character : raw) {
    const auto code = static_cast<unsigned char>(character);
    if (code > ' ' && code != 0x7f) {
      line += character;
    } else if (!line.empty() && line.back() != ' ') {
      line += ' ';
    }
  }
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return shown(line);
}

// A value in an error text: an empty one stays visible.
inline std::string quoted(std::string_view value) { return text('"', value, '"'); }

// A problem on one line without a final period; system and vendor messages may end with one.
inline std::string problem_text(std::string_view raw) {
  std::string line = one_line(raw);
  while (!line.empty() && (line.back() == '.' || line.back() == ' ')) line.pop_back();
  return line;
}

// "[where] problem. Fix: fix (TITANS-E0204)". docs/errors.md lists the codes; a test compares it with the literals.
class Error : public std::runtime_error {
 public:
  Error(titans_status status, std::string_view code, std::string_view where, std::string_view problem,
        std::string_view fix)
      : std::runtime_error(
            one_line(text("[", where, "] ", problem_text(problem), ". Fix: ", fix, " (TITANS-", code, ")"))),
        status_(status),
        code_(text("TITANS-", code)),
        problem_(problem_text(problem)) {}

  titans_status status() const noexcept { return status_; }
  const std::string& code() const noexcept { return code_; }  // "TITANS-E0204"
  // The problem alone, for an error that contains it.
  const std::string& problem() const noexcept { return problem_; }

 private:
  titans_status status_;
  std::string code_;
  std::string problem_;
};

// The outcome of a call for its caller.
struct Failure {
  titans_status status = TITANS_OK;
  std::string text;
  std::string code;
};

// Describes the current exception. If memory for the text runs out, only the status is set.
inline Failure current_failure() noexcept {
  Failure failure{TITANS_FAILED, {}, {}};
  try {
    try {
      throw;
    } catch (const Error& error) {
      failure.status = error.status();
      failure.code = error.code();
      failure.text = error.what();
    } catch (const std::bad_alloc&) {
      failure.code = "TITANS-E1002";
      failure.text = "[titans] out of memory. Fix: free memory or open fewer streams (TITANS-E1002)";
    } catch (const std::exception& error) {
      const Error internal(TITANS_FAILED, "E1003", "titans", text("internal error: ", error.what()), kReport);
      failure.code = internal.code();
      failure.text = internal.what();
    } catch (...) {
      const Error internal(TITANS_FAILED, "E1003", "titans", "internal error: unknown exception", kReport);
      failure.code = internal.code();
      failure.text = internal.what();
    }
  } catch (...) {
    failure.text.clear();
  }
  return failure;
}

}  // namespace titans::core
