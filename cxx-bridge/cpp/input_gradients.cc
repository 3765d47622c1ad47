// The gradients of a module's inputs, through one call of the module alone.
#include "flexmodel/input_gradients.h"

#include <ATen/SequenceNumber.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/real.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/input_metadata.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <utility>

#include "flexmodel/ffi.h"
#include "flexmodel/gradients.h"
#include "flexmodel/tensor.h"

namespace flexmodel {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::variable_list;

// Adds up what several nodes send, on whatever streams of a device.
class Sum {
 public:
  // `traced`: puts the sum into a graph.
  void add(const at::Tensor& part, bool traced) {
    if (traced) {
      value_ = value_.defined() ? value_ + part : part;
      return;
    }
    const Unseen unseen;
    if (done_) here();
    accumulate(part);
    if (!value_.is_cpu()) done_ = recorded(value_.device().index(), stream_on(value_.device()));
  }

  // Ready on this thread's stream, which may be another than it came on.
  const at::Tensor& value() {
    if (done_) here();
    return value_;
  }

 private:
  // `part` is autograd's, which may add to it, or give it away.
  void accumulate(const at::Tensor& part) {
    if (value_.defined()) {
      value_.add_(part);
    } else {
      value_ = part.clone();
    }
  }

  // Has this thread's stream wait for the sum, and the sum's memory for the stream.
  void here() {
    const c10::Device device = value_.device();
    const c10::impl::VirtualGuardImpl guard(device.type());
    (*done_)->hold(stream_on(device));
    guard.recordDataPtrOnStream(value_.storage().data_ptr(), guard.getStream(device));
  }

  at::Tensor value_;
  std::optional<rust::Box<Mark>> done_;
};

// The gradient of one input through one call: collects what its nodes send, in every backward pass.
class Gathering : public std::enable_shared_from_this<Gathering> {
 public:
  Gathering(const Site& site, std::string path, Axes axes, const Node* target, uint32_t number, uint64_t first,
            uint32_t edges)
      : site_(site),
        path_(std::move(path)),
        axes_(std::move(axes)),
        target_(target),
        target_nr_(number),
        first_(first),
        last_(at::sequence_number::peek()),
        thread_(at::RecordFunction::currentThreadId()),
        edges_(edges) {}

  // A node sends `gradient`, which may be undefined, along one edge. Returns what it sends instead; undefined: the same.
  at::Tensor sent(at::Tensor gradient) {
    Part part;
    if (gradient.defined()) {
      const bool traced = site_.traced.defined();
      const bool plain = !gradient.unsafeGetTensorImpl()->is_python_dispatch() && !is_in_graph(gradient.device());
      if (traced || plain) gradient = as_received(std::move(gradient));
      part = gradient_at(site_, gradient, axes_);
    }
    if ((site_.capture & KINDS_OF_INPUT_GRADIENTS) != 0) collect(part);
    return gradient.defined() ? edited(site_, KINDS_OF_INPUT_GRADIENTS, path_, gradient) : at::Tensor();
  }

 private:
  struct Pass {
    int task;
    // Why what is collected is not the gradient.
    Refusal because;
    uint32_t seen = 0;
    Sum sum{};
    // How what is summed lies; described in its place if it cannot be summed.
    Part any{};

    void add(const Part& part, bool traced) {
      if (because == Refusal::None && any.local.defined() && !same(any.axes, part.axes)) because = Refusal::SharedInput;
      if (part.refusal != Refusal::None) because = part.refusal;
      // A sum would be part of the job's graph.
      if (because == Refusal::None && !traced && is_in_graph(part.local.device())) because = Refusal::InGraph;
      any = part;
      if (because == Refusal::None) sum.add(part.local, traced);
    }
  };

  // As the engine's `validate_outputs` makes it, after post-hooks.
  at::Tensor as_received(at::Tensor gradient) const {
    const auto& metadata = target_->input_metadata(target_nr_);
    gradient = metadata.maybe_reduce(target_nr_, std::move(gradient), [](const std::string& what) { return what; });
    const auto type = metadata.grad_dtype();
    if (!type || *type == gradient.scalar_type()) return gradient;
    if (!c10::isComplexType(*type) && gradient.is_complex()) gradient = at::real(gradient);
    return gradient.to(*type);
  }

