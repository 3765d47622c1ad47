// The store of the job's process group, over a connection of ours.
#pragma once

#include "flexmodel/py.h"

#include <cstdint>
#include <memory>
#include <string>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "rust/cxx.h"

namespace flexmodel {

struct Message;

// Used by one thread at a time, without the GIL.
class Store {
 public:
  explicit Store(c10::intrusive_ptr<c10d::Store> store) : store_(std::move(store)) {}

  // Gives a key this value if it has none; the value that it has.
  Message settle(rust::Str key, rust::Slice<const uint8_t> value) const;
  // The value of a key; nothing if it has none.
  rust::Vec<Message> look(rust::Str key) const;

 private:
  c10::intrusive_ptr<c10d::Store> store_;
};

// Of a c10d store, a Python object; null with a Python error set. Needs the GIL.
std::unique_ptr<Store> open_store(PyObject* store);

}  // namespace flexmodel
