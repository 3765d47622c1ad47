// The gradients of a module's inputs, through one call of the module alone.
#include "flexmodel/uses.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/real.h>
#include <ATen/record_function.h>
#include <c10/core/Event.h>
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
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "flexmodel/gradients.h"
#include "flexmodel/tensor.h"

namespace flexmodel {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::variable_list;

// A node that has some tensor as an edge.
struct Consumer {
  uint64_t number, thread;
  uint32_t input_nr;
};

// The consumers of every node in the backward pass under way. Made once for each pass.
std::vector<Consumer> consumers(const Node* of) {
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
      for (const Edge& edge : node->next_edges()) {
        if (edge.is_valid()) known[edge.function.get()].push_back({node->sequence_nr(), node->thread_id(), edge.input_nr});
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

// Adds up what streams of a device compute.
class Sum {
 public:
  void add(const at::Tensor& part) {
    follow(part);
    if (!value_.defined()) {
      value_ = part;
    } else if (owned_) {
      value_.add_(part);
    } else {
      value_ = at::add(value_, part);
      owned_ = true;
    }
    if (!part.is_cpu()) {
      c10::Event done(part.device().type());
      done.record(c10::impl::VirtualGuardImpl(part.device().type()).getStream(part.device()));
      done_.emplace(std::move(done));
    }
  }
  const at::Tensor& value() const { return value_; }

 private:
  // What was added before comes first, whichever stream it was on.
  void follow(const at::Tensor& part) {
    if (!done_ || !value_.defined() || part.device() != value_.device()) return;
    const c10::impl::VirtualGuardImpl guard(part.device().type());
    const c10::Stream now = guard.getStream(part.device());
    done_->block(now);
    guard.recordDataPtrOnStream(value_.storage().data_ptr(), now);
  }

  at::Tensor value_;
  bool owned_ = false;
  std::optional<c10::Event> done_;
};

// The gradient of one input through one call: collects what its nodes send, in every backward pass.
class Gathering : public std::enable_shared_from_this<Gathering> {
 public:
  Gathering(const Call& call, std::string path, const Edge& target, uint64_t first, uint32_t edges)
      : call_(call),
        path_(std::move(path)),
        target_(target.function.get()),
        target_nr_(target.input_nr),
        first_(first),
        last_(at::sequence_number::peek()),
        thread_(at::RecordFunction::currentThreadId()),
        edges_(edges) {}

  // A node sends `gradient`, which may be undefined, along one edge. Returns what it sends instead; undefined: the same.
  at::Tensor sent(at::Tensor gradient) {
    if (gradient.defined()) gradient = as_received(std::move(gradient));
    if ((call_.capture & bit(kBackward)) != 0) collect(gradient);
    return gradient.defined() ? edited(call_, kBackward, path_, gradient) : at::Tensor();
  }

 private:
  struct Pass {
    int task;
    uint32_t seen = 0;
    Sum sum;
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

  void collect(const at::Tensor& gradient) {
    const int task = torch::autograd::get_current_graph_task_id();
    std::optional<Pass> done;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      auto pass = find(task);
      if (pass == passes_.end()) {
        passes_.push_back({task});
        pass = std::prev(passes_.end());
        // Some of the nodes may not be part of this backward pass.
        if (edges_ > 1) {
          torch::autograd::Engine::get_default_engine().queue_callback([self = shared_from_this(), task] { self->end(task); });
        }
      }
      if (gradient.defined()) {
        const at::NoGradGuard no_grad;
        pass->sum.add(gradient.detach());
      }
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
    if (done) deliver(*done);
  }

  void deliver(const Pass& pass) {
    if (!pass.sum.value().defined() || !active()) return;
    const Refusal because = is_all() ? Refusal::None : Refusal::SharedInput;
    capture(call_, kBackward, path_, repeat_++, pass.sum.value(), nullptr, because);
  }

  // Whether the call made no other node that uses the input: for something it keeps, say, and does not return.
  bool is_all() const {
    const auto of_call = [this](const Consumer& c) {
      return c.input_nr == target_nr_ && c.thread == thread_ && c.number >= first_ && c.number < last_;
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

  const Call call_;
  const std::string path_;
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

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { tell_of_compiled_autograd(); }

 private:
  std::shared_ptr<Gathering> to_;
  std::vector<uint32_t> edges_;
};

}  // namespace

void Uses::add(const Call& call, const std::string& path, const at::Tensor& input) {
  const Edge edge = torch::autograd::impl::gradient_edge(input);
  if (inputs_.empty()) first_ = at::sequence_number::peek();
  inputs_.push_back({call, path, c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(input.getIntrusivePtr()),
                     input.is_leaf() ? std::weak_ptr<Node>() : edge.function, edge.input_nr, input._version()});
}

Edge Uses::Input::edge() const {
  if (auto alive = node.lock()) return {std::move(alive), number};
  const at::Tensor input(tensor.lock());
  // A leaf's accumulator lives by its uses.
  return input.defined() && input.is_leaf() && input.requires_grad() ? torch::autograd::impl::gradient_edge(input) : Edge();
}

bool Uses::include(const at::Tensor& output) const {
  if (inputs_.empty() || !output.requires_grad()) return false;
  const Edge edge = torch::autograd::impl::gradient_edge(output);
  return std::any_of(inputs_.begin(), inputs_.end(), [&](const Input& input) { return input.edge() == edge; });
}

void Uses::hook(const std::vector<at::Tensor>& outputs) const {
  if (inputs_.empty()) return;
  std::vector<Edge> targets;
  for (const Input& input : inputs_) targets.push_back(input.edge());
  const uint64_t thread = at::RecordFunction::currentThreadId();
  // Made by the call. Numbers of other threads tell nothing.
  const auto is_new = [&](const Node& node) { return node.thread_id() != thread || node.sequence_nr() >= first_; };
  std::unordered_set<Node*> seen;
  std::vector<Node*> left;
  const auto visit = [&](Node* node) {
    if (node != nullptr && is_new(*node) && seen.insert(node).second) left.push_back(node);
  };
  for (const at::Tensor& output : outputs) visit(output.grad_fn().get());
  // By input: its nodes, and which of their edges.
  std::vector<std::map<Node*, std::vector<uint32_t>>> users(inputs_.size());
  while (!left.empty()) {
    Node* node = left.back();
    left.pop_back();
    for (uint32_t number = 0; number < node->num_outputs(); ++number) {
      const Edge& edge = node->next_edge(number);
      const auto target = std::find(targets.begin(), targets.end(), edge);
      if (!edge.is_valid() || target == targets.end()) {
        visit(edge.function.get());
      } else {
        users[target - targets.begin()][node].push_back(number);
      }
    }
  }
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    uint32_t edges = 0;
    for (const auto& [node, numbers] : users[i]) edges += numbers.size();
    if (edges == 0) {
      const at::Tensor tensor(input.tensor.lock());
      // A view that is changed in place has its gradient in that of its base.
      if ((input.call.capture & bit(kBackward)) != 0 && tensor.defined() && tensor._version() != input.version) {
        capture(input.call, kBackward, input.path, 0, tensor, nullptr, Refusal::SharedInput);
      }
      continue;
    }
    const auto gathering = std::make_shared<Gathering>(input.call, input.path, targets[i], first_, edges);
    for (auto& [node, numbers] : users[i]) node->add_post_hook(std::make_unique<Sender>(gathering, std::move(numbers)));
  }
}

}  // namespace flexmodel
