// Tensors of our own, which other ranks get, or got from them.
#include "flexmodel/staging.h"

#include "flexmodel/ffi.h"
#include "flexmodel/tensor.h"

#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>

#include <utility>
#include <vector>

namespace flexmodel {
namespace {

c10::Device device_of(int32_t index) {
  if (index < 0) return c10::Device(c10::DeviceType::CPU);
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

at::Tensor room(at::IntArrayRef sizes, uint8_t dtype, c10::Device device) {
  const auto type = dtype_of(dtype);
  TORCH_CHECK(type.has_value(), "unknown element type ", static_cast<int>(dtype));
  return at::empty(sizes, at::TensorOptions().dtype(*type).device(device));
}

}  // namespace

std::unique_ptr<at::Tensor> stage(const at::Tensor& tensor, uint8_t dtype) {
  const Unseen unseen;
  const c10::Device device = tensor.device();
  if (device.is_cpu()) {
    at::Tensor staged = room(tensor.sizes(), dtype, device);
    staged.copy_(tensor);
    return std::make_unique<at::Tensor>(std::move(staged));
  }
  const c10::impl::VirtualGuardImpl guard(device.type());
  expect_no_capture(guard, device);
  at::Tensor staged = room(tensor.sizes(), dtype, device);
  staged.copy_(tensor, /*non_blocking=*/true);
  const c10::Stream side = side_stream(device);
  c10::Event taken(device.type());
  taken.record(guard.getStream(device));
  taken.block(side);
  staged.record_stream(side);
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

std::unique_ptr<at::Tensor> receiver(uint8_t dtype, rust::Slice<const uint64_t> sizes, int32_t device) {
  const Unseen unseen;
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  if (device < 0) return std::make_unique<at::Tensor>(room(shape, dtype, device_of(device)));
  // Memory belongs to the stream that it was asked for on: another one's may be in use by work of the job's that is still
  // to come.
  const c10::StreamGuard on_side(side_stream(device_of(device)));
  const Uncaptured uncaptured;
  return std::make_unique<at::Tensor>(room(shape, dtype, device_of(device)));
}

size_t go_aside(int32_t index) {
  if (index < 0) return 0;
  // For good: the thread is ours.
  capture_mode(2);
  const c10::Device device = device_of(index);
  const c10::impl::VirtualGuardImpl guard(device.type());
  guard.setDevice(device);
  const c10::Stream side = side_stream(device);
  guard.exchangeStream(side);
  return reinterpret_cast<size_t>(side.native_handle());
}

std::unique_ptr<Ticket> mark(int32_t index) {
  if (index < 0) return nullptr;
  const c10::Device device = device_of(index);
  c10::Event done(device.type());
  done.record(side_stream(device));
  return std::make_unique<Ticket>(at::Tensor(), std::move(done));
}

}  // namespace flexmodel
