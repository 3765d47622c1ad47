// What taps do to autograd graphs.
#include "flexmodel/gradients.h"

#include <ATen/ops/alias.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flexmodel/compiled.h"
#include "flexmodel/loss_scale.h"

namespace flexmodel {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

bool scales(const at::Tensor& tensor) { return tensor.is_floating_point() || tensor.is_complex(); }

// Zero as a whole. Not by a product with 0: that would keep NaN. The gradient through it is 0 as well.
at::Tensor zeroed(const at::Tensor& tensor) {
  const auto options = tensor.options().dtype(at::kBool).requires_grad(false);
  if (!tensor.unsafeGetTensorImpl()->is_python_dispatch()) return at::masked_fill(tensor, at::ones({}, options), 0);
  const Part part =
      part_or_refusal(tensor, [&] { return part_of(tensor, false); }, [] { return std::string("a tensor for 'zero'"); });
  const auto is_partial = [](const Axis& axis) { return axis.lies.placement == code(PlacementCode::Partial); };
  if (part.refusal != Refusal::None || std::any_of(part.axes.begin(), part.axes.end(), is_partial)) {
    static std::atomic<bool> said = false;
    if (part.refusal != Refusal::Raised && !said.exchange(true)) {
      notice("'zero' was left out where the ranks hold addends: it would have made them communicate");
    }
    return {};
  }
  return at::masked_fill(tensor, at::ones_like(tensor, options), 0);
}

// The gradient of one tensor that is wanted. It comes to the node that computed the tensor; where the tensor is a view
// and is changed in place later, autograd sends it past that node, as part of the gradient of the view's base.
struct Wanted {
  Site site;
  uint32_t kinds;
  std::string path;
  Axes axes;
  bool alone;
  // Tells a change in place. Shared by a base and its views.
  c10::VariableVersion version;
  uint32_t before;
  // The view in its base.
  std::vector<c10::SymInt> sizes, strides;
  c10::SymInt offset;
  const Node* node;
  std::atomic<uint32_t> repeat = 0;

  bool changed() const { return version.current_version() != before; }

  bool is_edited() const { return (site.edit & kinds) != 0; }

  // Records `gradient` and returns what takes its place; undefined: the same.
  at::Tensor take(const at::Tensor& gradient, bool is_whole) {
    if ((site.capture & kinds) != 0) {
      const Part part = gradient_at(site, gradient, axes);
      capture(site, kinds, path, repeat++, part, is_whole ? Refusal::None : Refusal::SharedInput);
    }
    return edited(site, kinds, path, gradient);
  }
};

// Whether a node runs in the backward pass under way, and is not only where that ends.
bool runs(const Node* node) {
  const auto* info = torch::autograd::get_current_graph_task_exec_info();
  if (info == nullptr || info->empty()) return true;
  const auto found = info->find(const_cast<Node*>(node));
  return found != info->end() && found->second.needed_;
}

// Sees a gradient before the node does. Not by `register_hook`: compiled autograd refuses its hooks. Where the node runs,
// `late` ones see it, after the job's hooks on the tensor, whenever these were added; else there is none but the other. An
// edit is an early one's, so that what the job keeps of the gradient is edited too.
class Receiver : public torch::autograd::FunctionPreHook {
 public:
  Receiver(std::shared_ptr<Wanted> wanted, const Node* node, uint32_t number, bool late)
      : wanted_(std::move(wanted)), node_(node), number_(number), late_(late) {}

  variable_list operator()(const variable_list& gradients) override {
    variable_list out = gradients;
    if (number_ < out.size() && out[number_].defined() && late_ == (!wanted_->is_edited() && runs(node_))) {
      guarded_gradient([&] {
        at::Tensor now = received(out[number_]);
        if (now.defined()) out[number_] = std::move(now);
      });
    }
    return out;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { report_compiled_autograd(); }

 protected:
  virtual at::Tensor received(const at::Tensor& gradient) = 0;

  const std::shared_ptr<Wanted> wanted_;
  // Whose hook it is.
  const Node* const node_;
  const uint32_t number_;

 private:
  const bool late_;
};

// On the node that computed the tensor.
class OnTensor final : public Receiver {
 public:
  OnTensor(std::shared_ptr<Wanted> wanted, const Node* node, uint32_t number, bool late, bool has_base)
      : Receiver(std::move(wanted), node, number, late), has_base_(has_base) {}

