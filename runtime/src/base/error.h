// The one exception type of the runtime, and the one form its texts have.
#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "titans/titans.h"

// Apart from titans::, where titans.hpp puts what an application sees.
namespace titans::core {

// Concatenates anything that can be streamed.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Folds every run of white space and control characters into one space: error texts are one line.
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
  return line;
}

// "[where] expected X but got Y; do Z".
class Error : public std::runtime_error {
 public:
  Error(titans_status status, std::string_view where, std::string_view expected, std::string_view got,
        std::string_view advice)
      : std::runtime_error(one_line(
            text("[", where, "] expected ", expected, " but got ", got.empty() ? "nothing" : got, "; do ", advice))),
        status_(status),
        got_(one_line(got)) {}

  titans_status status() const noexcept { return status_; }
  // Part of the text, for one that says more.
  const std::string& got() const noexcept { return got_; }

 private:
  titans_status status_;
  std::string got_;
};

// What a call that failed tells its caller.
struct Failure {
  titans_status status = TITANS_OK;
  std::string text;
};

// Of the exception that is being handled. Where there is no memory for the text, the status still tells.
inline Failure current_failure() noexcept {
  Failure failure{TITANS_FAILED, {}};
  try {
    try {
      throw;
    } catch (const Error& error) {
      failure.status = error.status();
      failure.text = error.what();
    } catch (const std::bad_alloc&) {
      failure.text = "[titans] expected memory but got none; do free some, or open fewer streams";
    } catch (const std::exception& error) {
      failure.text = one_line(error.what());
    } catch (...) {
      failure.text = "[titans] expected no such failure but got one of unknown kind; do report it";
    }
  } catch (...) {
    failure.text.clear();
  }
  return failure;
}

}  // namespace titans::core
