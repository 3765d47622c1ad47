// The callables that the shim registers as hooks. Each is a vectorcall object: firing one runs no Python.
#include "flexmodel/tap.h"

#include <ATen/TracerMode.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "flexmodel/ffi.h"
#include "flexmodel/gradients.h"
#include "flexmodel/leaves.h"
#include "flexmodel/tensor.h"

namespace flexmodel {
namespace {

constexpr uint32_t kBefore = bit(kForwardPre) | bit(kBackward);
// Most calls of one module under way: more are left of forwards that raised.
constexpr size_t kMaxUndo = 64;

// What the two hooks of a tap share. Guarded by the GIL.
struct Shared {
  uint32_t tap;
  uint32_t kinds;
  // One for each call under way.
  std::vector<Undo> undo;
};

struct Hook {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  std::shared_ptr<Shared>* shared;
  uint64_t serial;
};

PyObject* none() { Py_RETURN_NONE; }

bool training(PyObject* module) {
  static PyObject* const name = PyUnicode_InternFromString("training");
  Ref value(PyObject_GetAttr(module, name));
  if (!value) PyErr_Clear();
  return value.get() == Py_True;
}

// `inputs` are the arguments and keyword arguments of the module.
Firing firing(PyObject* module, PyObject* args, PyObject* kwargs, bool pre) {
  Firing f{};
  f.pre = pre;
  f.replay = torch::autograd::get_current_graph_task_id() != -1;
  f.grad_enabled = c10::GradMode::is_enabled();
  f.train = training(module);
  f.batch = {-1, -1};
  PyObject* first = args == nullptr ? nullptr : first_tensor(args);
  if (first == nullptr && kwargs != nullptr) first = first_tensor(kwargs);
  if (first != nullptr) {
    const at::Tensor& tensor = THPVariable_Unpack(first);
    if (refusal_of(tensor, Py_TYPE(first)->tp_name) == Refusal::None) {
      f.batch[0] = tensor.size(0);
      f.batch[1] = tensor.dim() > 1 ? tensor.size(1) : -1;
    }
  }
  return f;
}

Ref wrap(at::Tensor tensor) {
  PyObject* object = THPVariable_Wrap(std::move(tensor));
  if (object == nullptr) throw PyError{};
  return Ref(object);
}

// wire::env::FAULT: proves that what C++ throws stays here.
bool throws() {
  static const char* const fault = std::getenv("FLEXMODEL_TEST_FAULT");
  return fault != nullptr && std::strcmp(fault, "throw-in-tap") == 0;
}

// Runs a hook's body so that nothing of ours ever reaches the job.
template <typename Body>
PyObject* guarded(Body body) {
  // A traced graph must be the module's alone.
  if (!active() || at::tracer::impl::is_dispatch_enabled()) return none();
  try {
    if (throws()) throw std::runtime_error("injected by FLEXMODEL_TEST_FAULT=throw-in-tap");
    Ref result = body();
    return result ? result.release() : none();
  } catch (const PyError&) {
    Ref type, value, trace;
    PyObject *t = nullptr, *v = nullptr, *b = nullptr;
    PyErr_Fetch(&t, &v, &b);
    type = Ref(t), value = Ref(v), trace = Ref(b);
    Ref text(value ? PyObject_Str(value.get()) : nullptr);
    const char* words = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
    fault(std::string("a tap failed: ") + (words == nullptr ? "a Python exception" : words));
  } catch (const std::exception& e) {
    fault(std::string("a tap failed: ") + e.what());
  } catch (...) {
    fault("a tap failed");
  }
  PyErr_Clear();
  return none();
}

// One input: captured, edited, and given a node of its own if its gradient through this module is wanted.
class Inputs {
 public:
  explicit Inputs(const Call& call) : call_(call) {}

