// The callables that the shim registers as hooks. Each is a vectorcall object: triggering one runs no Python.
#include "flexmodel/tap.h"

#include <ATen/TracerMode.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flexmodel/compiled.h"
#include "flexmodel/faults.h"
#include "flexmodel/gradients.h"
#include "flexmodel/leaves.h"
#include "flexmodel/tensor.h"
#include "flexmodel/input_gradients.h"

namespace flexmodel {
namespace {

// Most calls of one module under way: more are left of forwards that raised.
constexpr size_t kMaxOpen = 64;

// A call under way.
struct Open {
  unsigned long thread;
  Undo undo;
  InputGradients watched;
};

// What the two hooks of a tap share. Guarded by the GIL.
struct Shared {
  uint32_t tap, kinds, edits;
  // Of the module, as the user knows it.
  std::string name;
  // The model's forward pass that the calls under way belong to.
  uint64_t pass;
  std::vector<Open> open;
};

struct Hook {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  // A weak reference to the module that the hook is for; null before `bind`.
  PyObject* module;
  std::shared_ptr<Shared>* shared;
  uint64_t serial, part;
  // The digest of the model's first input on a device: to look at another would make the job wait.
  uint32_t digest;
};

PyObject* none() { Py_RETURN_NONE; }

bool training(PyObject* module) {
  static PyObject* const name = PyUnicode_InternFromString("training");
  bool is_training = false;
  const auto look = [&] { is_training = checked(PyObject_GetAttr(module, name)).get() == Py_True; };
  attempt(look, [&] { return std::string(Py_TYPE(module)->tp_name) + ".training"; });
  return is_training;
}

// Whether some module inside of `module` is in training mode.
bool trains_inside(PyObject* module, int depth = 0) {
  static PyObject* const name = PyUnicode_InternFromString("_modules");
  constexpr int kMaxDepth = 100;
  const Ref children(PyObject_GenericGetAttr(module, name));
  const Ref list(children && PyDict_Check(children.get()) ? PyDict_Values(children.get()) : nullptr);
  if (!list) {
    PyErr_Clear();
    return false;
  }
  for (Py_ssize_t at = 0; depth < kMaxDepth && at < PyList_GET_SIZE(list.get()); ++at) {
    PyObject* child = PyList_GET_ITEM(list.get(), at);
    if (child != Py_None && (training(child) || trains_inside(child, depth + 1))) return true;
  }
  return false;
}

// `inputs` are the arguments and keyword arguments of the module.
Trigger trigger(PyObject* module, PyObject* args, PyObject* kwargs, bool pre) {
  Trigger f{};
  f.pre = pre;
  f.replay = torch::autograd::get_current_graph_task_id() != -1;
  f.grad_enabled = c10::GradMode::is_enabled();
  f.train = training(module);
  std::fill(std::begin(f.first), std::end(f.first), -1);
  std::fill(std::begin(f.collectives), std::end(f.collectives), -1);
  if (const auto batch = listed_batch(args, kwargs)) {
    f.first[0] = *batch;
    return f;
  }
  PyObject* first = args == nullptr ? nullptr : first_tensor(args);
  if (first == nullptr && kwargs != nullptr) first = first_tensor(kwargs);
  if (first != nullptr) {
    const auto look = [&] { return part_of(THPVariable_Unpack(first), false, Py_TYPE(first)->tp_name); };
    const auto name = [&] { return std::string("the first input of a ") + Py_TYPE(module)->tp_name; };
    const Part part = part_or_refusal(THPVariable_Unpack(first), look, name);
    if (part.refusal == Refusal::None) {
      for (int64_t dim = 0; dim < std::min<int64_t>(part.local.dim(), 3); ++dim) f.first[dim] = part.local.size(dim);
    }
  }
  return f;
}

// `tensor` as a Python object that stands for `original` inside the job: of its class, and with what the job set on it.
Ref standing_for(PyObject* original, at::Tensor tensor) {
  // What answers for all operations itself, such as a result that torch waits for, has given what is in it.
  const auto dispatches = [](const at::Tensor& of) { return of.unsafeGetTensorImpl()->is_python_dispatch(); };
  const bool is_its_own = dispatches(tensor) || dispatches(THPVariable_Unpack(original));
  Ref object = checked(THPVariable_Wrap(std::move(tensor)));
  if (is_its_own) return object;
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(original));
  if (type != reinterpret_cast<PyObject*>(Py_TYPE(object.get()))) {
    object = checked(PyObject_CallMethod(object.get(), "as_subclass", "O", type));
  }
  Ref own = checked(PyObject_GetAttrString(original, "__dict__"));
  if (PyDict_Check(own.get()) && PyDict_GET_SIZE(own.get()) > 0) {
    Ref copy = checked(PyObject_GetAttrString(object.get(), "__dict__"));
    if (PyDict_Update(copy.get(), own.get()) != 0) throw PyError{};
  }
  return object;
}

// wire::env::FAULT: proves that what C++ throws stays here.
bool throws() {
  static const char* const fault = std::getenv("FLEXMODEL_TEST_FAULT");
  return fault != nullptr && std::strcmp(fault, "throw-in-tap") == 0;
}

// Written with the GIL.
std::atomic<bool> paused = false, takes_digests = false;
PyObject* capturer = nullptr;
PyObject* counter = nullptr;
PyObject* turner = nullptr;
// The shim's, until it has undone all.
std::atomic<PyObject*> undoer = nullptr;

// Whether a hook is called as it was registered: with `count` arguments, the first of which is its module, or a copy that
// nn.DataParallel runs. Torch moves hooks to other modules where it fuses and converts them.
bool is_called_as_registered(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names, Py_ssize_t count) {
  static PyObject* const replica = PyUnicode_InternFromString("_is_replica");
  if (PyVectorcall_NARGS(nargsf) != count || (names != nullptr && PyTuple_GET_SIZE(names) != 0)) return false;
  if (!PyTuple_Check(args[1]) || !PyDict_Check(args[2])) return false;
  PyObject* const reference = reinterpret_cast<Hook*>(self)->module;
  if (reference == nullptr) return false;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* alive = nullptr;
  PyWeakref_GetRef(reference, &alive);
  const Ref module(alive);
#else
  const Ref module = Ref::borrow(PyWeakref_GetObject(reference));
#endif
  if (module.get() == args[0]) return true;
  const Ref is_replica(PyObject_GenericGetAttr(args[0], replica));
  if (!is_replica) PyErr_Clear();
  return is_replica.get() == Py_True;
}

// Runs a hook's body so that nothing of ours ever reaches the job; exceptions of the job's own do.
template <typename Body>
PyObject* guarded(Body body) {
  // A traced graph must be the module's alone.
  if (paused || at::tracer::impl::is_dispatch_enabled()) return none();
  try {
    if (!active()) {
      undo();
      return none();
    }
    if (throws()) throw std::runtime_error("injected by FLEXMODEL_TEST_FAULT=throw-in-tap");
    Ref result = body();
    return result ? result.release() : none();
  } catch (...) {
    return into_python([] {
      fault("a tap failed: " + why());
      return none();
    });
  }
}

// The part of a leaf that is at `path` of a module. Where looking at it raises, that is why it cannot be read.
Part part_at(const Shared& shared, const std::string& path, PyObject* leaf, bool ask, Where where) {
  const auto look = [&] { return part_of(THPVariable_Unpack(leaf), ask, Py_TYPE(leaf)->tp_name, where); };
  return part_or_refusal(THPVariable_Unpack(leaf), look, [&] { return shared.name + " " + path; });
}

// Whether the gradient of a leaf is wanted and can be had. One that cannot be read is counted.
bool watches(const Call& call, uint32_t kinds, const std::string& path, const at::Tensor& tensor, const Part& part) {
  if (((call.capture | call.edit) & kinds) == 0 || !tensor.requires_grad()) return false;
  if (part.refusal == Refusal::None) return true;
  capture(call, kinds, path, 0, part);
  return false;
}

// Puts back what was noted, unless it was taken.
class RestoredOnError {
 public:
  ~RestoredOnError() {
    if (undo_.empty()) return;
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
    PyErr_Fetch(&type, &value, &trace);
    undo_.restore();
    PyErr_Restore(type, value, trace);
  }
  Undo& operator*() { return undo_; }
  Undo* operator->() { return &undo_; }
  Undo take() { return std::exchange(undo_, Undo()); }

