// Recorded launches of Triton kernels, repeated on other tensors: see call_records.py.
//
// Python prepares the arguments of every launch once. A call then allocates the results, writes the
// addresses of its tensors into copies of the arguments, and calls Triton's launchers.
#include "launch_calls.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "python_calls.h"
#include "tensor_views.h"

namespace py = pybind11;

namespace tokenflex {
namespace {

constexpr const char* kCapsuleName = "tokenflex_launches";
constexpr uintptr_t kAlignment = 16;  // as Triton specialises on it

struct Result {
  py::object shape, strides;
  py::object dtype;   // null where it is that of the first tensor
  py::object shared;  // a tensor of no elements, that all calls share; null for the others
};

struct Place {
  size_t argument;
  size_t tensor;  // of the call's tensors, followed by its results
};

struct Launch {
  py::object run;
  py::tuple arguments;  // anything stands at the places
  std::vector<Place> places;
};

struct Launches {
  size_t tensors;    // of a call
  uintptr_t offset;  // of the address of the first one from a multiple of 16
  std::vector<bool> is_passed;  // to a kernel, for each of the call's tensors
  std::vector<Result> results;
  std::vector<Launch> launches;
};

size_t to_size(py::handle number) {
  const int64_t value = integer(number.ptr());
  if (value < 0) throw std::invalid_argument("a number is negative");
  return static_cast<size_t>(value);
}

// (number of tensors, offset of the first one's address, results, launches) -> a capsule.
// results: tensors of no elements, or (shape, strides, dtype or None); launches: (function, arguments,
// places as (argument, tensor)).
py::capsule prepare_launches(size_t tensors, uintptr_t offset, const py::list& results,
                             const py::list& launches) {
  auto prepared = std::make_unique<Launches>();
  prepared->tensors = tensors, prepared->offset = offset;
  prepared->is_passed.resize(tensors);
  for (const py::handle result : results) {
    if (!PyTuple_Check(result.ptr())) {
      prepared->results.push_back({{}, {}, {}, py::reinterpret_borrow<py::object>(result)});
      continue;
    }
    const auto fields = py::reinterpret_borrow<py::tuple>(result);
    const py::object dtype = fields[2];
    prepared->results.push_back(
        {fields[0], fields[1], dtype.is_none() ? py::object() : dtype, py::object()});
  }
  for (const py::handle item : launches) {
    const auto fields = py::cast<py::tuple>(item);
    Launch launch = {fields[0], py::cast<py::tuple>(fields[1]), {}};
    for (const py::handle pair : py::cast<py::list>(fields[2])) {
      const auto place = py::cast<py::tuple>(pair);
      const size_t argument = to_size(place[0]), tensor = to_size(place[1]);
      if (argument >= launch.arguments.size() || tensor >= tensors + results.size()) {
        throw std::invalid_argument("a place lies outside the arguments or tensors");
      }
      if (tensor < tensors) prepared->is_passed[tensor] = true;
      launch.places.push_back({argument, tensor});
    }
    prepared->launches.push_back(std::move(launch));
  }
  return py::capsule(prepared.release(), kCapsuleName, [](PyObject* capsule) {
    delete static_cast<Launches*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  });
}

py::object new_result(PyObject* like, const Result& result) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty_strided");  // the fastest
  static PyObject* const names = py::make_tuple("dtype").release().ptr();
  PyObject* arguments[] = {like, result.shape.ptr(), result.strides.ptr(), result.dtype.ptr()};
  PyObject* made = PyObject_VectorcallMethod(name, arguments, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                             result.dtype ? names : nullptr);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

uintptr_t address(PyObject* tensor) {
  const auto view = tensor_views().plain(tensor);
  return view ? reinterpret_cast<uintptr_t>(view->data) : 0;
}

void run(const Launch& launch, const std::vector<uintptr_t>& addresses) {
  const size_t count = launch.arguments.size();
  std::vector<PyObject*> arguments(count + 1);  // the first is the callee's to use
  for (size_t i = 0; i < count; ++i) {
    arguments[i + 1] = PyTuple_GET_ITEM(launch.arguments.ptr(), Py_ssize_t(i));
  }
  std::vector<py::object> numbers;
  numbers.reserve(launch.places.size());
  for (const Place& place : launch.places) {
    numbers.push_back(
        py::reinterpret_steal<py::object>(PyLong_FromSize_t(addresses[place.tensor])));
    if (!numbers.back()) throw py::error_already_set();
    arguments[place.argument + 1] = numbers.back().ptr();
  }
  PyObject* done = PyObject_Vectorcall(launch.run.ptr(), arguments.data() + 1,
                                       count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (done == nullptr) throw py::error_already_set();
  Py_DECREF(done);
}

// (capsule, *tensors) -> the results. None, and nothing is launched, where an address has another
// alignment than when the launches were recorded, or cannot be read.
PyObject* call_repeat_launches(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, count, [&]() -> py::object {
    if (count < 2) throw std::invalid_argument("launches and tensors are expected");
    const void* pointer = PyCapsule_GetPointer(arguments[0], kCapsuleName);
    if (pointer == nullptr) throw py::error_already_set();
    const auto& prepared = *static_cast<const Launches*>(pointer);
    const size_t tensors = prepared.tensors;
    if (size_t(count) != tensors + 1) throw std::invalid_argument("another number of tensors");
    PyObject* const* const given = arguments + 1;

    std::vector<uintptr_t> addresses(tensors + prepared.results.size());
    for (size_t i = 0; i < tensors; ++i) {
      if (!prepared.is_passed[i]) continue;
      addresses[i] = address(given[i]);
      if (addresses[i] == 0) return py::none();
    }
    if (addresses[0] % kAlignment != prepared.offset) return py::none();
    py::tuple results(prepared.results.size());
    for (size_t i = 0; i < prepared.results.size(); ++i) {
      const Result& result = prepared.results[i];
      if (result.shared) {
        results[i] = result.shared;
        continue;
      }
      py::object made = new_result(given[0], result);
      const uintptr_t data = address(made.ptr());
      if (data == 0 || data % kAlignment != 0) return py::none();
      addresses[tensors + i] = data;
      results[i] = std::move(made);
    }
    for (const Launch& launch : prepared.launches) run(launch, addresses);
    return std::move(results);
  });
}

}  // namespace

void define_launch_calls(py::module_& module) {
  static PyMethodDef methods[] = {method("repeat_launches", &call_repeat_launches), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("prepare_launches", &prepare_launches);
}

}  // namespace tokenflex
