# Cross-compiles for aarch64 Linux with Debian's toolchain (g++-aarch64-linux-gnu); programs run under qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
# Prefers the qemu from tools/fetch_aarch64, because the system's may be too old for ONNX Runtime. Emulating neoverse-n1
# is many times faster than qemu's default CPU.
find_program(TITANS_QEMU qemu-aarch64 HINTS ${CMAKE_CURRENT_LIST_DIR}/../.deps/aarch64/usr/bin DOC "Emulator of aarch64")
if(TITANS_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${TITANS_QEMU};-cpu;neoverse-n1;-L;/usr/aarch64-linux-gnu)
endif()
