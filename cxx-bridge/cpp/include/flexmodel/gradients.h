// What taps do to autograd graphs.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "flexmodel/faults.h"
#include "flexmodel/parts.h"
#include "flexmodel/site.h"

namespace flexmodel {

// Kinds are masks here (`KINDS_OF_...` in wire.h): of all that tap the same tensors.

// Hands a leaf to the engine, or into the graph that is traced, under those of `kinds` that are wanted; refused if it
// cannot be read, or for the reason given.
void capture(const Site& site, uint32_t kinds, const std::string& path, uint32_t repeat, const Part& part,
             Refusal because = Refusal::None);

// The part of a gradient that came to `site`, whose tensor lay as `axes` say. One that raises cannot be read.
Part gradient_at(const Site& site, const at::Tensor& gradient, const Axes& axes);

// `tensor` with its edit applied, differentiably; undefined if there is none.
at::Tensor edited(const Site& site, uint32_t kinds, const std::string& path, const at::Tensor& tensor);

// A node of its own in the graph, with the same storage. It changes the order in which the job sums gradients, so only
// edits may ask for it.
at::Tensor identity(const at::Tensor& tensor);

// Captures, then edits, the gradient of `tensor`, which is no leaf and lies as `axes` say, whenever a backward pass
// computes it. `alone`: only if the tensor has one use in all of the graph.
void watch_gradient(const Site& site, uint32_t kinds, const std::string& path, const at::Tensor& tensor,
                    const Axes& axes, bool alone = false);

// A node that has another as an edge.
struct Consumer {
  const torch::autograd::Node* node;
  uint32_t input_nr;
};

// The consumers of `of` in the backward pass under way.
std::vector<Consumer> consumers(const torch::autograd::Node* of);

// Says once that compiled autograd leaves our hooks out.
void report_compiled_autograd();

// What went wrong, in a line.
std::string reason(const std::exception& error);

// Runs what a gradient hook does: what raises costs that gradient, and only exceptions of the job's own reach the job.
template <typename Body>
void guarded_gradient(Body body) {
  if (!active()) return;
  try {
    body();
  } catch (...) {
    report("a gradient", why_in_torch());
  }
}

}  // namespace flexmodel
