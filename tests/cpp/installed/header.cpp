#include "titans/titans.hpp"

static_assert(__cplusplus >= 201703L, "the package asks for C++17");
