// The part of a distributed tensor that this process holds. The shim describes it, which knows DTensor's own words.
#include "flexmodel/parts.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <sstream>
#include <utility>

#include "flexmodel/leaves.h"

namespace flexmodel {
namespace {

PyObject* describer = nullptr;

// What the shim says of `tensor`, or nothing.
Ref described(const at::Tensor& tensor, Where where) {
  const auto or_none = [](PyObject* object) { return object == nullptr ? Py_None : object; };
  const Ref object = checked(THPVariable_Wrap(tensor));
  Ref answer = checked(
      PyObject_CallFunctionObjArgs(describer, object.get(), or_none(where.module), or_none(where.like), nullptr));
  return answer.get() == Py_None ? Ref() : std::move(answer);
}

// Reads sizes.
bool read(PyObject* sizes, std::vector<uint64_t>& shape) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes); ++i) {
    shape.push_back(PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(sizes, i)));
  }
  return PyErr_Occurred() == nullptr;
}

void read(PyObject* answer, Part& part) {
  PyObject *local = nullptr, *axes = nullptr;
  if (PyArg_ParseTuple(answer, "OO!", &local, &PyList_Type, &axes) == 0) throw PyError{};
  if (!is_tensor(local)) {
    PyErr_SetString(PyExc_TypeError, "the part of a tensor is no tensor");
    throw PyError{};
  }
  part.local = THPVariable_Unpack(local);
  if (!read_axes(axes, part.axes)) throw PyError{};
}

}  // namespace

LeafAxis Axis::borrowed() const {
  LeafAxis axis = lies;
  axis.name = str(name);
  axis.sizes = sizes.data();
  axis.ndim = sizes.size();
  return axis;
}

bool read_axes(PyObject* list, Axes& axes) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const char* name = nullptr;
    PyObject* shape = nullptr;
    Axis axis;
    LeafAxis& lies = axis.lies;
    if (PyArg_ParseTuple(PyList_GET_ITEM(list, i), "sIIbI|O!", &name, &lies.index, &lies.size, &lies.placement, &lies.dim,
                         &PyTuple_Type, &shape) == 0) {
      return false;
    }
    axis.name = name;
    if (shape != nullptr && !read(shape, axis.sizes)) return false;
    axes.push_back(std::move(axis));
  }
  return true;
}

void set_describer(PyObject* describe) {
  Py_XINCREF(describe);
  Py_XDECREF(std::exchange(describer, describe));
}

Part part_of(const at::Tensor& tensor, bool ask, const char* python_type, Where where) {
  Part part;
  part.local = tensor;
  part.refusal = refusal_of(tensor, python_type);
  const bool of_python = tensor.unsafeGetTensorImpl()->is_python_dispatch();
  if (describer == nullptr || !(of_python || (ask && part.refusal == Refusal::None))) return part;
  const Gil gil;
  const Ref answer = described(tensor, where);
  if (!answer) return part;
  read(answer.get(), part);
  part.refusal = refusal_of(part.local, nullptr);
  return part;
}

Part part_of_gradient(const at::Tensor& gradient, const Axes& forward) {
  Part part = part_of(gradient, false);
  lies_as(part, forward);
  return part;
}

void lies_as(Part& part, const Axes& forward) {
  if (!part.axes.empty() || part.refusal != Refusal::None) return;
  // Where the tensor is in pieces, so is its gradient. Where all have the same tensor, each may have its own addend.
  for (const Axis& axis : forward) {
    Axis own = axis;
    uint8_t& placement = own.lies.placement;
    if (placement > 31 || (PLACEMENTS_OF_PIECES >> placement & 1) == 0) placement = code(PlacementCode::Unknown);
    part.axes.push_back(std::move(own));
  }
}

std::string text_of(const Axes& axes) {
  std::ostringstream out;
  for (const auto& [name, sizes, lies] : axes) {
    out << lies.index << ' ' << lies.size << ' ' << static_cast<unsigned int>(lies.placement) << ' ' << lies.dim << ' '
        << name.size() << ' ' << name;
  }
  return out.str();
}

Axes axes_of(const std::string& text) {
  Axes axes;
  std::istringstream in(text);
  Axis axis;
  unsigned int placement = 0;
  for (size_t length = 0; in >> axis.lies.index >> axis.lies.size >> placement >> axis.lies.dim >> length; axis = Axis()) {
    axis.name.resize(std::min(length, text.size()));
    if (!in.ignore(1) || !in.read(axis.name.data(), static_cast<std::streamsize>(axis.name.size()))) break;
    axis.lies.placement = static_cast<uint8_t>(placement);
    axes.push_back(std::move(axis));
  }
  return axes;
}

bool same(const Axes& a, const Axes& b) {
  const auto equal = [](const Axis& x, const Axis& y) {
    return x.name == y.name && x.lies.index == y.lies.index && x.lies.size == y.lies.size &&
           x.lies.placement == y.lies.placement && x.lies.dim == y.lies.dim;
  };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), equal);
}

}  // namespace flexmodel