  void collect(const Part& part) {
    if (edges_ == 1) {
      deliver(part, is_all() ? Refusal::None : Refusal::SharedInput);
      return;
    }
    const int task = torch::autograd::get_current_graph_task_id();
    std::optional<Pass> done;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      auto pass = find(task);
      if (pass == passes_.end()) {
        passes_.push_back({task, is_all() ? Refusal::None : Refusal::SharedInput});
        pass = std::prev(passes_.end());
        // Some of the nodes may not be part of this backward pass.
        torch::autograd::Engine::get_default_engine().queue_callback([self = shared_from_this(), task] { self->end(task); });
      }
      if (part.local.defined()) pass->add(part, site_.traced.defined());
      if (++pass->seen == edges_) done = take(pass);
    }
    if (done) deliver(*done);
  }

  // The backward pass is over.
  void end(int task) {
    std::optional<Pass> done;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      const auto pass = find(task);
      if (pass != passes_.end()) done = take(pass);
    }
    guarded_gradient([&] {
      if (done) deliver(*done);
    });
  }

  void deliver(Pass& pass) {
    if (pass.because == Refusal::None) pass.any.local = pass.sum.value();
    deliver(pass.any, pass.because);
  }

  void deliver(const Part& part, Refusal because) {
    if (part.local.defined()) capture(site_, KINDS_OF_INPUT_GRADIENTS, path_, repeat_++, part, because);
  }

  // Whether the call made no other node that uses the input: for something it keeps, say, and does not return.
  bool is_all() const {
    const auto of_call = [this](const Consumer& c) {
      const uint64_t number = c.node->sequence_nr();
      return c.input_nr == target_nr_ && c.node->thread_id() == thread_ && number >= first_ && number < last_;
    };
    const std::vector<Consumer> all = consumers(target_);
    return static_cast<uint64_t>(std::count_if(all.begin(), all.end(), of_call)) <= edges_;
  }

  std::vector<Pass>::iterator find(int task) {
    return std::find_if(passes_.begin(), passes_.end(), [task](const Pass& pass) { return pass.task == task; });
  }

  Pass take(std::vector<Pass>::iterator pass) {
    Pass taken = std::move(*pass);
    passes_.erase(pass);
    return taken;
  }

  const Site site_;
  const std::string path_;
  // Of the input.
  const Axes axes_;
  // Alive as long as the nodes that are hooked, whose edge it is.
  const Node* const target_;
  const uint32_t target_nr_;
  const uint64_t first_, last_, thread_;
  const uint32_t edges_;
  std::atomic<uint32_t> repeat_ = 0;
  std::mutex mutex_;
  std::vector<Pass> passes_;
};

// On a node that uses the input.
class Sender final : public torch::autograd::FunctionPostHook {
 public:
  Sender(std::shared_ptr<Gathering> to, std::vector<uint32_t> edges) : to_(std::move(to)), edges_(std::move(edges)) {}

  variable_list operator()(const variable_list& gradients, const variable_list&) override {
    variable_list out = gradients;
    guarded_gradient([&] {
      for (const uint32_t edge : edges_) {
        at::Tensor now = to_->sent(edge < out.size() ? out[edge] : at::Tensor());
        if (now.defined()) out[edge] = std::move(now);
      }
    });
    return out;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { report_compiled_autograd(); }

 private:
  std::shared_ptr<Gathering> to_;
  std::vector<uint32_t> edges_;
};

}  // namespace

void InputGradients::add(const Site& site, const std::string& path, const at::Tensor& input, const Axes& axes) {
  const auto& node = input.grad_fn();
  const auto device = input.device().type();
  if (node.get() == nullptr && at::autocast::is_autocast_enabled(device) && at::autocast::is_autocast_cache_enabled()) {
    // Its cast belongs to the call that needs it first, and others use it too.
    capture(site, KINDS_OF_INPUT_GRADIENTS, path, 0, gradient_at(site, input, {}), Refusal::SharedInput);
    return;
  }
  if (inputs_.empty()) first_ = at::sequence_number::peek();
  inputs_.push_back({site, path, axes, decltype(Input::tensor)(input.getIntrusivePtr()), node.get(),
                     static_cast<uint32_t>(input.output_nr()), input._version(), false});
}

