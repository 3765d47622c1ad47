// What taps do to autograd graphs.
#include "flexmodel/gradients.h"

#include <ATen/ops/alias.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>

#include <atomic>
#include <memory>
#include <utility>

namespace flexmodel {
namespace {

rust::Str view(const std::string& text) { return rust::Str(text.data(), text.size()); }

bool scales(const at::Tensor& tensor) { return tensor.is_floating_point() || tensor.is_complex(); }

// On the node that computed a tensor: sees the tensor's gradient before the node does. Not by `register_hook`, whose
// hooks compiled autograd refuses.
class Receiver final : public torch::autograd::FunctionPreHook {
 public:
  Receiver(const Call& call, Kind kind, std::string path, uint32_t number)
      : call_(call), kind_(kind), path_(std::move(path)), number_(number) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
    torch::autograd::variable_list out = gradients;
    if (number_ < out.size() && out[number_].defined()) {
      guarded_gradient([&] {
        if ((call_.capture & bit(kind_)) != 0) capture(call_, kind_, path_, repeat_++, out[number_], nullptr);
        at::Tensor now = edited(call_, kind_, path_, out[number_]);
        if (now.defined()) out[number_] = std::move(now);
      });
    }
    return out;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { tell_of_compiled_autograd(); }

 private:
  const Call call_;
  const Kind kind_;
  const std::string path_;
  const uint32_t number_;
  std::atomic<uint32_t> repeat_ = 0;
};

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
  tensor.grad_fn()->add_tensor_pre_hook(std::make_unique<Receiver>(call, kind, path, tensor.output_nr()));
}

void tell_of_compiled_autograd() {
  static std::atomic<bool> told = false;
  if (!told.exchange(true)) notice("gradients in graphs that torch's compiled autograd makes are not captured");
}

}  // namespace flexmodel
