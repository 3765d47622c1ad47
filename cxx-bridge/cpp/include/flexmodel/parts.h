// What this process holds of a tensor that lies over several.
#pragma once

#include "flexmodel/py.h"

#include <ATen/core/Tensor.h>

#include <string>

#include "flexmodel/ffi.h"
#include "flexmodel/tensor.h"

namespace flexmodel {

using Axes = rust::Vec<LeafAxis>;

// A tensor that this process can read, and what torch says about how it lies over the others.
struct Part {
  at::Tensor local;
  // Empty where torch says nothing.
  Axes axes;
  // Why `local` cannot be read.
  Refusal refusal = Refusal::None;
};

// Reads a list of (axis, index, size, placement, dimension[, shape, for runs]); false with a Python error set.
bool read_axes(PyObject* list, Axes& axes);

// The module that is given a tensor, or gives it.
struct Where {
  PyObject* module = nullptr;
  // What it was given first, if `tensor` is what it gives.
  PyObject* like = nullptr;
};

// Keeps the shim's `describe(tensor, module, like) -> None | (local tensor, axes)`.
void set_describer(PyObject* describe);

// The part of `tensor`. The shim is asked about a DTensor, and with `ask` about any tensor. `python_type` is the name of
// its Python class, if that is known. Throws PyError.
Part part_of(const at::Tensor& tensor, bool ask, const char* python_type = nullptr, Where where = {});

// The part of a gradient, whose tensor lay as `forward` says. Takes the GIL if it needs it.
Part part_of_gradient(const at::Tensor& gradient, const Axes& forward);

// Has the part of a gradient lie as its tensor did, if nothing else is known and that says it of a gradient, too.
void lies_as(Part& part, const Axes& forward);

// Axes, none of them of runs, as a text that a graph can have in it; and back.
std::string text_of(const Axes& axes);
Axes axes_of(const std::string& text);

// Whether both lie in the same way.
bool same(const Axes& a, const Axes& b);

}  // namespace flexmodel
