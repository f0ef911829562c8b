// The form of the operators' errors: "[where] problem: detail. Fix: what to do (TITANS-E0701)". docs/errors.md lists
// the codes.
#pragma once

#include <string>

namespace titans::kernels {

// `where`: the operator's name. The problem does not end with a period; the fix is an imperative.
inline std::string failure(const char* where, const char* code, const std::string& problem, const std::string& fix) {
  return std::string("[") + where + "] " + problem + ". Fix: " + fix + " (TITANS-" + code + ")";
}

inline constexpr const char* kExportAgain = "export the model again";

}  // namespace titans::kernels
