// Over c10d's Gloo: words and tensors of the CPU.
#include "flexmodel/communicator.h"

#include "flexmodel/ffi.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace flexmodel {
namespace {

// What most rounds have to say: longer words take a second exchange.
constexpr int64_t kShort = 4096;

at::Tensor bytes(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(c10::ScalarType::Byte)); }

class Gloo : public Communicator {
 public:
  explicit Gloo(c10::intrusive_ptr<c10d::Backend> backend) : backend_(std::move(backend)) {}

  rust::Vec<Message> exchange(rust::Slice<const uint8_t> mine) const override {
    const Unseen unseen;
    std::vector<at::Tensor> first = gather(mine, sizeof(int64_t) + kShort);
    int64_t longest = 0;
    for (const at::Tensor& one : first) longest = std::max(longest, length_of(one));
    if (longest > kShort) first = gather(mine, static_cast<int64_t>(sizeof(int64_t)) + longest);
    rust::Vec<Message> heard;
    for (const at::Tensor& one : first) {
      Message words;
      const auto* start = one.const_data_ptr<uint8_t>() + sizeof(int64_t);
      words.bytes.reserve(static_cast<size_t>(length_of(one)));
      for (int64_t i = 0; i < length_of(one); ++i) words.bytes.push_back(start[i]);
      heard.push_back(std::move(words));
    }
    return heard;
  }

  void transfer(const rust::Vec<Move>& moves) const override {
    const Unseen unseen;
    std::vector<c10::intrusive_ptr<c10d::Work>> under_way;
    std::vector<std::vector<at::Tensor>> tensors;
    tensors.reserve(moves.size());
    for (const Move& move : moves) {
      const at::Tensor& tensor = *reinterpret_cast<const at::Tensor*>(move.tensor);
      if (tensor.numel() == 0) continue;
      // Gloo knows fewer types than torch.
      tensors.push_back({tensor.reshape({-1}).view(c10::ScalarType::Byte)});
      const int peer = static_cast<int>(move.peer);
      under_way.push_back(move.send ? backend_->send(tensors.back(), peer, 0) : backend_->recv(tensors.back(), peer, 0));
    }
    for (const auto& work : under_way) work->wait();
  }

  void cut() const override { backend_->abort(); }

 private:
  // `mine`, behind its length and in front of what fills `size`, from all members.
  std::vector<at::Tensor> gather(rust::Slice<const uint8_t> mine, int64_t size) const {
    std::vector<at::Tensor> input{bytes(size).zero_()};
    const auto length = static_cast<int64_t>(mine.size());
    auto* start = input[0].mutable_data_ptr<uint8_t>();
    std::memcpy(start, &length, sizeof length);
    const auto room = size - static_cast<int64_t>(sizeof length);
    std::memcpy(start + sizeof length, mine.data(), static_cast<size_t>(std::min(length, room)));
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int i = 0; i < backend_->getSize(); ++i) outputs[0].push_back(bytes(size));
    backend_->allgather(outputs, input)->wait();
    return std::move(outputs[0]);
  }

  static int64_t length_of(const at::Tensor& words) {
    int64_t length = 0;
    std::memcpy(&length, words.const_data_ptr<uint8_t>(), sizeof length);
    return length;
  }

  c10::intrusive_ptr<c10d::Backend> backend_;
};

}  // namespace

std::unique_ptr<Communicator> over_backend(PyObject* backend) {
  try {
    return std::make_unique<Gloo>(py::cast<c10::intrusive_ptr<c10d::Backend>>(py::handle(backend)));
  } catch (const py::cast_error& e) {
    PyErr_SetString(PyExc_TypeError, e.what());
    return nullptr;
  }
}

}  // namespace flexmodel
