# Finds the public headers of TensorRT and of CUDA, which they include. TensorRT is never linked.
#
# TENSORRT_ROOT, a CMake or environment variable, is the folder that contains include/NvInferRuntime.h. Without it the
# system's folders are searched, which suffices on a Jetson. Sets TITANS_TENSORRT_INCLUDE (empty if not found),
# TITANS_TENSORRT_MAJOR and TITANS_TENSORRT_VERSION.
set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "Folder that holds include/NvInferRuntime.h")
set(TITANS_TENSORRT_LEAST 10.3)

# Searched again at each configuration, because TENSORRT_ROOT may have changed.
if(TENSORRT_ROOT)
  find_path(titans_tensorrt NvInferRuntime.h PATHS ${TENSORRT_ROOT} PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE)
else()
  find_path(titans_tensorrt NvInferRuntime.h NO_CACHE)
endif()
find_path(TITANS_CUDA_INCLUDE cuda_runtime_api.h
  HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES include
  DOC "Folder of cuda_runtime_api.h")

set(TITANS_TENSORRT_INCLUDE)
set(TITANS_TENSORRT_MAJOR)
set(TITANS_TENSORRT_VERSION)
if(NOT titans_tensorrt)
  message(STATUS "Skipping the TensorRT plugin and backend: no NvInferRuntime.h. Pass -DTENSORRT_ROOT=FOLDER, which "
                 "holds include/")
elseif(NOT TITANS_CUDA_INCLUDE)
  message(STATUS "Skipping the TensorRT plugin and backend: no cuda_runtime_api.h. Pass -DTITANS_CUDA_INCLUDE=FOLDER")
else()
  # The macros are numbers up to 10.3 and names of other macros in later versions.
  file(STRINGS ${titans_tensorrt}/NvInferVersion.h titans_lines REGEX "#define [A-Z_]+_(MAJOR|MINOR)")
  foreach(titans_part MAJOR MINOR)
    if(NOT titans_lines MATCHES "#define (NV_TENSORRT|TRT)_${titans_part}(_ENTERPRISE)? ([0-9]+)")
      message(FATAL_ERROR "[cmake] missing package or library: no version of TensorRT in "
                          "${titans_tensorrt}/NvInferVersion.h. Fix: pass -DTENSORRT_ROOT=FOLDER of another SDK "
                          "(TITANS-E1006)")
    endif()
    list(APPEND TITANS_TENSORRT_VERSION ${CMAKE_MATCH_3})
  endforeach()
  list(GET TITANS_TENSORRT_VERSION 0 TITANS_TENSORRT_MAJOR)
  list(JOIN TITANS_TENSORRT_VERSION . TITANS_TENSORRT_VERSION)
  if(TITANS_TENSORRT_VERSION VERSION_LESS TITANS_TENSORRT_LEAST)
    message(STATUS "Skipping the TensorRT plugin and backend: ${titans_tensorrt} is of version "
                   "${TITANS_TENSORRT_VERSION}, older than ${TITANS_TENSORRT_LEAST}")
  else()
    set(TITANS_TENSORRT_INCLUDE ${titans_tensorrt} ${TITANS_CUDA_INCLUDE})
    message(STATUS "TensorRT ${TITANS_TENSORRT_VERSION}'s headers: ${titans_tensorrt}")
  endif()
endif()
