// Taps inside of torch.compile: operations in the graphs that it makes.
//
// `tap` is triggered, captures its tensors, and returns the call as a tensor of words, so that gradients find their call
// wherever the graph takes them: through a saved tensor, in whatever order backward passes come. `gradient` captures a
// gradient of that call; `factors` says how a leaf of it is edited; `forward_pass` marks that of a model. All but
// `factors` are effects in torch's sense, which keep their order and are neither dropped nor done twice.
#pragma once

#include "flexmodel/py.h"

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#include "flexmodel/gradients.h"
#include "flexmodel/parts.h"
#include "flexmodel/site.h"
#include "flexmodel/tap.h"

namespace flexmodel {

// What a hook is in a graph: (role, number as a tensor, kinds, kinds with edits). New reference. The number is a tensor so
// that blocks which share a graph may differ in it.
PyObject* traced_form(const char* role, int64_t first, int64_t second, uint32_t kinds, uint32_t edits);

// Words that a call takes: its bytes, and the CUDA device of its tensors, negative for the CPU.
inline constexpr size_t kDeviceWord = (sizeof(Call) + sizeof(int64_t) - 1) / sizeof(int64_t);
inline constexpr size_t kCallWords = kDeviceWord + 1;

// What the graph that is being traced can have of a tensor, which may be made of others. `like`: the first input of the
// module that returns it, if that has no parameters.
Part part_in_graph(const at::Tensor& tensor, PyObject* like = nullptr);

// Puts the capture of a gradient into the graph that is being traced.
void capture_in_graph(const Site& site, uint32_t kinds, const std::string& path, const Part& part, Refusal because);

// `tensor` with what the graph will know of its edit applied.
at::Tensor edited_in_graph(const Site& site, uint32_t kinds, const std::string& path, const at::Tensor& tensor);

// Runs what an operation, or a step of tracing, does, so that nothing of ours ever reaches the job; exceptions of the job's
// own do.
template <typename Body>
void guarded_operation(Body body) {
  if (are_taps_paused()) return;
  try {
    if (active()) {
      body();
    } else {
      undo();
    }
  } catch (...) {
    fault("a tap in a compiled graph failed: " + why_in_torch());
  }
}

// Adds what the shim needs of this to its module; false with a Python error set.
bool add_compiled(PyObject* module);

}  // namespace flexmodel
