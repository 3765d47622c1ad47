// A call of a tapped module, and where what is found of it goes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "flexmodel/wire.h"

namespace flexmodel {

// In a job that runs as it is written, the call is known when the module is called, and what is found goes to the
// interposer at once. While torch.compile traces, nothing is known of the calls to come: then `traced` stands for the
// call that the graph will make, and what is to be done with a tensor is put into the graph (compiled.h).
struct Site {
  Site(const Call& call) : call(call), capture(call.capture), edit(call.edit) {}  // NOLINT: a call is a site
  Site(at::Tensor traced, uint32_t capture, uint32_t edit, int64_t slot)
      : call{}, capture(capture), edit(edit), traced(std::move(traced)), slot(slot) {}

  Call call;
  // Kinds to capture, and with an edit; while tracing: that may be in any step.
  uint32_t capture, edit;
  at::Tensor traced;
  // Which of the call's leaves, while tracing.
  int64_t slot = 0;
};

}  // namespace flexmodel
