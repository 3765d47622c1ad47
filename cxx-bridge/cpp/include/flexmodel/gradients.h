// What taps do to autograd graphs.
#pragma once

#include <ATen/core/Tensor.h>

#include <exception>
#include <string>

#include "flexmodel/ffi.h"
#include "flexmodel/tensor.h"

namespace flexmodel {

// wire::hooks::Kind.
enum Kind : uint32_t { kForward = 0, kForwardPre = 1, kBackward = 2, kBackwardPre = 3 };
inline constexpr uint32_t bit(Kind kind) { return 1u << kind; }

// Hands a leaf to the interposer; refused if it cannot be read, or for the reason given.
void capture(const Call& call, Kind kind, const std::string& path, uint32_t repeat, const at::Tensor& tensor,
             const char* python_type, Refusal because = Refusal::None);

// `tensor` with its edit applied, differentiably; undefined if there is none.
at::Tensor edited(const Call& call, Kind kind, const std::string& path, const at::Tensor& tensor);

// A node of its own in the graph, with the same storage: the gradient that passes it is that of this use alone.
at::Tensor identity(const at::Tensor& tensor);

// Captures, then edits, the gradient of `tensor`, which is no leaf, whenever a backward pass computes it.
void watch_gradient(const Call& call, Kind kind, const std::string& path, const at::Tensor& tensor);

// Says once that compiled autograd leaves our hooks out.
void tell_of_compiled_autograd();

// Runs what a gradient hook does, so that nothing of ours ever reaches the job.
template <typename Body>
void guarded_gradient(Body body) {
  if (!active()) return;
  try {
    body();
  } catch (const std::exception& e) {
    fault(std::string("a gradient hook failed: ") + e.what());
  } catch (...) {
    fault("a gradient hook failed");
  }
}

}  // namespace flexmodel
