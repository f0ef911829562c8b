// Selects the vendor library: TensorRT, or with TITANS_TENSORRT_RTX TensorRT-RTX. TensorRT-RTX 1.7 has the classes of
// TensorRT 11.1 and not those of 10, as tested.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string_view>

namespace titans::core {

#ifdef TITANS_TENSORRT_RTX
static_assert(NV_TENSORRT_MAJOR == 1 || NV_TENSORRT_MAJOR >= 11, "TensorRT-RTX has the classes of TensorRT 11");
inline constexpr std::string_view kVendor = "tensorrt_rtx";
inline constexpr const char* kVendorVariable = "TITANS_TENSORRT_RTX";
inline constexpr std::array<const char*, 2> kVendorLibraries{"libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
inline constexpr std::string_view kVendorFix =
    "run pip install tensorrt-rtx, or set TITANS_TENSORRT_RTX to a libtensorrt_rtx.so.1";
inline constexpr int kVendorMajor = 1;
inline constexpr int kLeastMinor = 7;
inline constexpr bool kTakesPlugins = false;  // its networks reject plugins, although its registry accepts them
#else
static_assert(NV_TENSORRT_MAJOR >= 10, "TensorRT 10.3 is the oldest that is served");
inline constexpr std::string_view kVendor = "tensorrt";
inline constexpr const char* kVendorVariable = "TITANS_TENSORRT";
#if NV_TENSORRT_MAJOR == 10
inline constexpr std::array<const char*, 1> kVendorLibraries{"libnvinfer.so.10"};
inline constexpr std::string_view kVendorFix = "install TensorRT 10, or set TITANS_TENSORRT to a libnvinfer.so.10";
inline constexpr int kLeastMinor = 3;
#else
inline constexpr std::array<const char*, 1> kVendorLibraries{"libnvinfer.so.11"};
inline constexpr std::string_view kVendorFix = "install TensorRT 11, or set TITANS_TENSORRT to a libnvinfer.so.11";
inline constexpr int kLeastMinor = 0;
#endif
// Within a major version, classes only gain functions at their end. A new major version also removes some.
inline constexpr int kVendorMajor = NV_TENSORRT_MAJOR;
inline constexpr bool kTakesPlugins = true;
#endif

}  // namespace titans::core
