include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/titansTargets.cmake)
# titans.hpp needs C++17, but a project without C++ rejects C++ compile features.
get_property(titans_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
if(CXX IN_LIST titans_languages)
  set_property(TARGET titans::titans APPEND PROPERTY INTERFACE_COMPILE_FEATURES cxx_std_17)
endif()
unset(titans_languages)
