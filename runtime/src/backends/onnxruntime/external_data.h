// The files that a graph file sends its reader to.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace titans::core {

// Throws an Error that names `file_name` where a tensor of the model, wherever it stands, has its data in a file that
// is none of `files`. ONNX Runtime opens what it is told there: a path, which may lead anywhere.
void check_external_data(std::string_view model, std::string_view file_name,
                         const std::set<std::string, std::less<>>& files);

}  // namespace titans::core
