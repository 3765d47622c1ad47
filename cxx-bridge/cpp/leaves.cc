// The tensor leaves of what a module takes and returns.
#include "flexmodel/leaves.h"

#include <torch/csrc/autograd/python_variable.h>

namespace flexmodel {
namespace {

// Deeper than any real structure; an object that contains itself ends here.
constexpr int kMaxDepth = 32;

Ref checked(PyObject* object) {
  if (object == nullptr) throw PyError{};
  return Ref(object);
}

void checked(int status) {
  if (status < 0) throw PyError{};
}

// Extends the path for the time it lives.
class Step {
 public:
  Step(std::string& path, const std::string& step) : path_(path), length_(path.size()) { path_ += step; }
  ~Step() { path_.resize(length_); }

 private:
  std::string& path_;
  size_t length_;
};

std::string utf8(PyObject* text) {
  const char* bytes = PyUnicode_AsUTF8(text);
  if (bytes == nullptr) throw PyError{};
  return bytes;
}

std::string index_step(Py_ssize_t index) { return "[" + std::to_string(index) + "]"; }

std::string key_step(PyObject* key) {
  if (PyUnicode_Check(key)) return "." + utf8(key);
  Ref text = checked(PyObject_Str(key));
  return "[" + utf8(text.get()) + "]";
}

// The attribute's value, or nothing if there is none.
Ref attribute(PyObject* object, const char* name) {
  PyObject* value = PyObject_GetAttrString(object, name);
  if (value == nullptr) PyErr_Clear();
  return Ref(value);
}

class Walk {
 public:
  Walk(std::string& path, const Visitor& visit, Undo* undo) : path_(path), visit_(visit), undo_(undo) {}

  Ref value(PyObject* value, int depth) {
    if (THPVariable_Check(value)) return visit_(value, path_);
    if (depth >= kMaxDepth) return Ref();
    if (PyTuple_Check(value)) return tuple(value, depth);
    if (PyList_Check(value)) return list(value, depth);
    if (PyDict_Check(value)) return dict(value, depth);
    if (!PyType_Check(value) && PyObject_HasAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__dataclass_fields__")) {
      return dataclass(value, depth);
    }
    return Ref();
  }

 private:
  Ref tuple(PyObject* value, int depth) {
    Ref fields = PyTuple_CheckExact(value) ? Ref() : attribute(value, "_fields");
    const bool named = fields && PyTuple_Check(fields.get());
    const Py_ssize_t size = PyTuple_GET_SIZE(value);
    Ref items;
    for (Py_ssize_t i = 0; i < size; ++i) {
      const bool has_name = named && i < PyTuple_GET_SIZE(fields.get());
      Step step(path_, has_name ? "." + utf8(PyTuple_GET_ITEM(fields.get(), i)) : index_step(i));
      Ref item = this->value(PyTuple_GET_ITEM(value, i), depth + 1);
      if (!item) continue;
      if (!items) items = checked(PySequence_List(value));
      checked(PyList_SetItem(items.get(), i, item.release()));
    }
    if (!items) return Ref();
    if (PyTuple_CheckExact(value)) return checked(PyList_AsTuple(items.get()));
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (named) return checked(PyObject_CallMethod(type, "_make", "O", items.get()));
    return checked(PyObject_CallOneArg(type, items.get()));
  }

  Ref list(PyObject* value, int depth) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) {
      Step step(path_, index_step(i));
      Ref old = Ref::borrow(PyList_GET_ITEM(value, i));
      Ref item = this->value(old.get(), depth + 1);
      if (!item || item.get() == old.get()) continue;
      Ref key = checked(PyLong_FromSsize_t(i));
      checked(PyObject_SetItem(value, key.get(), item.get()));
      if (undo_ != nullptr) undo_->note(value, key.get(), old.get(), item.get(), false);
    }
    return Ref();
  }

  Ref dict(PyObject* value, int depth) {
    Ref keys = checked(PyDict_Keys(value));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(keys.get()); ++i) {
      PyObject* key = PyList_GET_ITEM(keys.get(), i);
      Ref old = Ref::borrow(PyDict_GetItemWithError(value, key));
      if (!old) {
        if (PyErr_Occurred() != nullptr) throw PyError{};
        continue;
      }
      Step step(path_, key_step(key));
      Ref item = this->value(old.get(), depth + 1);
      if (!item || item.get() == old.get()) continue;
      // Not PyDict_SetItem: a ModelOutput keeps its attributes in step with its items.
      checked(PyObject_SetItem(value, key, item.get()));
      if (undo_ != nullptr) undo_->note(value, key, old.get(), item.get(), false);
    }
    return Ref();
  }

  Ref dataclass(PyObject* value, int depth) {
    Ref fields = attribute(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__dataclass_fields__");
    if (!fields || !PyDict_Check(fields.get())) return Ref();
    Ref names = checked(PyDict_Keys(fields.get()));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names.get()); ++i) {
      PyObject* name = PyList_GET_ITEM(names.get(), i);
      Ref old(PyObject_GetAttr(value, name));
      if (!old) {
        PyErr_Clear();
        continue;
      }
      Step step(path_, "." + utf8(name));
      Ref item = this->value(old.get(), depth + 1);
      if (!item || item.get() == old.get()) continue;
      // Generic, since a frozen dataclass refuses its own __setattr__.
      checked(PyObject_GenericSetAttr(value, name, item.get()));
      if (undo_ != nullptr) undo_->note(value, name, old.get(), item.get(), true);
    }
    return Ref();
  }

  std::string& path_;
  const Visitor& visit_;
  Undo* undo_;
};

}  // namespace

void Undo::note(PyObject* container, PyObject* key, PyObject* original, PyObject* replacement, bool attribute) {
  entries_.push_back({Ref::borrow(container), Ref::borrow(key), Ref::borrow(original), Ref::borrow(replacement), attribute});
}

void Undo::restore() {
  for (const Entry& e : entries_) {
    Ref now(e.attribute ? PyObject_GetAttr(e.container.get(), e.key.get())
                        : PyObject_GetItem(e.container.get(), e.key.get()));
    if (now.get() == e.replacement.get()) {
      if (e.attribute) {
        PyObject_GenericSetAttr(e.container.get(), e.key.get(), e.original.get());
      } else {
        PyObject_SetItem(e.container.get(), e.key.get(), e.original.get());
      }
    }
    PyErr_Clear();
  }
  entries_.clear();
}

Ref map_leaves(PyObject* value, std::string& path, const Visitor& visit, Undo* undo) {
  return Walk(path, visit, undo).value(value, 0);
}

PyObject* first_tensor(PyObject* value) {
  PyObject* found = nullptr;
  std::string path;
  const Visitor visit = [&found](PyObject* leaf, const std::string&) {
    if (found == nullptr && THPVariable_Unpack(leaf).dim() > 0) found = leaf;
    return Ref();
  };
  map_leaves(value, path, visit, nullptr);
  return found;
}

}  // namespace flexmodel
