// The checks of a graph file before ONNX Runtime reads it.
#pragma once

#include <string_view>

namespace titans::core {

// Throws an Error, naming `file_name`, unless every parser of protocol buffers reads the model alike: known fields of
// their own type, in ascending order, singular ones once, in the shortest form; texts in UTF-8; external data with each
// key once. Messages that this project does not write are refused: training, sparse tensors, sequences and others.
void check_encoding(std::string_view model, std::string_view file_name);

// Throws an Error unless the graph has only operators that this project writes, by domain, name and version, in
// subgraphs and functions too. `compiled`: the graph of an engine, in which ONNX Runtime has fused operators.
void check_operators(std::string_view model, std::string_view file_name, bool compiled);

}  // namespace titans::core