 private:
  Undo undo_;
};

// Ends the call that this thread began last: takes out what was put into its arguments, and returns the inputs whose
// gradients are wanted. nn.DataParallel runs copies that share their hooks.
InputGradients close(Shared& shared) {
  const unsigned long thread = PyThread_get_thread_ident();
  const auto last = std::find_if(shared.open.rbegin(), shared.open.rend(), [=](const Open& o) { return o.thread == thread; });
  if (last == shared.open.rend()) return {};
  Open open = std::move(*last);
  shared.open.erase(std::next(last).base());
  open.undo.restore();
  return std::move(open.watched);
}

// The inputs: captured, edited, and noted if their gradients through this module are wanted.
class Inputs {
 public:
  Inputs(const Shared& shared, const Call& call, PyObject* module, InputGradients& watched)
      : shared_(shared), call_(call), module_(module), watched_(watched) {}

  Ref operator()(PyObject* leaf, const std::string& path) {
    for (const Seen& seen : seen_) {
      if (seen.original == leaf) return again(seen, path);
    }
    const at::Tensor& tensor = THPVariable_Unpack(leaf);
    const Part part = part_at(shared_, path, leaf, call_.ask, {module_, nullptr});
    capture(call_, KINDS_OF_INPUTS, path, 0, part);
    at::Tensor now = edited(call_, KINDS_OF_INPUTS, path, tensor);
    if (watches(call_, KINDS_OF_INPUT_GRADIENTS, path, tensor, part)) {
      watched_.add(call_, path, now.defined() ? now : tensor, part.axes);
    }
    Ref replacement = now.defined() ? standing_for(leaf, std::move(now)) : Ref();
    seen_.push_back({leaf, Ref::borrow(replacement.get())});
    return replacement;
  }

