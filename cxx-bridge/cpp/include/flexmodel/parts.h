// The part of a distributed tensor that this process holds.
#pragma once

#include "flexmodel/py.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "flexmodel/faults.h"
#include "flexmodel/host.h"
#include "flexmodel/tensor.h"

namespace flexmodel {

// How a tensor lies along one axis. Owns what a LeafAxis borrows.
struct Axis {
  std::string name;
  std::vector<uint64_t> sizes;
  // Without these.
  LeafAxis lies{};

  // As long as this lives and stays where it is.
  LeafAxis borrowed() const;
};

using Axes = std::vector<Axis>;

// A tensor that this process can read, and what torch says about how it lies over the others.
struct Part {
  at::Tensor local;
  // Empty where torch says nothing.
  Axes axes;
  // Why `local` cannot be read.
  Refusal refusal = Refusal::None;
  // A gradient that the optimizer does not use.
  bool skipped = false;
};

// The part that `look` gives. Where that raises, the tensor is reported by `name()` and cannot be read: what is not known
// of how it lies must not pass for nothing to know. `local` stands for it then.
template <typename Look, typename Name>
Part part_or_refusal(const at::Tensor& local, Look look, Name name) {
  Part part;
  if (attempt([&] { part = look(); }, name)) return part;
  Part refused;
  refused.local = local;
  refused.refusal = Refusal::Raised;
  return refused;
}

// Reads a list of (axis, index, size, placement, dimension[, shape, for runs]); false with a Python error set.
bool read_axes(PyObject* list, Axes& axes);

// The module that takes or returns a tensor.
struct Where {
  PyObject* module = nullptr;
  // Its first input, if it returns the tensor.
  PyObject* like = nullptr;
};

// Keeps the shim's `describe(tensor, module, like) -> None | (local tensor, axes)`, which may raise.
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
