// By how much the job scales its losses, and so its gradients: known when a gradient needs it, and not waited for before.
#pragma once

#include "flexmodel/py.h"

namespace flexmodel {

// A gradient is about to be captured: the engine has to know by how much it is scaled. Waits for what a device has yet to
// say.
void tell_loss_scale();

// A backward pass ended. The scale of its loss is kept for what it left, until the next one ends.
void backward_scale_ended();

// Adds what the shim needs of this to its module; false with a Python error set.
bool add_loss_scale(PyObject* module);

}  // namespace flexmodel
