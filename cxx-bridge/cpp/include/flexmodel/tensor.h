// Describing tensors and copying them out.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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

// See ffi.rs.
struct Place;

// The handle of this thread's stream on a device, by which Rust knows it. torch's own events are not used: they set a thread's
// device back by its number, which makes a context on device 0 for a thread that has none (DEVICE-1).
size_t stream_on(c10::Device device);

// Whether what this thread does on a device goes into a CUDA graph that the job captures, and is not done now.
bool is_in_graph(c10::Device device);

// Memory for `sizes` that no deterministic mode fills, on the current device where it is on one.
at::Tensor room(at::IntArrayRef sizes, c10::ScalarType type, c10::DeviceType device);

// The code of a torch type, which Rust knows by its name; 0 for one that has none.
uint8_t code_of(c10::ScalarType type);
std::optional<c10::ScalarType> dtype_of(uint8_t code);

// Why `tensor` cannot be read. `python_type` is the name of its Python class.
Refusal refusal_of(const at::Tensor& tensor, const char* python_type);

// A digest of the sizes and of some elements of a tensor that can be read, never 0; equal where the bytes are. 0: none can
// be taken, as while a CUDA graph is captured. For a device it waits until the tensor is there.
uint32_t digest_of(const at::Tensor& tensor);

// See ffi.rs.
Place place_of(const at::Tensor& tensor);
bool is_plain(const at::Tensor& tensor, uint8_t dtype);
void copy_out(const at::Tensor& tensor, uint8_t dtype, uint64_t first, uint64_t count, uint8_t* destination);
std::unique_ptr<at::Tensor> snapshot(const at::Tensor& tensor, uint8_t dtype, uint64_t first, uint64_t count);

}  // namespace flexmodel