at::Tensor InputGradients::returned(const at::Tensor& output) {
  const auto is_it = [&](const Input& input) {
    return input.node == nullptr ? input.tensor.lock().get() == output.unsafeGetTensorImpl()
                                 : output.grad_fn().get() == input.node && output.output_nr() == input.number;
  };
  const auto input = std::find_if(inputs_.begin(), inputs_.end(), is_it);
  if (input == inputs_.end() || !output.requires_grad()) return {};
  if ((input->site.edit & KINDS_OF_INPUT_GRADIENTS) != 0) return identity(output);
  if (input->done) return {};
  input->done = true;
  if (output.is_leaf()) {
    capture(input->site, KINDS_OF_INPUT_GRADIENTS, input->path, 0, gradient_at(input->site, output, {}), Refusal::Returned);
  } else {
    watch_gradient(input->site, KINDS_OF_INPUT_GRADIENTS, input->path, output, input->axes, /*alone=*/true);
  }
  return {};
}

void InputGradients::hook(const std::vector<at::Tensor>& outputs) const {
  if (inputs_.empty()) return;
  const uint64_t thread = at::RecordFunction::currentThreadId();
  const auto is_new = [&](const Node& node) {
    return node.thread_id() == thread && node.sequence_nr() >= first_ && node.sequence_nr() != UINT64_MAX;
  };
  // Where gradients of inputs go. A leaf's accumulator lives by its uses; another node may have been given a dead one's
  // place in memory, but would be new.
  std::vector<const Node*> targets;
  for (const Input& input : inputs_) {
    const at::Tensor leaf(input.node == nullptr ? input.tensor.lock() : decltype(input.tensor.lock())());
    const bool is_leaf = leaf.defined() && leaf.is_leaf() && leaf.requires_grad();
    targets.push_back(is_leaf ? torch::autograd::impl::gradient_edge(leaf).function.get() : input.node);
  }
  const auto input_at = [&](const Edge& edge) {
    size_t at = 0;
    while (at < targets.size() && !(targets[at] == edge.function.get() && inputs_[at].number == edge.input_nr)) ++at;
    return is_new(*edge.function) ? targets.size() : at;
  };
  std::unordered_set<Node*> seen;
  std::vector<Node*> left;
  const auto visit = [&](Node* node) {
    if (is_new(*node) && seen.insert(node).second) left.push_back(node);
  };
  for (const at::Tensor& output : outputs) {
    if (output.grad_fn().get() != nullptr) visit(output.grad_fn().get());
  }
  // By input: its nodes, and which of their edges.
  std::vector<std::map<Node*, std::vector<uint32_t>>> users(inputs_.size());
  while (!left.empty()) {
    Node* node = left.back();
    left.pop_back();
    for (uint32_t number = 0; number < node->num_outputs(); ++number) {
      const Edge& edge = node->next_edge(number);
      if (!edge.is_valid()) continue;
      const size_t at = input_at(edge);
      if (at == targets.size()) {
        visit(edge.function.get());
      } else {
        users[at][node].push_back(number);
      }
    }
  }
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    if (input.done) continue;
    const at::Tensor tensor(input.tensor.lock());
    if (tensor.defined() && tensor.is_view() && tensor._version() != input.version) {
      capture(input.site, KINDS_OF_INPUT_GRADIENTS, input.path, 0, gradient_at(input.site, tensor, {}), Refusal::SharedInput);
      continue;
    }
    uint32_t edges = 0;
    for (const auto& [node, numbers] : users[i]) edges += numbers.size();
    const auto gathering =
        std::make_shared<Gathering>(input.site, input.path, input.axes, targets[i], input.number, first_, edges);
    for (auto& [node, numbers] : users[i]) node->add_post_hook(std::make_unique<Sender>(gathering, std::move(numbers)));
  }
}

}  // namespace flexmodel
