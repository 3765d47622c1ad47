// The gradients of a module's inputs, through one call of the module alone.
//
// The gradient of a tensor is the sum over all of its uses, and an input may have others than this module. What flows
// through one call is what those nodes send back that the call added to autograd's graph and that have the input as an
// edge. They are found by walking back from what the module returned, and each gets a post-hook. Nothing is added to
// the graph and nothing in it changes: the job's sums keep their order, so every bit of them, and the module is given the
// very tensor that it would be given without us, be it a leaf, a view or a parameter.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <string>
#include <vector>

#include "flexmodel/parts.h"
#include "flexmodel/site.h"

namespace flexmodel {

// The inputs of a call under way whose gradients are wanted.
class InputGradients {
 public:
  // Before the module's forward. `input` requires gradients, and lies as `axes` say.
  void add(const Site& site, const std::string& path, const at::Tensor& input, const Axes& axes);
  bool empty() const { return inputs_.empty(); }
  // The module returned `output`. If that is an input as it was given, its uses cannot be separated from the input's own;
  // then its gradient is taken if it has one use in all, or counted as refused. Returns what the module has to return
  // instead: an edit needs a tensor of its own.
  at::Tensor returned(const at::Tensor& output);
  // After it: hooks the nodes between `outputs` and the inputs. The gradient of a view that was changed in place is
  // counted as refused: it is in that of its base.
  void hook(const std::vector<at::Tensor>& outputs) const;

 private:
  struct Input {
    Site site;
    std::string path;
    Axes axes;
    // A call that raises must not keep the job's tensors, nor its graph.
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
    // The node that computed it, if it is alive; null for a leaf.
    const torch::autograd::Node* node;
    uint32_t number;
    int64_t version;
    // Whether its gradient is taken care of.
    bool done;
  };
  std::vector<Input> inputs_;
  // Number of the first node that this thread makes after the first input was added.
  uint64_t first_ = 0;
};

}  // namespace flexmodel