  Ref operator()(PyObject* leaf, const std::string& path) {
    for (const Seen& seen : seen_) {
      if (seen.original == leaf) return again(seen, path);
    }
    const at::Tensor& tensor = THPVariable_Unpack(leaf);
    const char* type = Py_TYPE(leaf)->tp_name;
    if ((call_.capture & bit(kForwardPre)) != 0) capture(call_, kForwardPre, path, 0, tensor, type);
    at::Tensor now = edited(call_, kForwardPre, path, tensor);
    const bool gradient = ((call_.capture | call_.edit) & bit(kBackward)) != 0;
    if (gradient && tensor.requires_grad() && refusal_of(tensor, type) == Refusal::None) {
      now = identity(now.defined() ? now : tensor);
      watch_gradient(call_, kBackward, path, now);
    }
    Ref replacement = now.defined() ? wrap(std::move(now)) : Ref();
    seen_.push_back({leaf, Ref::borrow(replacement.get())});
    return replacement;
  }

 private:
  struct Seen {
    PyObject* original;
    Ref replacement;
  };

  // The same tensor given twice (query, key and value) stays the same tensor inside: modules look at that.
  Ref again(const Seen& seen, const std::string& path) {
    const at::Tensor& tensor = THPVariable_Unpack(seen.original);
    const char* type = Py_TYPE(seen.original)->tp_name;
    if ((call_.capture & bit(kForwardPre)) != 0) capture(call_, kForwardPre, path, 0, tensor, type);
    if ((call_.capture & bit(kBackward)) != 0 && tensor.requires_grad()) {
      capture(call_, kBackward, path, 0, tensor, type, /*shared=*/true);
    }
    return Ref::borrow(seen.replacement.get());
  }

