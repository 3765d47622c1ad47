// Describing tensors and copying them out.
#include "flexmodel/tensor.h"

#include "flexmodel/ffi.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

namespace flexmodel {
namespace {

using c10::ScalarType;

using Codes = std::array<uint8_t, static_cast<size_t>(ScalarType::NumOptions)>;

// By torch's number of the type.
const Codes& codes() {
  static const Codes all = [] {
    Codes made{};
    // Of what is no type the name is an exception, which a sanitizer's preload may not survive.
    for (size_t type = 0; type < static_cast<size_t>(ScalarType::Undefined); ++type) {
      try {
        const std::string name(c10::getDtypeNames(static_cast<ScalarType>(type)).first);
        made[type] = dtype_code(rust::Str(name.data(), name.size()));
      } catch (const std::exception&) {
        // Torch has no name for it.
      }
    }
    return made;
  }();
  return all;
}

// Copies elements `first .. first + flat.numel()` of `source`, in row-major order, into the vector `flat`. A range of
// rows is a box with a part of a row before and after it, and so on inside these rows: no more than the range is copied.
void copy_range(const at::Tensor& source, int64_t first, const at::Tensor& flat) {
  const int64_t count = flat.numel();
  if (count == 0) return;
  if (first == 0 && count == source.numel()) {
    flat.view(source.sizes()).copy_(source);
    return;
  }
  const int64_t row = source.numel() / source.size(0);
  const int64_t last = first + count;
  for (int64_t at = first; at < last;) {
    const int64_t index = at / row, inside = at % row;
    if (inside == 0 && last - at >= row) {
      const int64_t rows = (last - at) / row;
      copy_range(source.narrow(0, index, rows), 0, flat.narrow(0, at - first, rows * row));
      at += rows * row;
    } else {
      const int64_t end = std::min(last, (index + 1) * row);
      copy_range(source.select(0, index), inside, flat.narrow(0, at - first, end - at));
      at = end;
    }
  }
}

// A copy of a vector on a stream of our own, so that the job does not wait for the bus. It must be ready there.
std::unique_ptr<Ticket> copy_aside(at::Tensor flat, uint8_t* destination) {
  const c10::Stream side = side_stream(flat.device());
  c10::Event done(flat.device().type());
  const c10::StreamGuard on_side(side);
  at::Tensor bytes =
      at::from_blob(destination, flat.sizes(), at::TensorOptions().dtype(flat.scalar_type()).pinned_memory(false));
  bytes.copy_(flat, /*non_blocking=*/true);
  done.record(side);
  return std::make_unique<Ticket>(std::move(flat), std::move(done));
}

// A snapshot on the job's stream first, so that a later in-place operation does not change the record.
std::unique_ptr<Ticket> copy_from_device(const at::Tensor& source, ScalarType type, int64_t first, int64_t count,
                                         uint8_t* destination) {
  const c10::Device device = source.device();
  const c10::impl::VirtualGuardImpl guard(device.type());
  expect_no_capture(guard, device);
  at::Tensor snapshot = at::empty({count}, at::TensorOptions().dtype(type).device(device));
  copy_range(source, first, snapshot);
  c10::Event taken(device.type());
  taken.record(guard.getStream(device));
  taken.block(side_stream(device));
  return copy_aside(std::move(snapshot), destination);
}

}  // namespace

c10::Stream side_stream(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = streams.find(device.index());
  if (found == streams.end()) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    found = streams.emplace(device.index(), guard.getStreamFromGlobalPool(device, false)).first;
  }
  return found->second;
}

void expect_no_capture(const c10::impl::VirtualGuardImpl& guard, c10::Device device) {
  TORCH_CHECK(!is_capturing(reinterpret_cast<size_t>(guard.getStream(device).native_handle())),
              "the stream is being captured into a CUDA graph");
}

uint8_t code_of(ScalarType type) {
  const auto at = static_cast<size_t>(type);
  return at < codes().size() ? codes()[at] : 0;
}

std::optional<ScalarType> dtype_of(uint8_t code) {
  const auto found = std::find(codes().begin(), codes().end(), code);
  if (code == 0 || found == codes().end()) return std::nullopt;
  return static_cast<ScalarType>(found - codes().begin());
}

