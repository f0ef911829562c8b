// The one exception type of the runtime, and the one form its texts have.
#pragma once

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

}  // namespace titans::core
