// The callables that the shim registers as hooks.
#pragma once

#include "flexmodel/py.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "flexmodel/wire.h"

namespace flexmodel {

// Readies the type of hooks; false with a Python error set.
bool ready_types();

// Keeps the shim's `undo() -> bool`, which takes out of torch what is ours once taps are off, and says whether it has.
void undo_with(PyObject* function);

// Has it do so: taps are off, and one of them would have been triggered. Throws PyError.
void undo();

// While paused, hooks do nothing.
void pause_taps(bool paused);
bool are_taps_paused();

// From now on a pass of a model is reported with a digest of its input.
void digest_inputs();

// The digest of a model's input, if that is wanted. `first_digest` is that of its first input on a device: to look at
// another one would make the job wait.
uint32_t input_digest(const at::Tensor& first, const char* python_type, const Trigger& now, uint32_t& first_digest);

// Keeps the shim's `capture(serial)`, which captures what is due of a model's parameters and raises nothing of ours.
void capture_parameters_with(PyObject* function);

// Has it do so, if any hook taps parameters: a forward pass of the model begins. Throws PyError.
void capture_parameters(uint64_t serial);

// Keeps the shim's `now(serial)`: whether a model is called through a wrapper that reduces gradients, and how many
// collectives the members of each of its axes have called.
void count_collectives_with(PyObject* function);

// Notes what it says. Throws PyError.
void count_collectives(uint64_t serial, Trigger& now);

// Keeps the shim's `turn()`: other hooks may begin with the next pass.
void turn_with(PyObject* function);

// Calls it, if that is so. Throws PyError.
void turn_if_due();

// (before, after) hooks of the tap that the engine selected on the module `name`; `before` is None where it needs only the
// module's output. New reference.
PyObject* make_tap(const Selected& selected, std::string name);

// (before, after) hooks that mark the forward of a model (part 0), or of a part of it. New reference.
PyObject* make_pass_hooks(uint64_t serial, uint64_t part);

}  // namespace flexmodel
