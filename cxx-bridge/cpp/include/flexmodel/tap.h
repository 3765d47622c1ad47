// The callables that the shim registers as hooks.
#pragma once

#include "flexmodel/py.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "flexmodel/ffi.h"

namespace flexmodel {

// Readies the Tap and Scope types; false with a Python error set.
bool ready_types();

// While paused, hooks do nothing.
void pause_taps(bool paused);
bool are_taps_paused();

// From now on the passes of models are told with a digest of what they were given.
void tell_given();

// The digest of what a model is given, if that is wanted. `kept` is that of the model's first input on a device: to look
// at another would make the job wait.
uint32_t digest_of_given(const at::Tensor& first, const char* python_type, const Firing& now, uint32_t& kept);

// Keeps the shim's `take(serial)`, which captures what is due of a model's parameters and raises nothing of ours.
void take_with(PyObject* take);

// Has it do so, if any hook taps parameters: a forward pass of the model begins. Throws PyError.
void take_parameters(uint64_t serial);

// (before, after) hooks of a tap on `kinds` of the module `name`, of which `edits` are edited; `before` is None where the tap
// needs only its output. New reference.
PyObject* make_tap(uint32_t tap, std::string name, uint32_t kinds, uint32_t edits);

// (before, after) hooks that mark the forward of a model (part 0), or of a part of it. New reference.
PyObject* make_scope(uint64_t serial, uint64_t part);

}  // namespace flexmodel