 private:
  struct Seen {
    PyObject* original;
    Ref replacement;
  };

  // The same tensor given twice (query, key and value): it has one gradient.
  Ref again(const Seen& seen, const std::string& path) {
    const at::Tensor& tensor = THPVariable_Unpack(seen.original);
    const Part part = part_at(shared_, path, seen.original, call_.ask, {module_, nullptr});
    capture(call_, KINDS_OF_INPUTS, path, 0, part);
    if (tensor.requires_grad()) capture(call_, KINDS_OF_INPUT_GRADIENTS, path, 0, part, Refusal::SharedInput);
    return Ref::borrow(seen.replacement.get());
  }

  const Shared& shared_;
  const Call& call_;
  PyObject* const module_;
  InputGradients& watched_;
  std::vector<Seen> seen_;
};

// (module, args, kwargs) -> None or (args, kwargs)
PyObject* before(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  if (!is_called_as_registered(self, args, nargsf, names, 3)) return none();
  auto& shared = **reinterpret_cast<Hook*>(self)->shared;
  return guarded([&]() -> Ref {
    Call call{};
    const Trigger now = trigger(args[0], args[1], args[2], true);
    const bool wanted = host().triggered(shared.tap, &now, &call);
    if (wanted && !now.replay && call.pass != shared.pass) {
      // What is left of a pass that raised.
      shared.open.clear();
      shared.pass = call.pass;
    }
    if (shared.open.size() >= kMaxOpen) shared.open.erase(shared.open.begin());
    shared.open.push_back({PyThread_get_thread_ident(), Undo(), InputGradients()});
    if (!wanted) return Ref();
    InputGradients watched;
    Inputs inputs(shared, call, args[0], watched);
    const Visitor visit = std::ref(inputs);
    RestoredOnError undo;
    std::string path = "in";
    Ref new_args = map_leaves(shared.name, args[1], path, visit, &*undo);
    map_leaves(shared.name, args[2], path, visit, &*undo);
    shared.open.back().watched = std::move(watched);
    if (!new_args && undo->empty()) return Ref();
    Ref result = checked(PyTuple_Pack(2, new_args ? new_args.get() : args[1], args[2]));
    // The dict of keyword arguments is the call's own, so it may be changed for good.
    undo->forget(args[2]);
    shared.open.back().undo = undo.take();
    return result;
  });
}

// (module, args, kwargs, output) -> None or output
PyObject* after(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  if (!is_called_as_registered(self, args, nargsf, names, 4)) return none();
  auto& shared = **reinterpret_cast<Hook*>(self)->shared;
  InputGradients watched = close(shared);
  return guarded([&]() -> Ref {
    Call call{};
    const Trigger now = trigger(args[0], args[1], args[2], false);
    if (!host().triggered(shared.tap, &now, &call) && watched.empty()) return Ref();
    std::vector<at::Tensor> outputs;
    const Where where{args[0], call.ask ? first_tensor(args[1]) : nullptr};
    const Visitor visit = [&](PyObject* leaf, const std::string& path) -> Ref {
      const at::Tensor& tensor = THPVariable_Unpack(leaf);
      const size_t number = outputs.size();
      outputs.push_back(tensor);
      const Part part = part_at(shared, path, leaf, call.ask, where);
      capture(call, KINDS_OF_OUTPUTS, path, 0, part);
      at::Tensor now = edited(call, KINDS_OF_OUTPUTS, path, tensor);
      if (!now.defined()) now = watched.returned(tensor);
      if (watches(call, KINDS_OF_OUTPUT_GRADIENTS, path, now.defined() ? now : tensor, part)) {
        // A gradient edit must come after those of modules inside that return the same tensor.
        if ((call.edit & KINDS_OF_OUTPUT_GRADIENTS) != 0) now = identity(now.defined() ? now : tensor);
        const at::Tensor& out = now.defined() ? now : tensor;
        if (out.is_leaf()) {
          capture(call, KINDS_OF_OUTPUT_GRADIENTS, path, 0, part, Refusal::Returned);
        } else {
          watch_gradient(call, KINDS_OF_OUTPUT_GRADIENTS, path, out, part.axes);
        }
      }
      if (!now.defined()) return Ref();
      Ref replacement = standing_for(leaf, now);
      outputs[number] = std::move(now);
      return replacement;
    };
    std::string path = "out";
    Ref changed = map_leaves(shared.name, args[3], path, visit, nullptr);
    attempt([&] { watched.hook(outputs); }, [&] { return shared.name + ", gradients of its inputs"; });
    return changed;
  });
}

// (module, args, kwargs) -> None
PyObject* enter(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  if (!is_called_as_registered(self, args, nargsf, names, 3)) return none();
  return guarded([&]() -> Ref {
    auto& hook = *reinterpret_cast<Hook*>(self);
    Trigger now = trigger(args[0], args[1], args[2], true);
    now.train = now.train || (now.grad_enabled && trains_inside(args[0]));
    PyObject* first = first_tensor(args[1]);
    if (first == nullptr) first = first_tensor(args[2]);
    if (first != nullptr) now.input_digest = input_digest(THPVariable_Unpack(first), Py_TYPE(first)->tp_name, now, hook.digest);
    count_collectives(hook.serial, now);
    if (host().pass(hook.serial, hook.part, true, &now)) capture_parameters(hook.serial);
    return Ref();
  });
}

// (module, args, kwargs, output) -> None
PyObject* leave(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  if (!is_called_as_registered(self, args, nargsf, names, 4)) return none();
  return guarded([&]() -> Ref {
    auto& hook = *reinterpret_cast<Hook*>(self);
    Trigger now = trigger(args[0], nullptr, nullptr, false);
    if (hook.part == 0) count_collectives(hook.serial, now);
    host().pass(hook.serial, hook.part, false, &now);
    turn_if_due();
    return Ref();
  });
}

void dealloc(PyObject* self) {
  delete reinterpret_cast<Hook*>(self)->shared;
  Py_XDECREF(reinterpret_cast<Hook*>(self)->module);
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

// What it is in a graph of torch.compile's.
PyObject* traced(PyObject* self, PyObject*) {
  const auto& hook = *reinterpret_cast<Hook*>(self);
  if (hook.shared == nullptr) {
    return traced_form(hook.vectorcall == enter ? "enter" : "leave", static_cast<int64_t>(hook.serial),
                       static_cast<int64_t>(hook.part), 0, 0);
  }
  const Shared& shared = **hook.shared;
  return traced_form(hook.vectorcall == before ? "before" : "after", shared.tap, 0, shared.kinds, shared.edits);
}

// bind(module): the hook is for that module.
PyObject* bind(PyObject* self, PyObject* module) {
  PyObject* reference = PyWeakref_NewRef(module, nullptr);
  if (reference == nullptr) return nullptr;
  Py_XDECREF(std::exchange(reinterpret_cast<Hook*>(self)->module, reference));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr},
                         {"bind", bind, METH_O, nullptr},
                         {"traced", traced, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

// The job may ask for it, as of any function that is a hook.
PyObject* name_of(PyObject*, void*) { return PyUnicode_FromString("flexmodel"); }

// Its tap's number, if it has one.
PyObject* tap_of(PyObject* self, void*) {
  const auto& hook = *reinterpret_cast<Hook*>(self);
  return hook.shared == nullptr ? none() : PyLong_FromUnsignedLong((*hook.shared)->tap);
}

PyGetSetDef attributes[] = {{"__name__", name_of, nullptr, nullptr, nullptr},
                            {"tap", tap_of, nullptr, nullptr, nullptr},
                            {nullptr, nullptr, nullptr, nullptr, nullptr}};

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
  type.tp_getset = attributes;
  type.tp_doc = "A tap of FlexModel's on a module.";
  return type;
}();

Ref make(vectorcallfunc function, std::shared_ptr<Shared> shared, uint64_t serial = 0, uint64_t part = 0) {
  auto* hook = PyObject_New(Hook, &hook_type);
  if (hook == nullptr) throw PyError{};
  hook->vectorcall = function;
  hook->module = nullptr;
  hook->shared = shared ? new std::shared_ptr<Shared>(std::move(shared)) : nullptr;
  hook->serial = serial;
  hook->part = part;
  hook->digest = 0;
  return Ref(reinterpret_cast<PyObject*>(hook));
}

}  // namespace

bool ready_types() { return PyType_Ready(&hook_type) == 0; }

void pause_taps(bool now) { paused = now; }

void digest_inputs() { takes_digests = true; }

uint32_t input_digest(const at::Tensor& first, const char* python_type, const Trigger& now, uint32_t& first_digest) {
  if (!takes_digests || now.replay || refusal_of(first, python_type) != Refusal::None) return 0;
  if (first.device().is_cpu()) return digest_of(first);
  if (first_digest == 0) first_digest = digest_of(first);
  return first_digest;
}

bool are_taps_paused() { return paused; }

void capture_parameters_with(PyObject* function) {
  Py_XINCREF(function);
  Py_XDECREF(std::exchange(capturer, function));
}

void capture_parameters(uint64_t serial) {
  if (!host().wants(KINDS_OF_PARAMETER_VALUES)) return;
  const Gil gil;
  if (capturer == nullptr) return;
  checked(PyObject_CallFunction(capturer, "K", static_cast<unsigned long long>(serial)));
}

void count_collectives_with(PyObject* function) {
  Py_XINCREF(function);
  Py_XDECREF(std::exchange(counter, function));
}

void count_collectives(uint64_t serial, Trigger& now) {
  if (counter == nullptr || now.replay) return;
  const Gil gil;
  const Ref counted = checked(PyObject_CallFunction(counter, "K", static_cast<unsigned long long>(serial)));
  if (!PyTuple_Check(counted.get()) || PyTuple_GET_SIZE(counted.get()) == 0) return;
  now.reduces = PyTuple_GET_ITEM(counted.get(), 0) == Py_True;
  const Py_ssize_t axes = std::min<Py_ssize_t>(PyTuple_GET_SIZE(counted.get()) - 1, static_cast<Py_ssize_t>(std::size(now.collectives)));
  for (Py_ssize_t axis = 0; axis < axes; ++axis) {
    now.collectives[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(counted.get(), axis + 1));
  }
  if (PyErr_Occurred() != nullptr) throw PyError{};
}

void turn_with(PyObject* function) {
  Py_XINCREF(function);
  Py_XDECREF(std::exchange(turner, function));
}

void turn_if_due() {
  if (turner == nullptr || !host().due()) return;
  const Gil gil;
  checked(PyObject_CallNoArgs(turner));
}

void undo_with(PyObject* function) {
  Py_XINCREF(function);
  Py_XDECREF(undoer.exchange(function));
}

void undo() {
  if (undoer == nullptr) return;
  const Gil gil;
  const Ref function = Ref::borrow(undoer);
  if (!function) return;
  const Ref done = checked(PyObject_CallNoArgs(function.get()));
  if (done.get() == Py_True) undo_with(nullptr);
}

PyObject* make_tap(const Selected& selected, std::string name) {
  auto shared = std::make_shared<Shared>();
  shared->tap = selected.tap;
  shared->name = name.empty() ? "the model" : std::move(name);
  shared->kinds = selected.kinds;
  shared->edits = selected.edits;
  shared->pass = 0;
  Ref first = selected.before ? make(before, shared) : Ref::borrow(Py_None);
  Ref second = make(after, shared);
  return PyTuple_Pack(2, first.get(), second.get());
}

PyObject* make_pass_hooks(uint64_t serial, uint64_t part) {
  Ref first = make(enter, nullptr, serial, part);
  Ref second = make(leave, nullptr, serial, part);
  return PyTuple_Pack(2, first.get(), second.get());
}

}  // namespace flexmodel
