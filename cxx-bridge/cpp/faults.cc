// What one leaf, container or gradient costs that raises when it is looked at: itself, and nothing else.
#include "flexmodel/faults.h"

#include <torch/csrc/Exceptions.h>

#include <exception>
#include <utility>

#include "flexmodel/gradients.h"

namespace flexmodel {
namespace {

PyObject* reason_of = nullptr;
PyObject* reporter = nullptr;

void keep(PyObject*& kept, PyObject* object) {
  Py_XINCREF(object);
  Py_XDECREF(std::exchange(kept, object));
}

// Why Python's exception, which is set, was raised. Clears it, unless it is the job's.
std::string why_python_raised() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  if (value != nullptr && trace != nullptr) PyException_SetTraceback(value, trace);
  const Ref owned_type(type), owned_value(value), owned_trace(trace);
  if (value == nullptr || reason_of == nullptr) return "a Python exception";
  const Ref text(PyObject_CallOneArg(reason_of, value));
  const char* words = text && PyUnicode_Check(text.get()) ? PyUnicode_AsUTF8(text.get()) : nullptr;
  if (words != nullptr) return words;
  // What came while we asked is the job's too.
  if (PyErr_Occurred() == nullptr) PyErr_SetObject(type, value);
  throw PyError{};
}

}  // namespace

void set_faults(PyObject* reason, PyObject* report) {
  keep(reason_of, reason);
  keep(reporter, report);
}

std::string why() {
  try {
    throw;
  } catch (const PyError&) {
    const Gil gil;  // whoever took it to call Python may have left it
    return why_python_raised();
  } catch (python_error& e) {
    const Gil gil;
    if (PyErr_Occurred() == nullptr) e.restore();
    return why_python_raised();
  } catch (const std::exception& e) {
    return reason(e);
  } catch (...) {
    return "an exception of an unknown kind";
  }
}

std::string why_in_torch() {
  try {
    return why();
  } catch (const PyError&) {
    python_error error;
    error.persist();
    throw error;
  }
}

void report(const std::string& name, const std::string& why) {
  if (name.empty()) return;
  const Gil gil;
  if (reporter == nullptr) return;
  const auto text = [](const std::string& s) {
    return Ref(PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "replace"));
  };
  const Ref words[] = {text(name), text(why)};
  const Ref answer(PyObject_CallFunctionObjArgs(reporter, words[0].get(), words[1].get(), nullptr));
  if (!answer) throw PyError{};
}

}  // namespace flexmodel
