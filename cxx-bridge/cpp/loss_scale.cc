// By how much the job scales its losses.
#include "flexmodel/loss_scale.h"

#include "flexmodel/ffi.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "flexmodel/gradients.h"
#include "flexmodel/host.h"
#include "flexmodel/leaves.h"
#include "flexmodel/tensor.h"

namespace flexmodel {
namespace {

using torch::autograd::variable_list;

// A scale as it was at some moment. One that is on a device is on its way from there, so that nobody waits for what the
// device does before.
class Scale {
 public:
  explicit Scale(double value) : value_(value) {}

  Scale(const at::Tensor& tensor, double divisor) : divisor_(divisor) {
    const Unseen unseen;
    TORCH_CHECK(tensor.numel() == 1, "a loss scale of ", tensor.numel(), " elements");
    const c10::Device device = tensor.device();
    const auto options = at::TensorOptions().dtype(at::kDouble);
    bytes_ = at::empty({1}, device.is_cpu() ? options : options.pinned_memory(true));
    const c10::OptionalDeviceGuard on(device.is_cpu() ? std::nullopt : std::optional(device));
    bytes_.copy_(tensor.reshape({1}), /*non_blocking=*/true);
    if (!device.is_cpu()) coming_ = recorded(device.index(), stream_on(device));
  }

  // Waits until it is there.
  double value() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (coming_) (*coming_)->wait();
    coming_.reset();
    if (bytes_.defined()) value_ = std::exchange(bytes_, at::Tensor()).const_data_ptr<double>()[0] / divisor_;
    return value_;
  }

 private:
  std::mutex mutex_;
  double value_ = 1, divisor_ = 1;
  at::Tensor bytes_;
  std::optional<rust::Box<Mark>> coming_;
};

using Shared = std::shared_ptr<Scale>;

struct Scales {
  // Held while the engine is told, so that gradients on other threads wait for it.
  std::mutex mutex;
  // What the engine has to know before the next gradient; null: nothing.
  Shared untold;
  // Of the loss of the backward pass under way, and of the one that ended last; null: not scaled.
  Shared under_way, ended;
};

// Never destroyed: at the end of the process the driver may be gone.
Scales& scales() {
  static auto* const all = new Scales;
  return *all;
}

// Whether any is untold.
std::atomic<bool> is_untold = false;
// Whether a backward pass is under way whose loss the job scaled.
std::atomic<bool> is_scaled = false;

void tell_later(Shared scale) {
  const std::lock_guard<std::mutex> guard(scales().mutex);
  scales().untold = std::move(scale);
  is_untold = true;
}

// No backward pass is under way any more whose loss the job scaled.
void unscaled() {
  if (is_scaled.exchange(false)) tell_later(std::make_shared<Scale>(1));
}

// On the node that computed a loss that the job scaled: until the end of a backward pass through it, gradients are scaled.
class ScaledLoss final : public torch::autograd::FunctionPreHook {
 public:
  explicit ScaledLoss(Shared scale) : scale_(std::move(scale)) {}

  variable_list operator()(const variable_list& gradients) override {
    guarded_gradient([&] {
      tell_later(scale_);
      is_scaled = true;
      {
        const std::lock_guard<std::mutex> guard(scales().mutex);
        scales().under_way = scale_;
      }
      torch::autograd::Engine::get_default_engine().queue_callback(unscaled);
    });
    return gradients;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { report_compiled_autograd(); }

 private:
  const Shared scale_;
};

constexpr const char* kCapsule = "flexmodel.scale";

PyObject* into_capsule(Shared scale) {
  auto* owned = new Shared(std::move(scale));
  PyObject* capsule = PyCapsule_New(owned, kCapsule, [](PyObject* object) {
    delete static_cast<Shared*>(PyCapsule_GetPointer(object, kCapsule));
  });
  if (capsule == nullptr) delete owned;
  return capsule;
}

// Null with a Python error set.
const Shared* out_of(PyObject* capsule) { return static_cast<const Shared*>(PyCapsule_GetPointer(capsule, kCapsule)); }

// scale(tensor or number, divisor) -> what the next two functions take; None where it cannot be known
PyObject* py_scale(PyObject*, PyObject* args) {
  PyObject* value = nullptr;
  double divisor = 1;
  if (PyArg_ParseTuple(args, "Od", &value, &divisor) == 0) return nullptr;
  return into_python([&]() -> PyObject* {
    if (!is_tensor(value)) {
      const double number = PyFloat_AsDouble(value);
      return PyErr_Occurred() != nullptr ? nullptr : into_capsule(std::make_shared<Scale>(number / divisor));
    }
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (refusal_of(tensor, Py_TYPE(value)->tp_name) != Refusal::None || is_in_graph(tensor.device())) Py_RETURN_NONE;
    return into_capsule(std::make_shared<Scale>(tensor, divisor));
  });
}

// loss_scale(scale)
PyObject* py_loss_scale(PyObject*, PyObject* capsule) {
  const Shared* const scale = out_of(capsule);
  if (scale == nullptr) return nullptr;
  tell_later(*scale);
  Py_RETURN_NONE;
}

// scaled(loss, scale)
PyObject* py_scaled(PyObject*, PyObject* args) {
  PyObject *loss = nullptr, *capsule = nullptr;
  if (PyArg_ParseTuple(args, "OO", &loss, &capsule) == 0) return nullptr;
  if (!is_tensor(loss)) return PyErr_Format(PyExc_TypeError, "not a tensor");
  const Shared* const scale = out_of(capsule);
  if (scale == nullptr) return nullptr;
  return into_python([&] {
    const auto& node = THPVariable_Unpack(loss).grad_fn();
    if (node) node->add_pre_hook(std::make_unique<ScaledLoss>(*scale));
    Py_RETURN_NONE;
  });
}

// backward_scale() -> float
PyObject* py_backward_scale(PyObject*, PyObject*) {
  const Shared scale = [] {
    const std::lock_guard<std::mutex> guard(scales().mutex);
    return scales().ended;
  }();
  if (!scale) return PyFloat_FromDouble(1);
  return into_python([&] {
    const double value = [&] {
      const WithoutGil others_run;
      return scale->value();
    }();
    return PyFloat_FromDouble(value);
  });
}

PyMethodDef functions[] = {
    {"scale", py_scale, METH_VARARGS, "A tensor or a number as it is now, divided by another number: a scale. None where it cannot be known."},
    {"loss_scale", py_loss_scale, METH_O, "From now on the job scales its losses, and so its gradients, by this scale."},
    {"scaled", py_scaled, METH_VARARGS, "The job scaled this loss by a scale: gradients of backward passes through it are scaled too."},
    {"backward_scale", py_backward_scale, METH_NOARGS, "By how much the loss of the backward pass that ended last was scaled."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void tell_loss_scale() {
  if (!is_untold) return;
  const std::lock_guard<std::mutex> guard(scales().mutex);
  if (scales().untold) host().loss_scale(scales().untold->value());
  scales().untold = nullptr;
  is_untold = false;
}

void backward_scale_ended() {
  unscaled();
  const std::lock_guard<std::mutex> guard(scales().mutex);
  scales().ended = std::exchange(scales().under_way, nullptr);
}

bool add_loss_scale(PyObject* module) { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace flexmodel
