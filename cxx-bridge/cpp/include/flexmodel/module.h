// The Python module that the shim gets.
#pragma once

#include <cstddef>

#include "flexmodel/host.h"

namespace flexmodel {

// See ffi.rs. Needs the GIL.
size_t python_module();

}  // namespace flexmodel
