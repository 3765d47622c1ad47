// What taps do to autograd graphs.
#include "flexmodel/gradients.h"

#include <ATen/ops/alias.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>

#include <atomic>
#include <memory>

#include "flexmodel/tensor.h"

namespace flexmodel {
namespace {

rust::Str view(const std::string& text) { return rust::Str(text.data(), text.size()); }

bool scales(const at::Tensor& tensor) { return tensor.is_floating_point() || tensor.is_complex(); }

}  // namespace

void capture(const Call& call, Kind kind, const std::string& path, uint32_t repeat, const at::Tensor& tensor,
             const char* python_type, Refusal because) {
  Refusal refusal = refusal_of(tensor, python_type);
  if (refusal == Refusal::None) refusal = because;
  const bool readable = refusal == Refusal::None || refusal == Refusal::SharedInput;
  const c10::IntArrayRef sizes = readable || refusal == Refusal::Sparse ? tensor.sizes() : c10::IntArrayRef();
  Leaf leaf{};
  leaf.dtype = dtype_code(tensor.scalar_type());
  leaf.refusal = static_cast<uint8_t>(refusal);
  leaf.requires_grad = tensor.requires_grad();
  capture(call, static_cast<uint32_t>(kind), view(path), repeat, leaf,
          rust::Slice<const int64_t>(sizes.data(), sizes.size()), tensor);
}

at::Tensor edited(const Call& call, Kind kind, const std::string& path, const at::Tensor& tensor) {
  if ((call.edit & bit(kind)) == 0) return {};
  const LeafEdit edit = flexmodel::edit(call, static_cast<uint32_t>(kind), view(path));
  if (edit.op == 1 && scales(tensor)) return at::mul(tensor, edit.factor);
  // Not a product with 0: that would keep NaN. The gradient through it is 0 as well.
  if (edit.op == 2) return at::masked_fill(tensor, at::ones({}, tensor.options().dtype(at::kBool).requires_grad(false)), 0);
  return {};
}

at::Tensor identity(const at::Tensor& tensor) { return at::alias(tensor); }

void watch_gradient(const Call& call, Kind kind, const std::string& path, const at::Tensor& tensor) {
  auto passes = std::make_shared<std::atomic<uint32_t>>(0);
  const auto hook = [call, kind, path, passes](const at::Tensor& gradient) -> at::Tensor {
    if (!gradient.defined() || !active()) return {};
    try {
      if ((call.capture & bit(kind)) != 0) capture(call, kind, path, passes->fetch_add(1), gradient, nullptr);
      return edited(call, kind, path, gradient);
    } catch (const std::exception& e) {
      fault(std::string("a gradient hook failed: ") + e.what());
    } catch (...) {
      fault("a gradient hook failed");
    }
    return {};
  };
  tensor.register_hook(hook);
}

}  // namespace flexmodel
