// The operations that taps are in graphs of torch.compile, as they run.
#include "flexmodel/py.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "flexmodel/compiled.h"
#include "flexmodel/gradients.h"
#include "flexmodel/tap.h"

namespace flexmodel {
namespace {

// A call as a tensor: its own words, and then for every leaf how many of its gradients came.
constexpr size_t kWords = kCallWords;
static_assert(std::is_trivially_copyable_v<Call>);

bool has(int64_t flags, Flag flag) { return (flags & code(flag)) != 0; }

at::Tensor packed(const Call& call, at::TensorList leaves) {
  const auto on_device = std::find_if(leaves.begin(), leaves.end(), [](const at::Tensor& leaf) { return leaf.is_cuda(); });
  const Unseen unseen;
  at::Tensor words = at::zeros({static_cast<int64_t>(kWords + leaves.size())}, at::TensorOptions().dtype(at::kLong));
  auto* const at = words.mutable_data_ptr<int64_t>();
  std::memcpy(at, &call, sizeof(Call));
  at[kDeviceWord] = on_device == leaves.end() ? -1 : on_device->get_device();
  return words;
}

Call unpacked(const at::Tensor& words) {
  Call call{};
  TORCH_CHECK(words.is_cpu() && words.numel() >= static_cast<int64_t>(kWords), "a call that is none");
  std::memcpy(static_cast<void*>(&call), words.const_data_ptr<int64_t>(), sizeof(Call));
  return call;
}

// Of the tensors of a call.
c10::Device device_in(const at::Tensor& words) {
  const int64_t index = words.const_data_ptr<int64_t>()[kDeviceWord];
  if (index < 0) return c10::Device(c10::DeviceType::CPU);
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

Trigger trigger(const std::optional<at::Tensor>& first, int64_t flags) {
  Trigger f{};
  f.pre = has(flags, Flag::Before);
  f.replay = torch::autograd::get_current_graph_task_id() != -1;
  f.grad_enabled = has(flags, Flag::Gradients);
  f.train = has(flags, Flag::Training);
  f.recomputes = f.grad_enabled && at::SavedTensorDefaultHooks::is_enabled() &&
                 at::SavedTensorDefaultHooks::get_hooks().has_value();
  std::fill(std::begin(f.first), std::end(f.first), -1);
  std::fill(std::begin(f.collectives), std::end(f.collectives), -1);
  if (first && refusal_of(*first, nullptr) == Refusal::None) {
    for (int64_t dim = 0; dim < std::min<int64_t>(first->dim(), 3); ++dim) f.first[dim] = first->size(dim);
  }
  return f;
}

at::Tensor tap_op(const at::Tensor& number, at::TensorList leaves, c10::List<std::string> paths,
                  c10::List<std::string> layouts, at::IntArrayRef refusals, const std::optional<at::Tensor>& first,
                  int64_t flags, c10::List<std::string> split) {
  Call call{};
  guarded_operation([&] {
    const int64_t tap = number.const_data_ptr<int64_t>()[0];
    Trigger now = trigger(first, flags);
    now.split = !split.empty();
    if (tap < 0 || !host().triggered(static_cast<uint32_t>(tap), &now, &call)) {
      call = Call{};
      return;
    }
    for (const std::string& path : split) {
      Part lost;
      lost.local = number;
      capture(Site(call), KINDS_OF_INPUT_GRADIENTS, path, 0, lost, Refusal::Split);
    }
    const uint32_t kinds = has(flags, Flag::Before) ? KINDS_OF_INPUTS : KINDS_OF_OUTPUTS;
    if ((call.capture & kinds) == 0) return;
    for (size_t i = 0; i < leaves.size(); ++i) {
      const auto name = [&] { return paths.get(i) + " of a compiled module"; };
      Part part = part_or_refusal(leaves[i], [&] { return part_of(leaves[i], false); }, name);
      part.axes = axes_of(layouts.get(i));
      attempt([&] { capture(Site(call), kinds, paths.get(i), 0, part, static_cast<Refusal>(refusals[i])); }, name);
    }
  });
  return packed(call, leaves);
}

void gradient_op(const at::Tensor& words, const at::Tensor& gradient, int64_t slot, int64_t kinds, c10::string_view path,
                 c10::string_view layout, int64_t refusal) {
  guarded_operation([&] {
    const Call call = unpacked(words);
    if ((call.capture & kinds) == 0) return;
    // Nobody else looks at what is behind the words.
    int64_t& came = words.mutable_data_ptr<int64_t>()[kWords + slot];
    const auto name = [&] { return std::string(path) + " of a compiled module, its gradient"; };
    Part part = part_or_refusal(gradient, [&] { return part_of(gradient, false); }, name);
    part.axes = axes_of(std::string(layout));
    capture(Site(call), static_cast<uint32_t>(kinds), std::string(path), static_cast<uint32_t>(came++), part,
            static_cast<Refusal>(refusal));
  });
}

// What to multiply a leaf with, and then whether to zero it.
at::Tensor factors_op(const at::Tensor& words, int64_t kinds, c10::string_view path) {
  LeafEdit edit{1, false};
  guarded_operation([&] {
    const Call call = unpacked(words);
    const uint32_t edited = call.edit & static_cast<uint32_t>(kinds);
    if (edited != 0) edit = host().edit(&call, edited, str({path.data(), path.size()}), is_in_graph(device_in(words)));
  });
  const Unseen unseen;
  at::Tensor out = at::empty({2}, at::TensorOptions().dtype(at::kDouble));
  out.mutable_data_ptr<double>()[0] = edit.factor;
  out.mutable_data_ptr<double>()[1] = edit.zero ? 1.0 : 0.0;
  return out;
}

void forward_pass_op(const at::Tensor& number, const std::optional<at::Tensor>& first, int64_t flags) {
  guarded_operation([&] {
    // The model, the part, and the digest of its first input on a device; nobody else reads this tensor.
    int64_t* numbers = number.mutable_data_ptr<int64_t>();
    if (numbers[0] < 0) return;
    const bool pre = has(flags, Flag::Before);
    Trigger now = trigger(first, flags);
    if (pre && first) {
      auto first_digest = static_cast<uint32_t>(numbers[2]);
      now.input_digest = input_digest(*first, nullptr, now, first_digest);
      numbers[2] = first_digest;
    }
    const auto serial = static_cast<uint64_t>(numbers[0]);
    if (pre || numbers[1] == 0) count_collectives(serial, now);
    if (host().pass(serial, static_cast<uint64_t>(numbers[1]), pre, &now)) capture_parameters(serial);
    if (!pre) turn_if_due();
  });
}

TORCH_LIBRARY(flexmodel, library) {
  // A replayed CUDA graph would not call them: inductor leaves them out of its own. Wrapped as effects they lose the tag
  // there, and the device of the first tensor decides: of each it is on the CPU.
  const std::vector<at::Tag> tags = {at::Tag::cudagraph_unsafe};
  library.def("tap(Tensor number, Tensor[] leaves, str[] paths, str[] layouts, int[] refusals, Tensor? first, int flags, "
              "str[] split) -> Tensor", tags);
  library.def("gradient(Tensor call, Tensor gradient, int slot, int kinds, str path, str layout, int refusal) -> ()", tags);
  library.def("factors(Tensor call, int kinds, str path) -> Tensor", tags);
  library.def("forward_pass(Tensor number, Tensor? first, int flags) -> ()", tags);
}

TORCH_LIBRARY_IMPL(flexmodel, CompositeExplicitAutograd, library) {
  library.impl("tap", tap_op);
  library.impl("gradient", gradient_op);
  library.impl("factors", factors_op);
  library.impl("forward_pass", forward_pass_op);
}

TORCH_LIBRARY_IMPL(flexmodel, Autograd, library) {
  for (const char* name : {"tap", "gradient", "factors", "forward_pass"}) {
    library.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

}  // namespace flexmodel
