// Errors go where TensorRT's own messages go: to the logger that the plugin registry hands to the library.
#pragma once

#include <string>

#include <NvInferRuntime.h>

namespace titans::plugins {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To standard error where there is no logger.
void log_error(const char* message) noexcept;

// "[NeuralMemory] expected X but got Y; do Z".
std::string wrong(const std::string& expected, const std::string& got, const std::string& advice);

}  // namespace titans::plugins