Refusal refusal_of(const at::Tensor& tensor, const char* python_type) {
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys.has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                        c10::DispatchKey::Functionalize, c10::DispatchKey::Batched}))) {
    return Refusal::Functorch;
  }
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) {
    const std::string_view name = python_type == nullptr ? "" : python_type;
    if (name.find("DTensor") != std::string_view::npos) return Refusal::DTensor;
    return name.find("FakeTensor") != std::string_view::npos ? Refusal::Meta : Refusal::Subclass;
  }
  if (tensor.is_nested()) return Refusal::Nested;
  if (tensor.layout() != c10::kStrided) return Refusal::Sparse;
  if (tensor.is_quantized()) return Refusal::Quantized;
  if (tensor.device().is_meta()) return Refusal::Meta;
  if (!tensor.device().is_cpu() && !tensor.device().is_cuda()) return Refusal::Device;
  return code_of(tensor.scalar_type()) == 0 ? Refusal::Dtype : Refusal::None;
}

uint32_t digest_of(const at::Tensor& tensor) {
  // Enough to tell two batches apart, and few enough to cost nothing.
  constexpr int64_t kElements = 1024;
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15;
  Unseen unseen;
  uint64_t digest = static_cast<uint64_t>(tensor.scalar_type());
  const auto mix = [&](uint64_t word) {
    digest = (digest ^ word) * kPrime;
    digest ^= digest >> 32;
  };
  for (const int64_t size : tensor.sizes()) mix(static_cast<uint64_t>(size));
  at::Tensor source = tensor;
  if (!source.device().is_cpu()) {
    const c10::impl::VirtualGuardImpl guard(source.device().type());
    if (is_capturing(reinterpret_cast<size_t>(guard.getStream(source.device()).native_handle()))) return 0;
    source = source.cpu();
  }
  const int64_t step = std::max<int64_t>(1, source.numel() / kElements);
  const size_t item = source.element_size();
  const auto* bytes = static_cast<const uint8_t*>(source.const_data_ptr());
  for (int64_t n = 0; n * step < source.numel(); ++n) {
    // Not in one column, which may be the same in all batches.
    int64_t index = n * step + static_cast<int64_t>((static_cast<uint64_t>(n) * kPrime >> 32) % step);
    if (index >= source.numel()) break;
    int64_t offset = 0;
    for (int64_t dim = source.dim() - 1; dim >= 0; --dim) {
      offset += index % source.size(dim) * source.stride(dim);
      index /= source.size(dim);
    }
    for (size_t at = 0; at < item; at += sizeof(uint64_t)) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + offset * item + at, std::min(item - at, sizeof(word)));
      mix(word);
    }
  }
  return std::max<uint32_t>(1, static_cast<uint32_t>(digest));
}

bool is_plain(const at::Tensor& tensor, uint8_t dtype) {
  return tensor.device().is_cpu() && code_of(tensor.scalar_type()) == dtype && tensor.is_contiguous() &&
         !tensor.is_conj() && !tensor.is_neg();
}

std::unique_ptr<Ticket> copy_out(const at::Tensor& tensor, bool staged, uint8_t dtype, uint64_t first, uint64_t count,
                                 uint8_t* destination) {
  const auto type = dtype_of(dtype);
  TORCH_CHECK(type.has_value(), "unknown element type ", static_cast<int>(dtype));
  Unseen unseen;
  if (is_plain(tensor, dtype)) {
    const size_t item = tensor.element_size();
    const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
    std::memcpy(destination, bytes + first * item, count * item);
    return nullptr;
  }
  const auto from = static_cast<int64_t>(first), length = static_cast<int64_t>(count);
  // Row-major, as it was asked for. The stream of this thread, which is not the job's, knows nothing of it.
  if (!tensor.device().is_cpu() && staged) return copy_aside(tensor.view({-1}).narrow(0, from, length), destination);
  if (!tensor.device().is_cpu()) return copy_from_device(tensor, *type, from, length, destination);
  copy_range(tensor, from, at::from_blob(destination, {length}, at::TensorOptions().dtype(*type)));
  return nullptr;
}

Uncaptured::Uncaptured() : before_(capture_mode(2)) {}

Uncaptured::~Uncaptured() { capture_mode(before_); }

void Ticket::wait() const {
  const Uncaptured uncaptured;
  // Looked at now and then: waiting for the event itself would keep a core busy.
  while (!done_.query()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

}  // namespace flexmodel
