// The Python module that the shim gets: what it may ask of the interposer.
#include "flexmodel/module.h"

#include "flexmodel/py.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include "flexmodel/communicator.h"
#include "flexmodel/compiled.h"
#include "flexmodel/ffi.h"
#include "flexmodel/faults.h"
#include "flexmodel/gradients.h"
#include "flexmodel/leaves.h"
#include "flexmodel/loss_scale.h"
#include "flexmodel/parts.h"
#include "flexmodel/store.h"
#include "flexmodel/tap.h"
#include "flexmodel/tensor.h"

// Found by scanning this file's bytes (wire::bridge_marker), before anything here is loaded.
extern "C" __attribute__((visibility("default"), used)) const char flexmodel_bridge_marker[] = FLEXMODEL_BRIDGE_MARKER;

namespace flexmodel {
namespace {

const HostTable* engine = nullptr;

// select(serial, [(name, class, qualified class, order)], [parameter], wrapper, [(mesh axis, index, size, role, ranks)],
// signature, rank, world, group's number) -> [(index, (before, after))], [(index of the parameter, tap)]
PyObject* py_select(PyObject*, PyObject* args) {
  unsigned long long serial = 0;
  PyObject *entries = nullptr, *names = nullptr, *axes = nullptr;
  const char* wrapper = nullptr;
  unsigned int signature = 0, rank = 0, world = 1;
  unsigned long long group = 0;
  if (PyArg_ParseTuple(args, "KO!O!sO!IIIK", &serial, &PyList_Type, &entries, &PyList_Type, &names, &wrapper, &PyList_Type,
                       &axes, &signature, &rank, &world, &group) == 0) {
    return nullptr;
  }
  // Texts are borrowed of Python's, which the arguments hold.
  std::vector<Str> parameters;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names); ++i) {
    const char* name = PyUnicode_AsUTF8(PyList_GET_ITEM(names, i));
    if (name == nullptr) return nullptr;
    parameters.push_back(str(name));
  }
  std::vector<MeshAxis> mesh;
  std::vector<std::vector<uint32_t>> ranks;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(axes); ++i) {
    const char* name = nullptr;
    MeshAxis axis{};
    PyObject* members = nullptr;
    if (PyArg_ParseTuple(PyList_GET_ITEM(axes, i), "sIIbO!", &name, &axis.index, &axis.size, &axis.role, &PyTuple_Type,
                         &members) == 0) {
      return nullptr;
    }
    axis.name = str(name);
    ranks.emplace_back();
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(members); ++at) {
      ranks.back().push_back(static_cast<uint32_t>(PyLong_AsUnsignedLong(PyTuple_GET_ITEM(members, at))));
    }
    if (PyErr_Occurred() != nullptr) return nullptr;
    mesh.push_back(axis);
  }
  for (size_t i = 0; i < mesh.size(); ++i) {
    mesh[i].ranks = ranks[i].data();
    mesh[i].rank_count = ranks[i].size();
  }
  std::vector<ModuleDesc> modules;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries); ++i) {
    const char *name = nullptr, *class_name = nullptr, *qualified = nullptr;
    ModuleDesc module{};
    PyObject* entry = PyList_GET_ITEM(entries, i);
    if (PyArg_ParseTuple(entry, "sssb", &name, &class_name, &qualified, &module.order) == 0) return nullptr;
    module.name = str(name);
    module.class_name = str(class_name);
    module.qualified = str(qualified);
    modules.push_back(module);
  }
  const ModelDesc model{serial, modules.data(), modules.size(), parameters.data(), parameters.size(),
                        str(wrapper), mesh.data(), mesh.size(), signature};
  std::vector<Selected> found(modules.size() + parameters.size());
  found.resize(std::min(found.size(), host().select(&model, Rank{rank, world, group}, found.data(), found.size())));
  Ref out(PyList_New(0)), of_parameters(PyList_New(0));
  if (!out || !of_parameters) return nullptr;
  for (const Selected& selected : found) {
    if (selected.index >= modules.size()) {
      Ref pair(Py_BuildValue("(nI)", static_cast<Py_ssize_t>(selected.index - modules.size()), selected.tap));
      if (!pair || PyList_Append(of_parameters.get(), pair.get()) != 0) return nullptr;
      continue;
    }
    const Str& name = modules[selected.index].name;
    PyObject* tap = into_python([&] { return make_tap(selected, {reinterpret_cast<const char*>(name.ptr), name.len}); });
    if (tap == nullptr) return nullptr;
    Ref pair(Py_BuildValue("(IN)", selected.index, tap));
    if (!pair || PyList_Append(out.get(), pair.get()) != 0) return nullptr;
  }
  return PyTuple_Pack(2, out.get(), of_parameters.get());
}

