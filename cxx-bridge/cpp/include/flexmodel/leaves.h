// The tensor leaves of what a module takes and returns.
#pragma once

#include "flexmodel/py.h"

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace flexmodel {

// Sees a leaf and its path; returns what takes its place, or nothing to leave it.
using Visitor = std::function<Ref(PyObject* leaf, const std::string& path)>;

// Whether it is a tensor. By its type: what it says of its class, as proxies do, is the job's own.
bool is_tensor(PyObject* value);

// What was put into containers that belong to the job, so that it can be taken out again.
class Undo {
 public:
  void note(PyObject* container, PyObject* key, PyObject* original, PyObject* replacement, bool attribute);
  // Puts each original back, where the replacement is still in its place.
  void restore();
  // What was noted of this container stays as it is.
  void forget(PyObject* container);
  bool empty() const { return entries_.empty(); }

 private:
  struct Entry {
    Ref container, key, original, replacement;
    bool attribute;
  };
  std::vector<Entry> entries_;
};

// Visits every tensor in `value`: tuples and namedtuples, lists, dicts (ModelOutput too) and dataclasses, nested, up to a
// bound of which a notice tells. Other objects have no leaves. Tuples are rebuilt where a leaf is replaced; other containers are changed in place, which
// `undo` notes if it is given. Returns the new value, or nothing if `value` stays. What raises of a container of the module
// `name` costs that value, see faults.h.
Ref map_leaves(const std::string& name, PyObject* value, std::string& path, const Visitor& visit, Undo* undo);

// The first tensor with a dimension among the first values in `value`, borrowed; null if there is none.
PyObject* first_tensor(PyObject* value);

// How many there are in the list of images, or of tensors of different lengths, that a module is given first: as many as are in
// its batch. Nothing where it is given no such list.
std::optional<int64_t> listed_batch(PyObject* args, PyObject* kwargs);

}  // namespace flexmodel
