// Tensors of our own, which other ranks get, or got from them. See ffi.rs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "rust/cxx.h"

#include "flexmodel/tensor.h"

namespace flexmodel {

// See ffi.rs.
struct Cut;

std::unique_ptr<at::Tensor> stage(const at::Tensor& tensor, uint8_t dtype);
bool is_on_device(const at::Tensor& tensor);
size_t elements_of(const at::Tensor& tensor);
size_t address_of(const at::Tensor& tensor);
size_t bytes_of(const at::Tensor& tensor);
std::unique_ptr<at::Tensor> view_of(const at::Tensor& tensor, rust::Slice<const Cut> cuts);
std::unique_ptr<at::Tensor> share(const at::Tensor& tensor);
std::unique_ptr<at::Tensor> receiver(uint8_t dtype, rust::Slice<const uint64_t> sizes, Place place);

}  // namespace flexmodel
