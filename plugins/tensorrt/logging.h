// Logs errors to the logger that the plugin registry passes to the library, like TensorRT's own messages.
#pragma once

#include <NvInferRuntime.h>

namespace titans::plugins {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Writes to standard error if there is no logger.
void log_error(const char* message) noexcept;

}  // namespace titans::plugins
