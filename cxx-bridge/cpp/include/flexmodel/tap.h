// The callables that the shim registers as hooks.
#pragma once

#include "flexmodel/py.h"

#include <cstdint>

namespace flexmodel {

// Readies the Tap and Scope types; false with a Python error set.
bool ready_types();

// While paused, hooks do nothing.
void pause_taps(bool paused);

// From now on the passes of models are told with a digest of what they were given.
void tell_given();

// (before, after) hooks of a tap; `before` is None where the tap needs only its output. New reference.
PyObject* make_tap(uint32_t tap, uint32_t kinds);

// (before, after) hooks that mark the forward of a model (part 0), or of a part of it. New reference.
PyObject* make_scope(uint64_t serial, uint64_t part);

}  // namespace flexmodel