// first_part(serial, part)
PyObject* py_first_part(PyObject*, PyObject* args) {
  unsigned long long serial = 0, part = 0;
  if (PyArg_ParseTuple(args, "KK", &serial, &part) == 0) return nullptr;
  host().first_part(serial, part);
  Py_RETURN_NONE;
}

// microbatches(serial, of all ranks, count, batch, length); negative where not known
PyObject* py_microbatches(PyObject*, PyObject* args) {
  unsigned long long serial = 0;
  int of_all = 0;
  unsigned int count = 0;
  long long batch = -1;
  long long length = -1;
  if (PyArg_ParseTuple(args, "KpILL", &serial, &of_all, &count, &batch, &length) == 0) return nullptr;
  host().microbatches(serial, of_all != 0, count, batch, length);
  Py_RETURN_NONE;
}

// stepped(optimizer)
PyObject* py_stepped(PyObject*, PyObject* optimizer) {
  const unsigned long number = PyLong_AsUnsignedLong(optimizer);
  if (PyErr_Occurred() != nullptr) return nullptr;
  host().stepped(static_cast<uint32_t>(number));
  Py_RETURN_NONE;
}

// backward_ended() -> whether it did: it may be inside of another, as reentrant checkpointing has it
PyObject* py_backward_ended(PyObject*, PyObject*) {
  if (torch::autograd::get_current_graph_task_id() != -1) Py_RETURN_FALSE;
  backward_scale_ended();
  host().backward_ended();
  Py_RETURN_TRUE;
}

// optimizers_of(tap, [optimizer])
PyObject* py_optimizers_of(PyObject*, PyObject* args) {
  unsigned int tap = 0;
  PyObject* numbers = nullptr;
  if (PyArg_ParseTuple(args, "IO!", &tap, &PyList_Type, &numbers) == 0) return nullptr;
  std::vector<uint32_t> optimizers;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(numbers); ++i) {
    optimizers.push_back(static_cast<uint32_t>(PyLong_AsUnsignedLong(PyList_GET_ITEM(numbers, i))));
  }
  if (PyErr_Occurred() != nullptr) return nullptr;
  host().optimizers_of(tap, optimizers.data(), optimizers.size());
  Py_RETURN_NONE;
}

// pause(paused)
PyObject* py_pause(PyObject*, PyObject* paused) {
  pause_taps(paused == Py_True);
  Py_RETURN_NONE;
}

// wants(kinds) -> bool
PyObject* py_wants(PyObject*, PyObject* kinds) {
  const unsigned long mask = PyLong_AsUnsignedLong(kinds);
  if (PyErr_Occurred() != nullptr) return nullptr;
  return PyBool_FromLong(host().wants(static_cast<uint32_t>(mask)) ? 1 : 0);
}

// parameter_due(tap, kind) -> bool
PyObject* py_parameter_due(PyObject*, PyObject* args) {
  unsigned int tap = 0;
  unsigned char kind = 0;
  if (PyArg_ParseTuple(args, "Ib", &tap, &kind) == 0) return nullptr;
  return PyBool_FromLong(host().parameter_due(tap, kind) ? 1 : 0);
}

