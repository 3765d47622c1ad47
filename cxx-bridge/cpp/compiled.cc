// Taps inside of torch.compile: what is put into a graph while it is traced.
#include "flexmodel/compiled.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "flexmodel/leaves.h"
#include "flexmodel/tap.h"
#include "flexmodel/input_gradients.h"

namespace flexmodel {
namespace {

using Gradient = void(const at::Tensor&, const at::Tensor&, int64_t, int64_t, c10::string_view, c10::string_view,
                      int64_t);
using Factors = at::Tensor(const at::Tensor&, int64_t, c10::string_view);

// Of the number of a hook: what it is for, and what it keeps (`forward_pass` in operations.cc).
constexpr int64_t kNumberWords = 3;
constexpr int64_t kNobody = -1;

// The shim's `edited(tensor, factors)`.
PyObject* editor = nullptr;

// A number that is nobody's.
at::Tensor made_number() {
  const Unseen unseen;
  const c10::InferenceMode ordinary(false);
  at::Tensor number = at::empty({kNumberWords}, at::TensorOptions().dtype(at::kLong).device(at::kCPU));
  std::fill_n(number.mutable_data_ptr<int64_t>(), kNumberWords, kNobody);
  return number;
}

c10::OperatorHandle operation(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// Stands for the graph that is being traced; null where nothing is (a backend that runs what it is given).
using Graph = std::shared_ptr<void>;

Graph graph_under_way() {
  using c10::impl::TorchDispatchModeTLS;
  const auto mode = TorchDispatchModeTLS::get_mode(c10::impl::TorchDispatchModeKey::FUNCTIONAL);
  return mode ? Graph(*mode) : Graph();
}

// A module whose forward is being traced.
struct Open {
  // Held, so that no other graph gets its place in memory.
  Graph graph;
  InputGradients watched;
};

// Innermost last. Those of graphs whose tracing failed stay for a while.
constexpr size_t kMaxOpen = 64;
thread_local std::vector<Open> open;

// The innermost module of the graph under way.
std::vector<Open>::reverse_iterator innermost() {
  const Graph graph = graph_under_way();
  return std::find_if(open.rbegin(), open.rend(), [&](const Open& o) { return o.graph == graph; });
}

// The inputs of the module that now returns; none if it was called in another graph.
InputGradients close() {
  const auto last = innermost();
  if (last == open.rend()) return {};
  InputGradients watched = std::move(last->watched);
  open.erase(std::next(last).base(), open.end());
  return watched;
}

struct Leaves {
  at::Tensor call;
  uint32_t kinds = 0, edits = 0;
  std::vector<std::string> paths;
  std::vector<at::Tensor> tensors;

  Site site(size_t i) const { return Site(call, kinds, edits, static_cast<int64_t>(i)); }
  bool watches(size_t i, uint32_t wanted) const { return ((kinds | edits) & wanted) != 0 && tensors[i].requires_grad(); }
};

bool read(PyObject* sequence, std::vector<std::string>& texts) {
  const Ref list(PySequence_List(sequence));
  for (Py_ssize_t i = 0; list && i < PyList_GET_SIZE(list.get()); ++i) {
    const char* text = PyUnicode_AsUTF8(PyList_GET_ITEM(list.get(), i));
    if (text == nullptr) return false;
    texts.emplace_back(text);
  }
  return static_cast<bool>(list);
}

// (call, kinds, edits, paths, leaves)
bool read(PyObject* args, Leaves& out) {
  PyObject *call = nullptr, *paths = nullptr, *tensors = nullptr;
  if (PyArg_ParseTuple(args, "OIIOO", &call, &out.kinds, &out.edits, &paths, &tensors) == 0) return false;
  const Ref list(PySequence_List(tensors));
  if (!list || !read(paths, out.paths)) return false;
  out.call = THPVariable_Unpack(call);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.get()); ++i) {
    out.tensors.push_back(THPVariable_Unpack(PyList_GET_ITEM(list.get(), i)));
  }
  return out.paths.size() == out.tensors.size();
}

// Whether a tensor is made of others, as a DTensor is, that graphs of the compiler have instead.
bool is_made_of_others(PyObject* tensor) { return PyObject_HasAttrString(tensor, "__tensor_flatten__") != 0; }

// What the graph can have of a leaf.
Part part_at(const Leaves& leaves, size_t i) {
  const auto name = [&] { return leaves.paths[i] + " of a compiled module"; };
  return part_or_refusal(at::empty({0}), [&] { return part_in_graph(leaves.tensors[i]); }, name);
}

void watch_inputs(Leaves& leaves) {
  guarded_operation([&] {
    InputGradients watched;
    for (size_t i = 0; i < leaves.tensors.size(); ++i) {
      if (!leaves.watches(i, KINDS_OF_INPUT_GRADIENTS)) continue;
      const auto is_it = [&](const at::Tensor& earlier) { return earlier.is_same(leaves.tensors[i]); };
      const Part part = part_at(leaves, i);
      const auto here = leaves.tensors.begin() + static_cast<std::ptrdiff_t>(i);
      const bool again = std::any_of(leaves.tensors.begin(), here, is_it);
      if (again || part.refusal == Refusal::Raised) {
        capture(leaves.site(i), KINDS_OF_INPUT_GRADIENTS, leaves.paths[i], 0, part, Refusal::SharedInput);
      } else {
        watched.add(leaves.site(i), leaves.paths[i], leaves.tensors[i], part.axes);
      }
    }
    if (open.size() >= kMaxOpen) open.erase(open.begin());
    open.push_back({graph_under_way(), std::move(watched)});
  });
}

PyObject* py_watch_inputs(PyObject*, PyObject* args) {
  Leaves leaves;
  if (!read(args, leaves)) return nullptr;
  return into_python([&] {
    watch_inputs(leaves);
    Py_RETURN_NONE;
  });
}

// Puts what the module has to return instead of each tensor in its place.
void watch_outputs(Leaves& leaves) {
  guarded_operation([&] {
    InputGradients watched;
    if ((leaves.kinds & KINDS_OF_INPUT_GRADIENTS) != 0) watched = close();
    for (size_t i = 0; i < leaves.tensors.size(); ++i) {
      at::Tensor& tensor = leaves.tensors[i];
      const Part part = part_at(leaves, i);
      at::Tensor now = watched.returned(tensor);
      const Site site = leaves.site(i);
      if (leaves.watches(i, KINDS_OF_OUTPUT_GRADIENTS)) {
        if ((leaves.edits & KINDS_OF_OUTPUT_GRADIENTS) != 0) now = identity(now.defined() ? now : tensor);
        const at::Tensor& out = now.defined() ? now : tensor;
        if (out.is_leaf() || part.refusal == Refusal::Raised) {
          capture(site, KINDS_OF_OUTPUT_GRADIENTS, leaves.paths[i], 0, part, Refusal::Returned);
        } else {
          watch_gradient(site, KINDS_OF_OUTPUT_GRADIENTS, leaves.paths[i], out, part.axes);
        }
      }
      if (now.defined()) tensor = std::move(now);
    }
    watched.hook(leaves.tensors);
  });
}

// A list with what the module has to return instead of each tensor.
PyObject* py_watch_outputs(PyObject*, PyObject* args) {
  Leaves leaves;
  if (!read(args, leaves)) return nullptr;
  return into_python([&] {
    watch_outputs(leaves);
    Ref out(PyList_New(static_cast<Py_ssize_t>(leaves.tensors.size())));
    for (size_t i = 0; out && i < leaves.tensors.size(); ++i) {
      PyList_SET_ITEM(out.get(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(leaves.tensors[i]));
    }
    return out.release();
  });
}

// part(tensor, like): (what a graph can have of a tensor, how it lies, why that cannot be had). `like` is the
// first input of the module that returns the tensor, if it has no parameters; or None.
PyObject* py_part(PyObject*, PyObject* args) {
  PyObject *tensor = nullptr, *like = nullptr;
  if (PyArg_ParseTuple(args, "OO", &tensor, &like) == 0) return nullptr;
  if (!is_tensor(tensor)) return PyErr_Format(PyExc_TypeError, "not a tensor");
  return into_python([&] {
    const Part part = part_in_graph(THPVariable_Unpack(tensor), like == Py_None ? nullptr : like);
    const std::string layout = text_of(part.axes);
    return Py_BuildValue("(NsI)", THPVariable_Wrap(part.local), layout.c_str(), static_cast<unsigned int>(part.refusal));
  });
}

// Whether the module that now returns was called in another graph.
PyObject* py_is_split(PyObject*, PyObject*) { return PyBool_FromLong(innermost() == open.rend() ? 1 : 0); }

PyObject* py_edit_with(PyObject*, PyObject* edit) {
  Py_XINCREF(edit);
  Py_XDECREF(std::exchange(editor, edit));
  Py_RETURN_NONE;
}

PyObject* py_number(PyObject*, PyObject*) {
  return into_python([] { return THPVariable_Wrap(made_number()); });
}

// renumber(number, other): a hook's number becomes what another hook's is, or with None nobody's. Graphs have the tensor,
// and see it changed; modes of the job's see nothing.
PyObject* py_renumber(PyObject*, PyObject* args) {
  PyObject *number = nullptr, *other = nullptr;
  if (PyArg_ParseTuple(args, "OO", &number, &other) == 0) return nullptr;
  if (!is_tensor(number) || (other != Py_None && !is_tensor(other))) return PyErr_Format(PyExc_TypeError, "not a tensor");
  return into_python([&] {
    int64_t* words = THPVariable_Unpack(number).mutable_data_ptr<int64_t>();
    if (other == Py_None) {
      std::fill_n(words, kNumberWords, kNobody);
    } else {
      std::copy_n(THPVariable_Unpack(other).const_data_ptr<int64_t>(), kNumberWords, words);
    }
    Py_RETURN_NONE;
  });
}

PyMethodDef functions[] = {
    {"number", py_number, METH_NOARGS, "A number for a hook, nobody's."},
    {"renumber", py_renumber, METH_VARARGS, "Gives a hook the number of another, or none, also in graphs that have it."},
    {"part", py_part, METH_VARARGS, "While tracing: what a graph can have of a tensor."},
    {"is_split", py_is_split, METH_NOARGS, "While tracing: whether the module that returns was called in another graph."},
    {"edit_with", py_edit_with, METH_O, "Keeps the function that puts an edit of a tensor into the graph."},
    {"watch_inputs", py_watch_inputs, METH_VARARGS, "While tracing: gradients of a module's inputs are wanted."},
    {"watch_outputs", py_watch_outputs, METH_VARARGS, "While tracing: the module returned."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* traced_form(const char* role, int64_t first, int64_t second, uint32_t kinds, uint32_t edits) {
  at::Tensor number = made_number();
  const int64_t words[kNumberWords] = {first, second, 0};
  std::copy(std::begin(words), std::end(words), number.mutable_data_ptr<int64_t>());
  return Py_BuildValue("(sNII)", role, THPVariable_Wrap(std::move(number)), kinds, edits);
}

Part part_in_graph(const at::Tensor& tensor, PyObject* like) {
  const Gil gil;
  Part part = part_of(tensor, true, nullptr, {nullptr, like});
  // What else it says is of stand-ins that the compiler traces with.
  part.refusal = Refusal::None;
  const Ref object(THPVariable_Wrap(part.local));
  TORCH_CHECK(object, "Python has no object for a tensor");
  if (!is_made_of_others(object.get())) return part;
  const Refusal why = refusal_of(part.local, Py_TYPE(object.get())->tp_name);
  part.refusal = why == Refusal::None ? Refusal::Subclass : why;
  part.local = at::empty({0});
  part.axes.clear();
  return part;
}

void capture_in_graph(const Site& site, uint32_t kinds, const std::string& path, const Part& part, Refusal because) {
  static const auto handle = operation("flexmodel::gradient").typed<Gradient>();
  handle.call(site.traced, part.local, site.slot, kinds, path, text_of(part.axes), static_cast<int64_t>(because));
}

at::Tensor edited_in_graph(const Site& site, uint32_t kinds, const std::string& path, const at::Tensor& tensor) {
  static const auto handle = operation("flexmodel::factors").typed<Factors>();
  const at::Tensor by = handle.call(site.traced, kinds, path);
  const Gil gil;
  if (editor == nullptr) return {};
  const Ref original(THPVariable_Wrap(tensor)), factors(THPVariable_Wrap(by));
  const Ref edited(original && factors ? PyObject_CallFunctionObjArgs(editor, original.get(), factors.get(), nullptr) : nullptr);
  if (!edited) throw PyError{};
  TORCH_CHECK(is_tensor(edited.get()), "an edit could not be put into a graph");
  return THPVariable_Unpack(edited.get());
}

bool add_compiled(PyObject* module) {
  return PyModule_AddFunctions(module, functions) == 0 && PyModule_AddIntConstant(module, "call_words", kCallWords) == 0;
}

}  // namespace flexmodel
