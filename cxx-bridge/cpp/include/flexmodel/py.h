// Python.h first, and an owning reference.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/Exceptions.h>

#include <exception>
#include <utility>

namespace flexmodel {

// Owns one reference. Needs the GIL throughout.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// Holds the GIL, on whatever thread.
class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

// Does not hold the GIL, which this thread has.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Python raised; its exception is set.
struct PyError {};

// Owns what a call into Python gave, or throws that it raised.
inline Ref checked(PyObject* object) {
  if (object == nullptr) throw PyError{};
  return Ref(object);
}

inline void checked(int status) {
  if (status < 0) throw PyError{};
}

// Runs `make` so that what it throws becomes a Python exception.
template <typename Make>
PyObject* into_python(Make make) {
  try {
    return make();
  } catch (const PyError&) {
    return nullptr;
  } catch (python_error& e) {
    if (PyErr_Occurred() == nullptr) e.restore();
    return nullptr;
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

}  // namespace flexmodel
