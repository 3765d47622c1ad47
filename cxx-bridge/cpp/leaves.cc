// The tensor leaves of what a module takes and returns.
#include "flexmodel/leaves.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "flexmodel/ffi.h"

namespace flexmodel {
namespace {

// Deeper and larger than any real structure. Objects that refer to each other end here.
constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxValues = 10000;
// For a first look only: where a tensor is given, it is among the first.
constexpr size_t kMaxFirst = 256;

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
  // `left` is how many values may be looked at; the visitor may change it.
  Walk(std::string& path, const Visitor& visit, Undo* undo, size_t& left)
      : path_(path), visit_(visit), undo_(undo), left_(left) {}

  Ref value(PyObject* value) {
    if (THPVariable_Check(value)) return visit_(value, path_);
    if (above_.size() >= kMaxDepth || std::find(above_.begin(), above_.end(), value) != above_.end()) return Ref();
    above_.push_back(value);
    Ref result = container(value);
    above_.pop_back();
    return result;
  }

 private:
  Ref container(PyObject* value) {
    if (PyTuple_Check(value)) return tuple(value);
    if (PyList_Check(value)) return list(value);
    if (PyDict_Check(value)) return dict(value);
    if (has_fields(value)) return dataclass(value);
    return Ref();
  }

  static bool has_fields(PyObject* value) {
    return !PyType_Check(value) &&
           PyObject_HasAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__dataclass_fields__") != 0;
  }

  // Whether there is anything to find in it: most of what is not is sorted out before its path is spelled.
  static bool holds(PyObject* value) {
    return THPVariable_Check(value) || PyTuple_Check(value) || PyList_Check(value) || PyDict_Check(value) || has_fields(value);
  }

  // Counts one value; false if no more may be looked at.
  bool spend() {
    if (left_ == 0) return false;
    --left_;
    return true;
  }

  Ref tuple(PyObject* value) {
    Ref fields = PyTuple_CheckExact(value) ? Ref() : attribute(value, "_fields");
    const bool named = fields && PyTuple_Check(fields.get());
    const Py_ssize_t size = PyTuple_GET_SIZE(value);
    Ref items;
    for (Py_ssize_t i = 0; i < size && spend(); ++i) {
      if (!holds(PyTuple_GET_ITEM(value, i))) continue;
      const bool has_name = named && i < PyTuple_GET_SIZE(fields.get());
      Step step(path_, has_name ? "." + utf8(PyTuple_GET_ITEM(fields.get(), i)) : index_step(i));
      Ref item = this->value(PyTuple_GET_ITEM(value, i));
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

  Ref list(PyObject* value) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value) && spend(); ++i) {
      Ref old = Ref::borrow(PyList_GET_ITEM(value, i));
      if (!holds(old.get())) continue;
      Step step(path_, index_step(i));
      Ref item = this->value(old.get());
      if (!item || item.get() == old.get()) continue;
      Ref key = checked(PyLong_FromSsize_t(i));
      checked(PyObject_SetItem(value, key.get(), item.get()));
      if (undo_ != nullptr) undo_->note(value, key.get(), old.get(), item.get(), false);
    }
    return Ref();
  }

  Ref dict(PyObject* value) {
    // Of the items that hold something: visiting them may run code that changes the dict.
    std::vector<std::pair<Ref, Ref>> items;
    PyObject *next_key = nullptr, *next_value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(value, &at, &next_key, &next_value) != 0 && spend();) {
      if (holds(next_value)) items.emplace_back(Ref::borrow(next_key), Ref::borrow(next_value));
    }
    for (const auto& [owned, old] : items) {
      PyObject* key = owned.get();
      Step step(path_, key_step(key));
      Ref item = this->value(old.get());
      if (!item || item.get() == old.get()) continue;
      // Not PyDict_SetItem: a ModelOutput keeps its attributes in step with its items.
      checked(PyObject_SetItem(value, key, item.get()));
      if (undo_ != nullptr) undo_->note(value, key, old.get(), item.get(), false);
    }
    return Ref();
  }

  Ref dataclass(PyObject* value) {
    Ref fields = attribute(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__dataclass_fields__");
    if (!fields || !PyDict_Check(fields.get())) return Ref();
    Ref names = checked(PyDict_Keys(fields.get()));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names.get()) && spend(); ++i) {
      PyObject* name = PyList_GET_ITEM(names.get(), i);
      Ref old(PyObject_GetAttr(value, name));
      if (!old) {
        PyErr_Clear();
        continue;
      }
      if (!holds(old.get())) continue;
      Step step(path_, "." + utf8(name));
      Ref item = this->value(old.get());
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
  size_t& left_;
  // The containers that the value lies in.
  std::vector<PyObject*> above_;
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

void Undo::forget(PyObject* container) {
  const auto its = [=](const Entry& e) { return e.container.get() == container; };
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), its), entries_.end());
}

Ref map_leaves(PyObject* value, std::string& path, const Visitor& visit, Undo* undo) {
  size_t left = kMaxValues;
  Ref result = Walk(path, visit, undo, left).value(value);
  if (left == 0) {
    static std::atomic<bool> told{false};
    if (!told.exchange(true)) {
      notice("a tapped module takes or returns more than " + std::to_string(kMaxValues) + " values at '" + path +
             "'; the tensors behind them are not captured");
    }
  }
  return result;
}

PyObject* first_tensor(PyObject* value) {
  PyObject* found = nullptr;
  std::string path;
  size_t left = kMaxFirst;
  const Visitor visit = [&found, &left](PyObject* leaf, const std::string&) {
    if (found == nullptr && THPVariable_Unpack(leaf).dim() > 0) {
      found = leaf;
      left = 0;
    }
    return Ref();
  };
  Walk(path, visit, nullptr, left).value(value);
  return found;
}

}  // namespace flexmodel
