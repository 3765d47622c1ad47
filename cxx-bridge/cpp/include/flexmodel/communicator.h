// A communicator of our own among the ranks of a job.
#pragma once

#include "flexmodel/py.h"

#include <cstdint>
#include <memory>

#include "rust/cxx.h"

namespace flexmodel {

struct Message;
struct Move;

// Used by one thread at a time, and cut from any. After an exception it is of no use any more.
class Communicator {
 public:
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  virtual ~Communicator() = default;

  // Sends `mine` to all members; the message of each, in order.
  virtual rust::Vec<Message> exchange(rust::Slice<const uint8_t> mine) const = 0;
  // Carries out moves between tensors of the CPU.
  virtual void transfer(const rust::Vec<Move>& moves) const = 0;
  // Makes what is under way fail.
  virtual void cut() const = 0;
};

// Over a c10d backend for tensors of the CPU, a Python object; null with a Python error set. Needs the GIL.
std::unique_ptr<Communicator> over_backend(PyObject* backend);

}  // namespace flexmodel
