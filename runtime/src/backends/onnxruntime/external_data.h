// Checks the external data files of a graph file.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace titans::core {

// Throws an Error, naming `file_name`, if any tensor of the model stores its data in a file outside `files`. ONNX
// Runtime opens the paths in a model, and these may point anywhere.
void check_external_data(std::string_view model, std::string_view file_name,
                         const std::set<std::string, std::less<>>& files);

}  // namespace titans::core