 private:
  at::Tensor received(const at::Tensor& gradient) override {
    if (has_base_ && wanted_->changed()) return {};
    return wanted_->take(gradient, !wanted_->alone || uses() == 1);
  }

  size_t uses() const {
    const auto all = consumers(wanted_->node);
    return std::count_if(all.begin(), all.end(), [this](const Consumer& c) { return c.input_nr == number_; });
  }

  const bool has_base_;
};

// On the node that computed the base of a view.
class OnBase final : public Receiver {
  using Receiver::Receiver;

  at::Tensor received(const at::Tensor& gradient) override {
    if (!wanted_->changed()) return {};
    if (!wanted_->site.traced.defined() && refusal_of(gradient, nullptr) != Refusal::None) return wanted_->take(gradient, false);
    at::Tensor whole = gradient.contiguous();
    const at::Tensor part = at::as_strided_symint(whole, wanted_->sizes, wanted_->strides, wanted_->offset);
    const at::Tensor now = wanted_->take(part, is_all());
    if (!now.defined()) return {};
    whole = whole.clone();
    at::as_strided_symint(whole, wanted_->sizes, wanted_->strides, wanted_->offset).copy_(now);
    return whole;
  }

  // Whether the base is used for nothing but the view, and what was written over it.
  bool is_all() const {
    const auto all = consumers(node_);
    const auto written = [](const Consumer& c) { return dynamic_cast<const torch::autograd::CopySlices*>(c.node) != nullptr; };
    const auto other = [&](const Consumer& c) { return c.input_nr == number_ && c.node != wanted_->node && !written(c); };
    return std::none_of(all.begin(), all.end(), other) && (!wanted_->alone || all.size() == 1);
  }
};

template <typename Hook, typename... Rest>
void add_hooks(Node& node, const std::shared_ptr<Wanted>& wanted, uint32_t number, Rest... rest) {
  node.add_tensor_pre_hook(std::make_unique<Hook>(wanted, &node, number, false, rest...));
  node.add_pre_hook(std::make_unique<Hook>(wanted, &node, number, true, rest...));
}

// Whether a gradient of `base` holds that of the view `tensor` as it is.
bool is_piece(const at::Tensor& tensor, const at::TensorBase& base) {
  return base.grad_fn().get() != nullptr && base.is_contiguous() && base.scalar_type() == tensor.scalar_type() &&
         base.is_conj() == tensor.is_conj() && base.is_neg() == tensor.is_neg();
}

}  // namespace

Part gradient_at(const Site& site, const at::Tensor& gradient, const Axes& axes) {
  const auto look = [&] {
    if (!site.traced.defined()) return part_of_gradient(gradient, axes);
    Part part = part_in_graph(gradient);
    lies_as(part, axes);
    return part;
  };
  const at::Tensor local = site.traced.defined() ? at::empty({0}) : gradient;
  return part_or_refusal(local, look, [] { return std::string("a gradient"); });
}

void capture(const Site& site, uint32_t kinds, const std::string& path, uint32_t repeat, const Part& part,
             Refusal because) {
  if ((site.capture & kinds) == 0) return;
  if (site.traced.defined()) {
    return capture_in_graph(site, kinds, path, part, part.refusal == Refusal::None ? because : part.refusal);
  }
  const at::Tensor& tensor = part.local;
  const bool readable = part.refusal == Refusal::None || part.refusal == because;
  Refusal refusal = part.refusal == Refusal::None ? because : part.refusal;
  if (refusal == Refusal::None && is_in_graph(tensor.device())) refusal = Refusal::InGraph;
  const c10::IntArrayRef sizes = readable || part.refusal == Refusal::Sparse ? tensor.sizes() : c10::IntArrayRef();
  std::vector<LeafAxis> axes;
  for (const Axis& axis : part.axes) axes.push_back(axis.borrowed());
  Leaf leaf{};
  leaf.kinds = site.capture & kinds;
  leaf.dtype = code_of(tensor.scalar_type());
  leaf.refusal = code(refusal);
  // What is refused may be asked nothing.
  leaf.on_device = refusal == Refusal::None && !tensor.device().is_cpu();
  leaf.skipped = part.skipped;
  leaf.repeat = repeat;
  leaf.path = str(path);
  leaf.handle = &tensor;
  leaf.sizes = sizes.data();
  leaf.ndim = sizes.size();
  leaf.axes = axes.data();
  leaf.axis_count = axes.size();
  if (refusal == Refusal::None && (leaf.kinds & KINDS_OF_GRADIENTS) != 0) tell_loss_scale();
  host().capture(&site.call, &leaf);
}

at::Tensor edited(const Site& site, uint32_t kinds, const std::string& path, const at::Tensor& tensor) {
  if ((site.edit & kinds) == 0) return {};
  if (site.traced.defined()) return edited_in_graph(site, kinds, path, tensor);
  const LeafEdit edit = host().edit(&site.call, site.edit & kinds, str(path), is_in_graph(tensor.device()));
  if (edit.zero) return zeroed(tensor);
  return edit.factor != 1 && scales(tensor) ? at::mul(tensor, edit.factor) : at::Tensor();
}

at::Tensor identity(const at::Tensor& tensor) { return at::alias(tensor); }

void watch_gradient(const Site& site, uint32_t kinds, const std::string& path, const at::Tensor& tensor,
                    const Axes& axes, bool alone) {
  const auto& node = tensor.grad_fn();
  const bool has_base = tensor.is_view() && is_piece(tensor, tensor._base());
  const auto& version = torch::autograd::impl::version_counter(tensor);
  const std::shared_ptr<Wanted> wanted(new Wanted{site, kinds, path, axes, alone, version, version.current_version(),
                                                  tensor.sym_sizes().vec(), tensor.sym_strides().vec(), 0, node.get()});
  add_hooks<OnTensor>(*node, wanted, tensor.output_nr(), has_base);
  if (!has_base) return;
  const auto& base = tensor._base();
  wanted->offset = tensor.sym_storage_offset() - base.sym_storage_offset();
  add_hooks<OnBase>(*base.grad_fn(), wanted, base.output_nr());
}

std::vector<Consumer> consumers(const Node* of) {
  // Of all nodes in one backward pass.
  static std::mutex mutex;
  static int task = -1;
  static std::unordered_map<const Node*, std::vector<Consumer>> known;
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr) return {};
  const std::lock_guard<std::mutex> guard(mutex);
  if (const int now = torch::autograd::get_current_graph_task_id(); task != now) {
    task = now;
    known.clear();
    for (const Node* node : *nodes) {
      for (const auto& edge : node->next_edges()) {
        if (edge.is_valid()) known[edge.function.get()].push_back({node, edge.input_nr});
      }
    }
    torch::autograd::Engine::get_default_engine().queue_callback([now] {
      const std::lock_guard<std::mutex> at_the_end(mutex);
      if (task == now) known.clear();
    });
  }
  const auto found = known.find(of);
  return found == known.end() ? std::vector<Consumer>() : found->second;
}

void report_compiled_autograd() {
  static std::atomic<bool> said = false;
  if (!said.exchange(true)) notice("gradients in graphs that torch's compiled autograd makes are not captured");
}

std::string reason(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  return of_torch == nullptr ? error.what() : of_torch->what_without_backtrace();
}

}  // namespace flexmodel
