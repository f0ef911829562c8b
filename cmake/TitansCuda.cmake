# With TITANS_CUDA: finds nvcc, lists the GPU architectures, and defines titans_cuda_compile(TARGET).
if(NOT TITANS_CUDA)
  return()
endif()

if(CMAKE_CROSSCOMPILING)
  # A toolkit has libraries for its own processor only. Its headers fit all processors, but nvcc does not find them.
  set(TITANS_CUDART "" CACHE PATH "Folder of the target's libcudart_static.a, see tools/fetch_aarch64 --cuda")
  if(NOT EXISTS ${TITANS_CUDART}/libcudart_static.a)
    message(FATAL_ERROR "[cmake] missing package or library: libcudart_static.a of the target. Fix: run "
                        "tools/fetch_aarch64 --cuda VERSION, and pass -DTITANS_CUDART=FOLDER (TITANS-E1006)")
  endif()
  set(CUDA_CUDART ${TITANS_CUDART}/libcudart_static.a CACHE FILEPATH "" FORCE)
  set(CUDA_cudart_static_LIBRARY ${CUDA_CUDART} CACHE FILEPATH "" FORCE)
  set(ENV{CUDAFLAGS} "-isystem=${TITANS_CUDA_INCLUDE} -L${TITANS_CUDART} $ENV{CUDAFLAGS}")
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "[cmake] missing package or library: nvcc, which TITANS_CUDA needs. Fix: install a CUDA toolkit and put "
                      "nvcc on PATH, or pass -DCMAKE_CUDA_COMPILER=/path/to/nvcc (TITANS-E1006)")
endif()
# titans_cuda_compile sets the architectures of each target.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit REQUIRED)

# Binary code for each architecture, and PTX that newer GPUs compile at first use. The PTX is for sm_90, because it uses
# clusters. All GPUs since sm_90 have them, and older GPUs have binary code.
set(titans_architectures 80 86 87 89 90a)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND titans_architectures 100 120)
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.9)
  list(APPEND titans_architectures 121)
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  list(APPEND titans_architectures 110)
endif()
set(TITANS_CUDA_ARCHITECTURES "${titans_architectures}" CACHE STRING "Compute capabilities times 10 to compile for")
set(TITANS_CUDA_EXCEPT "" CACHE STRING "Compute capabilities of this list to leave out")
list(REMOVE_ITEM TITANS_CUDA_ARCHITECTURES "" ${TITANS_CUDA_EXCEPT})
option(TITANS_CUDA_PTX "Add PTX for GPUs that are newer than all of these" ON)

# Compiles TARGET for all architectures. The files in ptxas/ report registers, shared memory and spills.
function(titans_cuda_compile target)
  set(options "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v;--threads=2>")
  foreach(architecture ${TITANS_CUDA_ARCHITECTURES})
    list(APPEND options
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_${architecture},code=sm_${architecture}>")
  endforeach()
  if(TITANS_CUDA_PTX)
    list(APPEND options "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_90,code=compute_90>")
  endif()
  if(TITANS_WARNINGS_AS_ERRORS)
    list(APPEND options "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>")
  endif()
  target_compile_options(${target} PRIVATE ${options} "$<$<COMPILE_LANGUAGE:CXX>:${titans_warnings}>")
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER
    "${PROJECT_SOURCE_DIR}/cmake/keep_report;${PROJECT_BINARY_DIR}/ptxas")
endfunction()
