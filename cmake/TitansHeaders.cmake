# Finds third-party headers in .deps (see tools/fetch_deps) or on the system.
#
# titans_find_header(VARIABLE FILE [SUFFIXES ...]) sets the cache variable to the folder that holds FILE, or to
# VARIABLE-NOTFOUND.
set(TITANS_DEPS ${PROJECT_SOURCE_DIR}/.deps CACHE PATH "Where tools/fetch_deps has put headers")

function(titans_find_header variable file)
  find_path(${variable} ${file} HINTS ${TITANS_DEPS}/usr/include PATH_SUFFIXES ${ARGN} DOC "Folder of ${file}")
endfunction()

function(titans_require variable what)
  if(NOT ${variable})
    message(FATAL_ERROR "[cmake] missing package or library: ${what}. Fix: run tools/fetch_deps, or pass "
                        "-D${variable}=FOLDER (TITANS-E1006)")
  endif()
endfunction()

titans_find_header(TITANS_JSON_INCLUDE nlohmann/json.hpp)
titans_require(TITANS_JSON_INCLUDE "nlohmann/json.hpp")
titans_find_header(TITANS_XXHASH_INCLUDE xxhash.h)
titans_require(TITANS_XXHASH_INCLUDE "xxhash.h")

titans_find_header(TITANS_ONNXRUNTIME_INCLUDE onnxruntime_c_api.h onnxruntime onnxruntime/core/session)
if(NOT TITANS_ONNXRUNTIME_INCLUDE)
  if(TITANS_REQUIRE_ONNXRUNTIME)
    titans_require(TITANS_ONNXRUNTIME_INCLUDE "onnxruntime_c_api.h")
  endif()
  message(STATUS "Skipping the ONNX Runtime backend: no onnxruntime_c_api.h. Run tools/fetch_deps, or pass "
                 "-DTITANS_ONNXRUNTIME_INCLUDE=FOLDER")
endif()

if(TITANS_BUILD_TESTS)
  find_path(TITANS_GOOGLETEST_SOURCE googletest/CMakeLists.txt HINTS ${TITANS_DEPS}/usr/src/googletest
            PATHS /usr/src/googletest DOC "Source folder of GoogleTest")
  titans_require(TITANS_GOOGLETEST_SOURCE "the sources of GoogleTest")
endif()
