// Errors go where TensorRT's own messages go: to the logger that the plugin registry hands to the library.
#pragma once

#include <NvInferRuntime.h>

namespace titans::plugins {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To standard error if there is no logger.
void log_error(const char* message) noexcept;

}  // namespace titans::plugins
