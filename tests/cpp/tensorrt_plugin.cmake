# The TensorRT plugin and a host that acts as TensorRT. Needs TensorRT's headers.
add_library(titans_plugin_host OBJECT tensorrt_plugin_fields.cpp tensorrt_plugin_host.cpp)
target_include_directories(titans_plugin_host PUBLIC ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
target_include_directories(titans_plugin_host SYSTEM PUBLIC ${TITANS_TENSORRT_INCLUDE})
target_link_libraries(titans_plugin_host PUBLIC ${CMAKE_DL_LIBS})
titans_compile(titans_plugin_host)

if(TARGET titans_kernels)
  # The plugin with a host-memory kernel in place of the CUDA kernel.
  add_library(titans_plugin_double MODULE tensorrt_plugin_double.cpp)
  target_link_libraries(titans_plugin_double PRIVATE titans_tensorrt_adapter titans_contract titans_kernels)
  target_link_options(titans_plugin_double PRIVATE
    LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/tensorrt_plugin_double.map)
  titans_compile(titans_plugin_double)

  add_executable(titans_plugin_tests tensorrt_plugin_run_test.cpp tensorrt_plugin_test.cpp)
  target_compile_definitions(titans_plugin_tests PRIVATE
    TITANS_PLUGIN_DOUBLE="$<TARGET_FILE:titans_plugin_double>")
  target_link_libraries(titans_plugin_tests PRIVATE titans_plugin_host titans_contract titans_kernels GTest::gtest_main)
  add_dependencies(titans_plugin_tests titans_plugin_double)
  titans_compile(titans_plugin_tests)
  gtest_discover_tests(titans_plugin_tests)
endif()

# The plugin with the real CUDA kernel on emulated threads: see tests/cuda_emulation.
find_package(Boost QUIET COMPONENTS context)
if(TARGET Boost::context)
  set(titans_emulation ${PROJECT_SOURCE_DIR}/tests/cuda_emulation)
  set(titans_kernel_folder ${PROJECT_SOURCE_DIR}/plugins/kernels)
  add_library(titans_plugin_emulated MODULE EXCLUDE_FROM_ALL
    tensorrt_plugin_emulated.cpp
    ${titans_kernel_folder}/cuda_plan.cc
    ${titans_kernel_folder}/neural_memory_cuda.cu
    ${titans_emulation}/cuda_emulation.cpp)
  set_source_files_properties(${titans_kernel_folder}/neural_memory_cuda.cu PROPERTIES LANGUAGE CXX
    COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  target_include_directories(titans_plugin_emulated PRIVATE ${titans_emulation})
  target_link_libraries(titans_plugin_emulated PRIVATE titans_tensorrt_adapter titans_contract Boost::context)
  target_link_options(titans_plugin_emulated PRIVATE
    LINKER:--version-script=${PROJECT_SOURCE_DIR}/plugins/tensorrt/plugin.map)
  titans_compile(titans_plugin_emulated)
else()
  message(STATUS "Skipping the TensorRT plugin with the emulated kernel: no Boost.Context")
endif()

# The host for cases from files: on a GPU for tools/gpu_check, in host memory to test the program itself.
function(titans_plugin_host_program name)
  add_executable(${name} EXCLUDE_FROM_ALL tensorrt_plugin_main.cpp ${ARGN})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
  target_link_libraries(${name} PRIVATE titans_plugin_host titans_case_file titans_contract)
  titans_compile(${name})
endfunction()

titans_plugin_host_program(tensorrt_plugin_host_cpu tensorrt_plugin_host_memory.cpp)
target_compile_definitions(tensorrt_plugin_host_cpu PRIVATE TITANS_HOST_MEMORY)
find_package(CUDAToolkit QUIET)
if(TARGET CUDA::cudart_static)
  titans_plugin_host_program(tensorrt_plugin_host ${PROJECT_SOURCE_DIR}/plugins/tools/device_memory_cuda.cpp)
  target_link_libraries(tensorrt_plugin_host PRIVATE CUDA::cudart_static)
else()
  message(STATUS "Skipping tensorrt_plugin_host: no CUDA toolkit")
endif()
