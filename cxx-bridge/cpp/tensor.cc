// Describing tensors and copying them out.
#include "flexmodel/tensor.h"

#include "flexmodel/ffi.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/take.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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

// The elements at these positions, in row-major order, of a tensor on a device: no more of it comes to the host. It is waited
// for by an event of ours, since the job may have torch refuse whatever waits (torch.cuda.set_sync_debug_mode).
at::Tensor elements_at(const at::Tensor& source, const std::vector<int64_t>& positions) {
  constexpr ScalarType kOfSize[] = {ScalarType::Byte, ScalarType::Short, ScalarType::Int, ScalarType::Long};
  const auto item = static_cast<size_t>(source.element_size());
  const auto* size = std::find_if(std::begin(kOfSize), std::end(kOfSize),
                                  [item](ScalarType type) { return c10::elementSize(type) == item; });
  const rust::Box<Apart> apart = aside(source.device().index());
  const c10::DeviceGuard on(source.device());
  const auto count = static_cast<int64_t>(positions.size());
  at::Tensor where = room({count}, ScalarType::Long, c10::DeviceType::CPU);
  std::copy(positions.begin(), positions.end(), where.mutable_data_ptr<int64_t>());
  const at::Tensor some = at::take(source.view(*size), where.to(source.device(), /*non_blocking=*/true));
  at::Tensor out = room({count}, *size, c10::DeviceType::CPU);
  out.copy_(some, /*non_blocking=*/true);
  recorded(source.device().index(), stream_on(source.device()))->wait();
  return out;
}

ScalarType known(uint8_t dtype) {
  const auto type = dtype_of(dtype);
  TORCH_CHECK(type.has_value(), "unknown element type ", static_cast<int>(dtype));
  return *type;
}

// wire::env::TEST_GRAPH: whether the CPU is a device now that is captured into a CUDA graph.
bool stands_in() {
  constexpr const char* name = "FLEXMODEL_TEST_GRAPH";
  static const bool does = std::getenv(name) != nullptr;
  const char* const now = does ? std::getenv(name) : nullptr;
  return now != nullptr && std::strcmp(now, "1") == 0;
}

}  // namespace

size_t stream_on(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return reinterpret_cast<size_t>(guard.getStream(device).native_handle());
}

bool is_in_graph(c10::Device device) {
  if (!device.is_cuda()) return device.is_cpu() && stands_in();
  return is_capturing(device.index(), stream_on(device));
}

at::Tensor room(at::IntArrayRef sizes, ScalarType type, c10::DeviceType device) {
  const bool on_cpu = device == c10::DeviceType::CPU;
  const c10::DispatchKey key = on_cpu ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  // The job may have put another one in the place of the device's (torch.cuda.memory.change_current_allocator).
  c10::Allocator* const from = on_cpu ? c10::GetAllocator(device) : at::detail::getCUDAHooks().getCUDADeviceAllocator();
  return at::detail::empty_generic(sizes, from, c10::DispatchKeySet(key), type, std::nullopt);
}

Place place_of(const at::Tensor& tensor) {
  const c10::Device device = tensor.device();
  return device.is_cpu() ? Place{-1, 0} : Place{device.index(), stream_on(device)};
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
  const int64_t step = std::max<int64_t>(1, source.numel() / kElements);
  std::vector<int64_t> positions;
  for (int64_t n = 0; n * step < source.numel(); ++n) {
    // Not in one column, which may be the same in all batches.
    const auto index = n * step + static_cast<int64_t>((static_cast<uint64_t>(n) * kPrime >> 32) % step);
    if (index >= source.numel()) break;
    positions.push_back(index);
  }
  if (!source.device().is_cpu() && !positions.empty()) {
    if (is_in_graph(source.device())) return 0;
    if (static_cast<size_t>(source.element_size()) > sizeof(int64_t) || source.is_conj() || source.is_neg()) {
      source = source.cpu();
    } else {
      source = elements_at(source, positions);
      std::iota(positions.begin(), positions.end(), 0);
    }
  }
  const size_t item = source.element_size();
  const auto* bytes = static_cast<const uint8_t*>(source.const_data_ptr());
  for (int64_t index : positions) {
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

void copy_out(const at::Tensor& tensor, uint8_t dtype, uint64_t first, uint64_t count, uint8_t* destination) {
  const ScalarType type = known(dtype);
  const Unseen unseen;
  if (is_plain(tensor, dtype)) {
    const size_t item = tensor.element_size();
    const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
    std::memcpy(destination, bytes + first * item, count * item);
    return;
  }
  const auto length = static_cast<int64_t>(count);
  copy_range(tensor, static_cast<int64_t>(first), at::from_blob(destination, {length}, at::TensorOptions().dtype(type)));
}

std::unique_ptr<at::Tensor> snapshot(const at::Tensor& tensor, uint8_t dtype, uint64_t first, uint64_t count) {
  const ScalarType type = known(dtype);
  const Unseen unseen;
  const c10::DeviceGuard on(tensor.device());
  at::Tensor copy = room({static_cast<int64_t>(count)}, type, tensor.device().type());
  copy_range(tensor, static_cast<int64_t>(first), copy);
  return std::make_unique<at::Tensor>(std::move(copy));
}

}  // namespace flexmodel
