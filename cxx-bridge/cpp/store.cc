// What ranks of several nodes decide in.
#include "flexmodel/store.h"

#include <torch/csrc/utils/pybind.h>

#include <utility>
#include <vector>

#include "flexmodel/ffi.h"

namespace flexmodel {
namespace {

Message message(const std::vector<uint8_t>& value) {
  Message message;
  message.bytes.reserve(value.size());
  for (const uint8_t byte : value) message.bytes.push_back(byte);
  return message;
}

}  // namespace

Message Store::settle(rust::Str key, rust::Slice<const uint8_t> value) const {
  // A key that is not there is equal to nothing; with anything else as what is expected, nothing would be set.
  return message(store_->compareSet(std::string(key), {}, std::vector<uint8_t>(value.begin(), value.end())));
}

rust::Vec<Message> Store::look(rust::Str key) const {
  rust::Vec<Message> found;
  const std::string name(key);
  if (store_->check({name})) found.push_back(message(store_->get(name)));
  return found;
}

std::unique_ptr<Store> open_store(PyObject* store) {
  try {
    return std::make_unique<Store>(py::cast<c10::intrusive_ptr<c10d::Store>>(py::handle(store)));
  } catch (const py::cast_error& e) {
    PyErr_SetString(PyExc_TypeError, e.what());
    return nullptr;
  }
}

}  // namespace flexmodel