void capture_parameter(uint32_t tap, uint8_t kind, uint64_t version, const Part& part) {
  Call call{};
  if (!host().begin_parameter(tap, kind, version, &call)) return;
  capture(call, KINDS_OF_PARAMETER_VALUES, "param", 0, part);
  capture(call, KINDS_OF_ACCUMULATED_GRADIENTS | KINDS_OF_PARAMETER_GRADIENTS, "grad", call.repeat, part);
}

// capture_parameter(tap, kind, tensor, axes, skipped, version)
PyObject* py_capture_parameter(PyObject*, PyObject* args) {
  unsigned int tap = 0;
  unsigned char kind = 0;
  PyObject *tensor = nullptr, *axes = nullptr;
  int skipped = 0;
  unsigned long long version = 0;
  Part part;
  if (PyArg_ParseTuple(args, "IbOO!pK", &tap, &kind, &tensor, &PyList_Type, &axes, &skipped, &version) == 0) return nullptr;
  if (!is_tensor(tensor)) return PyErr_Format(PyExc_TypeError, "not a tensor");
  if (!read_axes(axes, part.axes)) return nullptr;
  return into_python([&] {
    part.local = THPVariable_Unpack(tensor);
    part.refusal = refusal_of(part.local, Py_TYPE(tensor)->tp_name);
    part.skipped = skipped != 0;
    // One that took the place of another may have its address. A device is not waited for.
    const bool told = version != 0 && part.refusal == Refusal::None && part.local.is_cpu();
    if (told) version = (version ^ digest_of(part.local)) | 1;
    capture_parameter(tap, kind, version, part);
    Py_RETURN_NONE;
  });
}

// refuse_parameter(tap, kind, refusal)
PyObject* py_refuse_parameter(PyObject*, PyObject* args) {
  unsigned int tap = 0;
  unsigned char kind = 0, refusal = 0;
  if (PyArg_ParseTuple(args, "Ibb", &tap, &kind, &refusal) == 0) return nullptr;
  return into_python([&] {
    Part part;
    part.local = at::empty({0});
    part.refusal = static_cast<Refusal>(refusal);
    capture_parameter(tap, kind, 0, part);
    Py_RETURN_NONE;
  });
}

// faults_with(reason, report)
PyObject* py_faults_with(PyObject*, PyObject* args) {
  PyObject *reason = nullptr, *report = nullptr;
  if (PyArg_ParseTuple(args, "OO", &reason, &report) == 0) return nullptr;
  set_faults(reason, report);
  Py_RETURN_NONE;
}

PyObject* py_describe_with(PyObject*, PyObject* function) {
  set_describer(function);
  Py_RETURN_NONE;
}

PyObject* py_capture_parameters_with(PyObject*, PyObject* function) {
  capture_parameters_with(function);
  Py_RETURN_NONE;
}

PyObject* py_count_collectives_with(PyObject*, PyObject* function) {
  count_collectives_with(function);
  Py_RETURN_NONE;
}

PyObject* py_undo_with(PyObject*, PyObject* function) {
  undo_with(function);
  Py_RETURN_NONE;
}

