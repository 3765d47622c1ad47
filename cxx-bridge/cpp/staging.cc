// Makes tensors of our own, which other ranks get, or got from them.
#include "flexmodel/staging.h"

#include "flexmodel/ffi.h"
#include "flexmodel/tensor.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>

#include <utility>
#include <vector>

namespace flexmodel {
namespace {

// One of ours, which torch's pool does not have: as torch makes a stream of a handle that is not its own.
c10::Stream stream_of(const Place& place) {
  const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(place.device));
  return c10::Stream(c10::Stream::UNSAFE, device, static_cast<c10::StreamId>(place.stream));
}

at::Tensor room_for(at::IntArrayRef sizes, uint8_t dtype, c10::DeviceType device) {
  const auto type = dtype_of(dtype);
  TORCH_CHECK(type.has_value(), "unknown element type ", static_cast<int>(dtype));
  return room(sizes, *type, device);
}

}  // namespace

std::unique_ptr<at::Tensor> stage(const at::Tensor& tensor, uint8_t dtype) {
  const Unseen unseen;
  const c10::DeviceGuard on(tensor.device());
  at::Tensor staged = room_for(tensor.sizes(), dtype, tensor.device().type());
  staged.copy_(tensor, /*non_blocking=*/true);
  return std::make_unique<at::Tensor>(std::move(staged));
}

bool is_on_device(const at::Tensor& tensor) { return !tensor.device().is_cpu(); }

size_t elements_of(const at::Tensor& tensor) { return static_cast<size_t>(tensor.numel()); }

size_t address_of(const at::Tensor& tensor) { return reinterpret_cast<size_t>(tensor.const_data_ptr()); }

size_t bytes_of(const at::Tensor& tensor) { return tensor.nbytes(); }

std::unique_ptr<at::Tensor> view_of(const at::Tensor& tensor, rust::Slice<const Cut> cuts) {
  const Unseen unseen;
  TORCH_CHECK(static_cast<size_t>(tensor.dim()) == cuts.size(), "a slice of another number of dimensions");
  at::Tensor view = tensor;
  // From the last on, since those behind a position that is taken move.
  for (auto dim = static_cast<int64_t>(cuts.size()) - 1; dim >= 0; --dim) {
    const Cut& cut = cuts[static_cast<size_t>(dim)];
    const auto start = static_cast<int64_t>(cut.start), len = static_cast<int64_t>(cut.len), step = static_cast<int64_t>(cut.step);
    view = cut.keeps ? view.slice(dim, start, len == 0 ? start : start + (len - 1) * step + 1, step) : view.select(dim, start);
  }
  return std::make_unique<at::Tensor>(std::move(view));
}

std::unique_ptr<at::Tensor> share(const at::Tensor& tensor) { return std::make_unique<at::Tensor>(tensor); }

std::unique_ptr<at::Tensor> receiver(uint8_t dtype, rust::Slice<const uint64_t> sizes, Place place) {
  const Unseen unseen;
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  if (place.device < 0) return std::make_unique<at::Tensor>(room_for(shape, dtype, c10::DeviceType::CPU));
  // Memory belongs to the stream that it was asked for on: another one's may be in use by work of the job's that is still
  // to come.
  const c10::StreamGuard on(stream_of(place));
  return std::make_unique<at::Tensor>(room_for(shape, dtype, c10::DeviceType::CUDA));
}

}  // namespace flexmodel
