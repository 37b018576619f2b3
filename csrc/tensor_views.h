// Tensors of Python's as C++ sees them, through DLPack's C exchange API, and calls back into torch,
// which the extension does not link. A view takes 50 ns, where Python takes 80 for an address.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "dlpack.h"
#include "huge_pages.h"

namespace tokenflex {

class TensorViews {
 public:
  TensorViews() {
    namespace py = pybind11;
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor");
    tensor_ = tensor.ptr(), parameter_ = py::object(torch.attr("nn").attr("Parameter")).ptr();
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
    const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
    api_ = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    while (api_ != nullptr && api_->major != dlpack::kMajorVersion) api_ = api_->previous;
    if (api_ != nullptr && api_->view == nullptr) api_ = nullptr;
  }

  // A plain tensor on any device, or none. It may have no elements, and then no address. Where torch
  // has no version 1 of DLPack's exchange API, no tensor is plain.
  std::optional<dlpack::Tensor> plain(PyObject* object) const {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (api_ == nullptr || (type != tensor_ && type != parameter_)) return std::nullopt;
    dlpack::Tensor tensor;
    if (api_->view(object, &tensor) != 0) {  // it has no memory
      PyErr_Clear();
      return std::nullopt;
    }
    if (tensor.dtype.lanes != 1) return std::nullopt;
    return tensor;
  }

  // One in host memory.
  std::optional<dlpack::Tensor> host(PyObject* object) const {
    const auto tensor = plain(object);
    if (tensor && tensor->device.type != dlpack::kCpu) return std::nullopt;
    return tensor;
  }

  // Whether the numbers of a tensor are the negative ones of those in memory.
  static bool is_negated(PyObject* object) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* result = PyObject_CallMethodNoArgs(object, name);
    if (result == nullptr) throw pybind11::error_already_set();
    Py_DECREF(result);  // True and False live on
    return result == Py_True;
  }

  // One of floats in host memory, whose memory holds these very numbers.
  std::optional<dlpack::Tensor> floats(PyObject* object) const {
    const auto tensor = host(object);
    if (!tensor) return std::nullopt;
    const auto [code, bits, lanes] = tensor->dtype;
    const bool is_float = (code == dlpack::kFloat && bits >= 16) ||
                          (code == dlpack::kBfloat && bits == 16);
    if (!is_float || is_negated(object)) return std::nullopt;
    return tensor;
  }

  // The address of a tensor that was just made, and is about to be written.
  void* address(PyObject* object) const {
    if (api_ == nullptr) {
      const pybind11::handle made(object);
      const auto data = reinterpret_cast<void*>(made.attr("data_ptr")().cast<uintptr_t>());
      prefer_huge_pages(data, made.attr("nbytes").cast<int64_t>());
      return data;
    }
    dlpack::Tensor tensor;
    if (api_->view(object, &tensor) != 0) throw pybind11::error_already_set();
    int64_t bytes = tensor.dtype.bits / 8;
    for (int32_t axis = 0; axis < tensor.ndim; ++axis) bytes *= tensor.shape[axis];
    prefer_huge_pages(tensor.data, bytes);
    return tensor.data;
  }

 private:
  const dlpack::ExchangeApi* api_ = nullptr;
  const PyObject *tensor_, *parameter_;  // torch keeps them
};

inline const TensorViews& tensor_views() {
  static const TensorViews* views = new TensorViews;  // never destroyed: Python may end first
  return *views;
}

inline std::string name_of(const dlpack::DataType& dtype) {
  return (dtype.code == dlpack::kBfloat ? "bfloat" : "float") + std::to_string(dtype.bits);
}

}  // namespace tokenflex