// joined(backend, index, size, device, -1 for none)
PyObject* py_joined(PyObject*, PyObject* args) {
  PyObject* backend = nullptr;
  unsigned int index = 0, size = 1;
  int device = -1;
  if (PyArg_ParseTuple(args, "OIIi", &backend, &index, &size, &device) == 0) return nullptr;
  std::unique_ptr<Communicator> comm = over_backend(backend);
  if (comm == nullptr) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  joined(std::move(comm), index, size, device);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// store(a c10d store)
PyObject* py_store(PyObject*, PyObject* object) {
  std::unique_ptr<Store> store = open_store(object);
  if (store == nullptr) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  opened(std::move(store));
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// no_store(why)
PyObject* py_no_store(PyObject*, PyObject* why) {
  const char* bytes = PyUnicode_AsUTF8(why);
  if (bytes == nullptr) return nullptr;
  host().store(nullptr, str(bytes));
  Py_RETURN_NONE;
}

// turn(rank, world, group's number) -> bool
PyObject* py_turn(PyObject*, PyObject* args) {
  unsigned int rank = 0, world = 1;
  unsigned long long group = 0;
  if (PyArg_ParseTuple(args, "IIK", &rank, &world, &group) == 0) return nullptr;
  bool turned = false;
  Py_BEGIN_ALLOW_THREADS;
  turned = host().turn(Rank{rank, world, group});
  Py_END_ALLOW_THREADS;
  return PyBool_FromLong(turned ? 1 : 0);
}

// goes_on(serial, part, tap) -> bool
PyObject* py_goes_on(PyObject*, PyObject* args) {
  long long serial = -1, part = -1, tap = -1;
  if (PyArg_ParseTuple(args, "LLL", &serial, &part, &tap) == 0) return nullptr;
  return PyBool_FromLong(host().goes_on(serial, part, tap) ? 1 : 0);
}

PyObject* py_due(PyObject*, PyObject*) { return PyBool_FromLong(host().due() ? 1 : 0); }

PyObject* py_revision(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(host().revision()); }

PyObject* py_turn_with(PyObject*, PyObject* function) {
  turn_with(function);
  Py_RETURN_NONE;
}

// plan() -> str
PyObject* py_plan(PyObject*, PyObject*) {
  std::string text(1 << 16, '\0');
  text.resize(std::min(text.size(), host().plan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  return PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
}

PyObject* py_pass_hooks(PyObject*, PyObject* args) {
  unsigned long long serial = 0, part = 0;
  if (PyArg_ParseTuple(args, "KK", &serial, &part) == 0) return nullptr;
  return into_python([&] { return make_pass_hooks(serial, part); });
}

PyObject* py_forget(PyObject*, PyObject* serial) {
  const unsigned long long number = PyLong_AsUnsignedLongLong(serial);
  if (PyErr_Occurred() != nullptr) return nullptr;
  host().forget(number);
  Py_RETURN_NONE;
}

PyObject* py_digest_inputs(PyObject*, PyObject*) {
  digest_inputs();
  Py_RETURN_NONE;
}

// Passed on to the engine as it is.
template <void (*HostTable::*function)()>
PyObject* event(PyObject*, PyObject*) {
  (host().*function)();
  Py_RETURN_NONE;
}

template <void (*HostTable::*function)(Str)>
PyObject* text(PyObject*, PyObject* argument) {
  const char* bytes = PyUnicode_AsUTF8(argument);
  if (bytes == nullptr) return nullptr;
  (host().*function)(str(bytes));
  Py_RETURN_NONE;
}

PyObject* py_active(PyObject*, PyObject*) { return PyBool_FromLong(active() ? 1 : 0); }

PyObject* py_finish(PyObject*, PyObject*) {
  Py_BEGIN_ALLOW_THREADS;
  host().finish();
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"select", py_select, METH_VARARGS, "Taps for the modules of a model that selectors match."},
    {"first_part", py_first_part, METH_VARARGS, "The first part of a model that the job called by itself."},
    {"microbatches", py_microbatches, METH_VARARGS, "A model is a stage of a pipeline."},
    {"batch", event<&HostTable::batch>, METH_NOARGS, "A pipeline begins a batch."},
    {"pause", py_pause, METH_O, "Modules that are called from now on are not the job's work, or are again."},
    {"digest_inputs", py_digest_inputs, METH_NOARGS, "From now on a pass of a model is reported with a digest of its input."},
    {"wants", py_wants, METH_O, "Whether any hook taps one of these kinds, a mask."},
    {"parameter_due", py_parameter_due, METH_VARARGS, "Whether a parameter or its gradient is to be captured now."},
    {"capture_parameter", py_capture_parameter, METH_VARARGS, "Captures a parameter, or its gradient."},
    {"refuse_parameter", py_refuse_parameter, METH_VARARGS, "Counts a parameter, or its gradient, that is not captured."},
    {"faults_with", py_faults_with, METH_VARARGS, "Keeps the functions that say why something raised, and that report it."},
    {"describe_with", py_describe_with, METH_O, "Keeps the function that describes how a tensor lies over the ranks."},
    {"capture_parameters_with", py_capture_parameters_with, METH_O, "Keeps the function that captures what is due of a model's parameters."},
    {"count_collectives_with", py_count_collectives_with, METH_O, "Keeps the function that says how many collectives the members of a model's axes have called."},
    {"undo_with", py_undo_with, METH_O, "Keeps the function that takes out of torch what is ours, once taps are off."},
    {"pass_hooks", py_pass_hooks, METH_VARARGS, "Hooks that mark the forward of a model (part 0) or of a part of it."},
    {"forget", py_forget, METH_O, "A model was destroyed."},
    {"resolved", event<&HostTable::resolved>, METH_NOARGS, "Every model was looked at: report selectors without a match."},
    {"optimizer_made", event<&HostTable::optimizer_made>, METH_NOARGS, "The process made an optimizer."},
    {"optimizers_of", py_optimizers_of, METH_VARARGS, "The optimizers, ascending, that hold the parameters of a tap's module."},
    {"stepped", py_stepped, METH_O, "An optimizer stepped, or was skipped."},
    {"backward_ended", py_backward_ended, METH_NOARGS, "A backward pass ended, or raised. Whether it was none inside of another."},
    {"due", py_due, METH_NOARGS, "Whether the next pass may be one that other hooks begin with."},
    {"goes_on", py_goes_on, METH_VARARGS, "Whether a call of a part of a model goes on with a pass that has begun."},
    {"turn", py_turn, METH_VARARGS, "A model may be about to be called: whether other hooks are in force from now on."},
    {"forbid_compiling", text<&HostTable::forbid_compiling>, METH_O, "Why modules may not be compiled again from now on; empty: they may."},
    {"turn_with", py_turn_with, METH_O, "Keeps the function that is called when a pass has ended and other hooks may begin with the next."},
    {"revision", py_revision, METH_NOARGS, "The revision of the hooks in force."},
    {"plan", py_plan, METH_NOARGS, "What all ranks must agree on to gather tensors; empty if no hook wants that."},
    {"joined", py_joined, METH_VARARGS, "The ranks have a communicator of ours: a c10d backend, this member, how many, and its device."},
    {"per_rank", text<&HostTable::per_rank>, METH_O, "There is no communicator, or none any more: each rank sends its own parts, for this reason."},
    {"store", py_store, METH_O, "The store of the job's process group, over a connection of ours: what ranks of several nodes decide in."},
    {"no_store", py_no_store, METH_O, "The job has no store that ranks can decide in, for this reason."},
    {"notice", text<&HostTable::notice>, METH_O, "One line for the user."},
    {"fault", text<&HostTable::fault>, METH_O, "Turns taps off in this process, with one line."},
    {"finish", py_finish, METH_NOARGS, "The process ends in good order."},
    {"active", py_active, METH_NOARGS, "Whether taps are on."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "flexmodel_inside._bridge", "FlexModel inside a job.", -1, functions,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

bool set_host(size_t table) {
  engine = reinterpret_cast<const HostTable*>(table);
  return engine->abi == TAP_ABI && engine->size == sizeof(HostTable);
}

const HostTable& host() { return *engine; }

size_t python_module() {
  if (!ready_types()) return 0;
  Ref module(PyModule_Create(&definition));
  if (!module || !add_compiled(module.get()) || !add_loss_scale(module.get())) return 0;
  for (const Constant& constant : constants()) {
    const std::string name(constant.name);
    if (PyModule_AddIntConstant(module.get(), name.c_str(), static_cast<long>(constant.value)) != 0) return 0;
  }
  return reinterpret_cast<size_t>(module.release());
}

}  // namespace flexmodel
