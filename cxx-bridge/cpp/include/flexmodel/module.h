// The Python module that the shim gets.
#pragma once

#include <cstddef>

namespace flexmodel {

// See ffi.rs. Needs the GIL.
size_t python_module();

}  // namespace flexmodel
