// Describing tensors and copying them out.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "flexmodel/host.h"
#include "rust/cxx.h"

namespace flexmodel {

using Tensor = at::Tensor;

// Our own operations are nobody's business: no autograd, no autocast, no dispatch mode of the job sees them.
struct Unseen {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard python{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                           c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                           c10::DispatchKey::FuncTorchDynamicLayerBackMode}) |
      c10::autocast_dispatch_keyset};
};

// What a thread of ours does is no part of a CUDA graph that a thread of the job is capturing. CUDA would see it as one,
// in torch's default way of capturing, and fail the capture if it is an allocation or the query of an event.
class Uncaptured {
 public:
  Uncaptured();
  ~Uncaptured();
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  uint32_t before_;
};

// A copy from a device that is under way. Owns what the copy reads.
class Ticket {
 public:
  Ticket(at::Tensor source, c10::Event done) : source_(std::move(source)), done_(std::move(done)) {}
  // Blocks until the bytes are there. Does not need the GIL.
  void wait() const;
  // Whether they are.
  bool has_come() const { return done_.query(); }

 private:
  at::Tensor source_;
  mutable c10::Event done_;
};

// The stream that copies and transfers leave a device on.
c10::Stream side_stream(c10::Device device);

// Refuses the stream of a job's that is being captured into a CUDA graph: what is put on it would be replayed into
// memory that is long somebody else's, and break the capture.
void expect_no_capture(const c10::impl::VirtualGuardImpl& guard, c10::Device device);

// The code of a torch type, which Rust knows by its name; 0 for one that has none.
uint8_t code_of(c10::ScalarType type);
std::optional<c10::ScalarType> dtype_of(uint8_t code);

// Why `tensor` cannot be read. `python_type` is the name of its Python class.
Refusal refusal_of(const at::Tensor& tensor, const char* python_type);

// A digest of the sizes and of some elements of a tensor that can be read, never 0; equal where the bytes are. 0: none can
// be taken, as while a CUDA graph is captured. For a device it waits until the tensor is there.
uint32_t digest_of(const at::Tensor& tensor);

// See ffi.rs.
bool is_plain(const at::Tensor& tensor, uint8_t dtype);
std::unique_ptr<Ticket> copy_out(const at::Tensor& tensor, bool staged, uint8_t dtype, uint64_t first, uint64_t count,
                                 uint8_t* destination);

}  // namespace flexmodel
