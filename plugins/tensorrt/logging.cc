#include "plugins/tensorrt/logging.h"

#include <atomic>
#include <cstdio>

namespace titans::plugins {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  if (finder == nullptr) return nullptr;
  try {
    return finder->findLogger();
  } catch (...) {
    return nullptr;
  }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(const char* message) noexcept {
  if (nvinfer1::ILogger* logger = find_logger()) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
}

}  // namespace titans::plugins
