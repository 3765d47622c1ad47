// What one leaf, container or gradient costs that raises when it is looked at: itself, and nothing else.
#pragma once

#include "flexmodel/py.h"

#include <string>

namespace flexmodel {

// Keeps the shim's `reason(exception) -> str | None` and `report(name, why)`, see faults.py.
void set_faults(PyObject* reason, PyObject* report);

// In a handler: why what was thrown was. Throws PyError, with Python's exception set, if that is the job's.
std::string why();

// In a handler: as `why`, where nobody takes a Python exception but torch does. Throws its python_error.
std::string why_in_torch();

// Says of something, once, that it cannot be looked at. Takes the GIL.
void report(const std::string& name, const std::string& why);

// Runs `body`, which looks at one of many. Where it throws, says so by `name()`, unless that is empty, and returns false.
// The job's own exceptions go on, as PyError.
template <typename Body, typename Name>
bool attempt(Body body, Name name) {
  try {
    body();
    return true;
  } catch (...) {
    report(name(), why());
  }
  return false;
}

}  // namespace flexmodel