  const Call& call_;
  std::vector<Seen> seen_;
};

// (module, args, kwargs) -> None or (args, kwargs)
PyObject* before(PyObject* self, PyObject* const* args, size_t nargsf, PyObject*) {
  if (PyVectorcall_NARGS(nargsf) != 3) return none();
  auto& shared = **reinterpret_cast<Hook*>(self)->shared;
  return guarded([&]() -> Ref {
    Call call{};
    const bool wanted = fire(shared.tap, firing(args[0], args[1], args[2], true), call);
    if (shared.undo.size() >= kMaxUndo) shared.undo.erase(shared.undo.begin());
    shared.undo.emplace_back();
    if (!wanted) return Ref();
    Inputs inputs(call);
    const Visitor visit = std::ref(inputs);
    Undo& undo = shared.undo.back();
    std::string path = "in";
    Ref new_args = map_leaves(args[1], path, visit, &undo);
    // The dict of keyword arguments is the call's own, so it may be changed for good.
    const bool was_empty = undo.empty();
    map_leaves(args[2], path, visit, &undo);
    if (!new_args && was_empty && undo.empty()) return Ref();
    PyObject* first = new_args ? new_args.get() : args[1];
    return Ref(PyTuple_Pack(2, first, args[2]));
  });
}

// (module, args, kwargs, output) -> None or output
PyObject* after(PyObject* self, PyObject* const* args, size_t nargsf, PyObject*) {
  if (PyVectorcall_NARGS(nargsf) != 4) return none();
  auto& shared = **reinterpret_cast<Hook*>(self)->shared;
  return guarded([&]() -> Ref {
    if (!shared.undo.empty()) {
      shared.undo.back().restore();
      shared.undo.pop_back();
    }
    Call call{};
    if (!fire(shared.tap, firing(args[0], args[1], args[2], false), call)) return Ref();
    const Visitor visit = [&call](PyObject* leaf, const std::string& path) -> Ref {
      const at::Tensor& tensor = THPVariable_Unpack(leaf);
      const char* type = Py_TYPE(leaf)->tp_name;
      if ((call.capture & bit(kForward)) != 0) capture(call, kForward, path, 0, tensor, type);
      at::Tensor now = edited(call, kForward, path, tensor);
      const at::Tensor& out = now.defined() ? now : tensor;
      const bool gradient = ((call.capture | call.edit) & bit(kBackwardPre)) != 0;
      if (gradient && out.requires_grad() && refusal_of(out, type) == Refusal::None) {
        // A gradient edit must come after those of modules inside that return the same tensor; a hook on a
        // parameter would stay for good.
        if ((call.edit & bit(kBackwardPre)) != 0 || out.is_leaf()) now = identity(out);
        watch_gradient(call, kBackwardPre, path, now.defined() ? now : tensor);
      }
      return now.defined() ? wrap(std::move(now)) : Ref();
    };
    std::string path = "out";
    Ref changed = map_leaves(args[3], path, visit, nullptr);
    return changed;
  });
}

// (module, args, kwargs) -> None
PyObject* enter(PyObject* self, PyObject* const* args, size_t nargsf, PyObject*) {
  if (PyVectorcall_NARGS(nargsf) != 3) return none();
  return guarded([&]() -> Ref {
    scope(reinterpret_cast<Hook*>(self)->serial, true, firing(args[0], args[1], args[2], true));
    return Ref();
  });
}

// (module, args, kwargs, output) -> None
PyObject* leave(PyObject* self, PyObject* const* args, size_t nargsf, PyObject*) {
  if (PyVectorcall_NARGS(nargsf) != 4) return none();
  return guarded([&]() -> Ref {
    scope(reinterpret_cast<Hook*>(self)->serial, false, firing(args[0], nullptr, nullptr, false));
    return Ref();
  });
}

void dealloc(PyObject* self) {
  delete reinterpret_cast<Hook*>(self)->shared;
  Py_TYPE(self)->tp_free(self);
}

// A model that is pickled or copied takes along a callable that does nothing and needs nothing of ours: its hooks are
// not taps. The copy is found as a model of its own.
PyObject* reduce(PyObject*, PyObject*) {
  Ref functools(PyImport_ImportModule("functools"));
  if (!functools) return nullptr;
  Ref partial(PyObject_GetAttrString(functools.get(), "partial"));
  PyObject* audit = PySys_GetObject("audit");
  if (!partial || audit == nullptr) return nullptr;
  return Py_BuildValue("(O(Os))", partial.get(), audit, "flexmodel.copied");
}

PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyTypeObject hook_type = [] {
  PyTypeObject type{};
  type.ob_base = PyVarObject{PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "flexmodel_inside.Hook";
  type.tp_basicsize = sizeof(Hook);
  type.tp_dealloc = dealloc;
  type.tp_vectorcall_offset = offsetof(Hook, vectorcall);
  type.tp_call = PyVectorcall_Call;
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  type.tp_methods = methods;
  type.tp_doc = "A tap of FlexModel's on a module.";
  return type;
}();

Ref make(vectorcallfunc function, std::shared_ptr<Shared> shared, uint64_t serial) {
  auto* hook = PyObject_New(Hook, &hook_type);
  if (hook == nullptr) throw PyError{};
  hook->vectorcall = function;
  hook->shared = shared ? new std::shared_ptr<Shared>(std::move(shared)) : nullptr;
  hook->serial = serial;
  return Ref(reinterpret_cast<PyObject*>(hook));
}

}  // namespace

bool ready_types() { return PyType_Ready(&hook_type) == 0; }

PyObject* make_tap(uint32_t tap, uint32_t kinds) {
  auto shared = std::make_shared<Shared>();
  shared->tap = tap;
  shared->kinds = kinds;
  Ref first = (kinds & kBefore) != 0 ? make(before, shared, 0) : Ref::borrow(Py_None);
  Ref second = make(after, shared, 0);
  return PyTuple_Pack(2, first.get(), second.get());
}

PyObject* make_scope(uint64_t serial) {
  Ref first = make(enter, nullptr, serial);
  Ref second = make(leave, nullptr, serial);
  return PyTuple_Pack(2, first.get(), second.get());
}

}  // namespace flexmodel
