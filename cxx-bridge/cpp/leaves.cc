// The tensor leaves of what a module takes and returns.
#include "flexmodel/leaves.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "flexmodel/faults.h"
#include "flexmodel/host.h"

namespace flexmodel {
namespace {

// Deeper and larger than any real structure. Objects that refer to each other end here.
constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxValues = 10000;
// For a first look only: a tensor, if there is any, is among the first values.
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
  Ref value(PyObject_GetAttrString(object, name));
  if (value) return value;
  if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw PyError{};
  PyErr_Clear();
  return value;
}

class Walk {
 public:
  // `left` is how many values may be looked at; the visitor may change it.
  Walk(const std::string& name, std::string& path, const Visitor& visit, Undo* undo, size_t& left)
      : name_(name), path_(path), visit_(visit), undo_(undo), left_(left) {}

  Ref value(PyObject* value) {
    if (is_tensor(value)) return visit_(value, path_);
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
    return is_tensor(value) || PyTuple_Check(value) || PyList_Check(value) || PyDict_Check(value) || has_fields(value);
  }

  // Looks at one value of a container, `step()` away: what raises costs that value.
  template <typename Way, typename Body>
  void one(Way step, Body body) {
    const auto name = [this] { return name_.empty() ? name_ : name_ + " " + path_; };
    std::string way;
    if (!attempt([&] { way = step(); }, name)) return;
    const Step taken(path_, way);
    const size_t depth = above_.size();
    if (!attempt(body, name)) above_.resize(depth);
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
      const auto step = [&] {
        const bool has_name = named && i < PyTuple_GET_SIZE(fields.get());
        return has_name ? "." + utf8(PyTuple_GET_ITEM(fields.get(), i)) : index_step(i);
      };
      one(step, [&] {
        Ref item = this->value(PyTuple_GET_ITEM(value, i));
        if (!item) return;
        if (!items) items = checked(list_of(value));
        checked(PyList_SetItem(items.get(), i, item.release()));
      });
    }
    if (!items) return Ref();
    if (PyTuple_CheckExact(value)) return checked(PyList_AsTuple(items.get()));
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (named) return checked(PyObject_CallMethod(type, "_make", "O", items.get()));
    return checked(PyObject_CallOneArg(type, items.get()));
  }

  // The items of a tuple, whatever its class has iterating over it do.
  static PyObject* list_of(PyObject* tuple) {
    PyObject* list = PyList_New(PyTuple_GET_SIZE(tuple));
    for (Py_ssize_t i = 0; list != nullptr && i < PyTuple_GET_SIZE(tuple); ++i) {
      PyList_SET_ITEM(list, i, Ref::borrow(PyTuple_GET_ITEM(tuple, i)).release());
    }
    return list;
  }

  Ref list(PyObject* value) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value) && spend(); ++i) {
      Ref old = Ref::borrow(PyList_GET_ITEM(value, i));
      if (!holds(old.get())) continue;
      one([&] { return index_step(i); }, [&] {
        Ref item = this->value(old.get());
        if (!item || item.get() == old.get()) return;
        Ref key = checked(PyLong_FromSsize_t(i));
        checked(PyObject_SetItem(value, key.get(), item.get()));
        if (undo_ != nullptr) undo_->note(value, key.get(), old.get(), item.get(), false);
      });
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
    for (const auto& entry : items) {
      PyObject *key = entry.first.get(), *old = entry.second.get();
      one([&] { return key_step(key); }, [&] {
        Ref item = this->value(old);
        if (!item || item.get() == old) return;
        // Not PyDict_SetItem: a ModelOutput keeps its attributes in step with its items.
        checked(PyObject_SetItem(value, key, item.get()));
        if (undo_ != nullptr) undo_->note(value, key, old, item.get(), false);
      });
    }
    return Ref();
  }

  Ref dataclass(PyObject* value) {
    Ref fields = attribute(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__dataclass_fields__");
    if (!fields || !PyDict_Check(fields.get())) return Ref();
    Ref names = checked(PyDict_Keys(fields.get()));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names.get()) && spend(); ++i) {
      PyObject* name = PyList_GET_ITEM(names.get(), i);
      one([&] { return "." + utf8(name); }, [&] {
        Ref old(PyObject_GetAttr(value, name));
        if (!old && PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw PyError{};
        if (!old) return PyErr_Clear();  // it was not set
        if (!holds(old.get())) return;
        Ref item = this->value(old.get());
        if (!item || item.get() == old.get()) return;
        // Generic, since a frozen dataclass refuses its own __setattr__.
        checked(PyObject_GenericSetAttr(value, name, item.get()));
        if (undo_ != nullptr) undo_->note(value, name, old.get(), item.get(), true);
      });
    }
    return Ref();
  }

  const std::string& name_;
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

bool is_tensor(PyObject* value) {
  return THPVariable_CheckExact(value) ||
         PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

Ref map_leaves(const std::string& name, PyObject* value, std::string& path, const Visitor& visit, Undo* undo) {
  size_t left = kMaxValues;
  Ref result;
  Walk walk(name, path, visit, undo, left);
  attempt([&] { result = walk.value(value); }, [&] { return name + " " + path; });
  if (left == 0) {
    static std::atomic<bool> said{false};
    if (!said.exchange(true)) {
      notice("a tapped module takes or returns more than " + std::to_string(kMaxValues) + " values at '" + path +
             "'; the tensors behind them are not captured");
    }
  }
  return result;
}

std::optional<int64_t> listed_batch(PyObject* args, PyObject* kwargs) {
  PyObject* value = nullptr;
  if (args != nullptr && PyTuple_Check(args) && PyTuple_GET_SIZE(args) > 0) {
    value = PyTuple_GET_ITEM(args, 0);
  } else if (Py_ssize_t at = 0; kwargs == nullptr || !PyDict_Check(kwargs) || PyDict_Next(kwargs, &at, nullptr, &value) == 0) {
    return std::nullopt;
  }
  if (!PyList_Check(value)) return std::nullopt;
  const Py_ssize_t count = PyList_GET_SIZE(value);
  if (static_cast<size_t>(count) > kMaxValues) return std::nullopt;
  int64_t dims = -1, size = -1;
  bool alike = true;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PyList_GET_ITEM(value, i);
    if (!is_tensor(item)) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(item);
    if (tensor.unsafeGetTensorImpl()->is_python_dispatch() || tensor.is_nested()) return std::nullopt;
    if (tensor.dim() == 0 || (i > 0 && tensor.dim() != dims)) return std::nullopt;
    alike = alike && (i == 0 || tensor.size(0) == size);
    dims = tensor.dim();
    size = tensor.size(0);
  }
  // Channels of an image.
  const bool images = dims == 3 && alike && (size == 1 || size == 3 || size == 4);
  return images || (count > 0 && !alike) ? std::optional<int64_t>(count) : std::nullopt;
}

PyObject* first_tensor(PyObject* value) {
  PyObject* found = nullptr;
  // What raises is reported when all values are visited.
  const std::string name;
  std::string path;
  size_t left = kMaxFirst;
  const Visitor visit = [&found, &left](PyObject* leaf, const std::string&) {
    if (found == nullptr && THPVariable_Unpack(leaf).dim() > 0) {
      found = leaf;
      left = 0;
    }
    return Ref();
  };
  Walk walk(name, path, visit, nullptr, left);
  attempt([&] { walk.value(value); }, [&] { return name; });
  return found;
}

}  // namespace flexmodel
