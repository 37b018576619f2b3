// Pooling with LayerNorm, and the gated unit, on host memory, called with tensors: one call checks
// them, allocates the results and computes. Each function returns None where a tensor is anything but
// ordinary, for the caller to take the general way, which also knows the right error.
#include "projector_calls.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "dtypes.h"
#include "float_types.h"
#include "pool_norm.h"
#include "python_calls.h"
#include "swiglu.h"
#include "tensor_views.h"

namespace py = pybind11;

namespace tokenflex {
namespace {

// Rows with neighbouring elements, or one row.
struct Floats {
  dlpack::DataType dtype;
  int64_t rows, width;
  char* data;
  int64_t stride;  // bytes

  int64_t bytes() const { return rows * width * (dtype.bits / 8); }
  bool is_contiguous() const { return rows == 1 || stride * rows == bytes(); }
  ConstRows const_rows() const { return {data, stride}; }
  bool is_like(const Floats& other) const { return dtype == other.dtype; }
};

std::optional<Floats> floats(PyObject* object, int32_t ndim) {
  const auto tensor = tensor_views().floats(object);
  if (!tensor || tensor->ndim != ndim || tensor->data == nullptr) return std::nullopt;
  const int64_t width = tensor->shape[ndim - 1], rows = ndim == 2 ? tensor->shape[0] : 1;
  if (width < 1 || rows < 1 || (tensor->strides[ndim - 1] != 1 && width > 1)) return std::nullopt;
  const int64_t size = tensor->dtype.bits / 8, stride = ndim == 2 ? tensor->strides[0] : width;
  return Floats{tensor->dtype, rows, width, static_cast<char*>(tensor->data), stride * size};
}

// A vector of LayerNorm's parameters for rows of x; `fits` turns false if it is none.
Parameter parameter(PyObject* object, const Floats& x, bool& fits) {
  if (object == Py_None) return {nullptr, ""};
  const auto vector = floats(object, 1);
  fits = fits && vector && vector->is_like(x) && vector->width == x.width;
  if (!fits) return {nullptr, ""};
  return {vector->data, name_of(vector->dtype)};
}

// The arguments that Python makes of its tables once, see HostTables.
PoolTables pool_tables(PyObject* tables) {
  if (!PyTuple_Check(tables) || PyTuple_GET_SIZE(tables) != 6) {
    throw std::invalid_argument("tables must be a tuple of 6");
  }
  const auto item = [&](int i) { return integer(PyTuple_GET_ITEM(tables, i)); };
  return {reinterpret_cast<const int32_t*>(item(0)),
          item(1),
          reinterpret_cast<const int32_t*>(item(2)),
          reinterpret_cast<const double*>(item(3)),
          item(4) != 0,
          item(5)};
}

// A new tensor beside `like`; `dtype` of None is that of `like`.
struct NewTensor {
  py::object tensor;
  void* data;
};

NewTensor new_tensor(PyObject* like, std::initializer_list<int64_t> shape,
                     PyObject* dtype = nullptr) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  static PyObject* const names = py::make_tuple("dtype").release().ptr();
  py::tuple sizes(shape.size());
  size_t axis = 0;
  for (const int64_t size : shape) sizes[axis++] = size;
  PyObject* arguments[] = {like, sizes.ptr(), dtype};
  PyObject* result = PyObject_VectorcallMethod(
      name, arguments, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, dtype == nullptr ? nullptr : names);
  if (result == nullptr) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(result), tensor_views().address(result)};
}

// torch's dtype of the sums of rows, or null where it is that of the rows.
PyObject* sums_dtype(const Floats& rows) {
  static PyObject* const float32 =
      py::object(py::module_::import("torch").attr("float32")).release().ptr();
  return rows.dtype.bits < 32 ? float32 : nullptr;
}

// (x, weight, bias, eps, tables, cells, saves, threads) -> the pooled and normalised rows, alone or
// with what backward reads: (out, normalised, inverse_std).
py::object pool_norm_tensors(PyObject* const* arguments) {
  PyObject* like = arguments[0];
  const auto x = floats(like, 2);
  if (!x) return py::none();
  bool fits = true;
  const Parameter weight = parameter(arguments[1], *x, fits);
  const Parameter bias = parameter(arguments[2], *x, fits);
  const PoolTables tables = pool_tables(arguments[4]);
  if (!fits || x->rows != tables.num_patches || (bias.data && !weight.data)) return py::none();
  const double eps = PyFloat_AsDouble(arguments[3]);
  const int64_t cells = integer(arguments[5]);
  const bool saves = arguments[6] == Py_True && weight.data;
  const int threads = int(integer(arguments[7]));

  const NewTensor out = new_tensor(like, {cells, x->width});
  NewTensor normalised = {py::none(), nullptr}, inverse_std = normalised;
  if (saves) {
    normalised = new_tensor(like, {cells, x->width});
    inverse_std = new_tensor(like, {cells}, sums_dtype(*x));
  }
  const std::string dtype = name_of(x->dtype);
  maybe_without_gil(x->bytes(), [&] {
    pool_norm_forward({tables, x->const_rows(), dtype, x->width, weight, bias, eps, out.data,
                       normalised.data, inverse_std.data, dtype},
                      threads);
  });
  if (arguments[6] != Py_True) return out.tensor;
  return py::make_tuple(out.tensor, normalised.tensor, inverse_std.tensor);
}

// Sums over rows, rounded to the dtype of the rows as the work is done.
class Totals {
 public:
  Totals(PyObject* like, const Floats& rows, int64_t count)
      : result_(new_tensor(like, {count})), count_(count), dtype_(name_of(rows.dtype)) {
    if (rows.dtype.bits < 32) sums_.resize(size_t(count));
  }

  void* data() { return sums_.empty() ? result_.data : sums_.data(); }

  const py::object& rounded_result() {
    if (!sums_.empty()) {
      with_dtype(dtype_, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(T) == 2) {
          for (int64_t i = 0; i < count_; ++i) {
            static_cast<T*>(result_.data)[i] = rounded<T>(sums_[size_t(i)]);
          }
        }
      });
    }
    return result_.tensor;
  }

 private:
  NewTensor result_;
  int64_t count_;
  std::string dtype_;
  std::vector<float> sums_;  // of 16-bit rows
};

// (grad, normalised, inverse_std, weight, tables, needs_x, needs_scale, needs_shift, threads) -> the
// gradients of x, scale and shift in the dtype of grad; None for those that are not needed.
py::object pool_norm_gradient_tensors(PyObject* const* arguments) {
  PyObject* like = arguments[0];
  const auto grad = floats(like, 2);
  if (!grad) return py::none();
  bool fits = true;
  const Parameter weight = parameter(arguments[3], *grad, fits);
  const void *normalised = nullptr, *inverse_std = nullptr;
  if (weight.data) {
    const auto rows = floats(arguments[1], 2), inverse = floats(arguments[2], 1);
    fits = fits && rows && inverse && rows->is_like(*grad) && rows->is_contiguous() &&
           rows->rows == grad->rows && rows->width == grad->width && inverse->width == grad->rows &&
           inverse->dtype.bits == std::max<int>(32, grad->dtype.bits);
    if (fits) normalised = rows->data, inverse_std = inverse->data;
  }
  if (!fits) return py::none();
  const PoolTables tables = pool_tables(arguments[4]);
  const bool needs_x = arguments[5] == Py_True;
  const bool needs_scale = arguments[6] == Py_True, needs_shift = arguments[7] == Py_True;
  const int threads = int(integer(arguments[8]));

  NewTensor grad_x = {py::none(), nullptr};
  if (needs_x) grad_x = new_tensor(like, {tables.num_patches, grad->width});
  std::optional<Totals> scale, shift;  // both or none
  if (needs_scale || needs_shift) {
    scale.emplace(like, *grad, grad->width);
    shift.emplace(like, *grad, grad->width);
  }
  const std::string dtype = name_of(grad->dtype);
  maybe_without_gil(tables.num_patches * grad->width * (grad->dtype.bits / 8), [&] {
    pool_norm_backward({tables, grad->const_rows(), normalised, inverse_std, dtype, grad->width,
                        weight, grad_x.data, dtype, scale ? scale->data() : nullptr,
                        shift ? shift->data() : nullptr},
                       threads);
  });
  return py::make_tuple(grad_x.tensor, needs_scale ? scale->rounded_result() : py::none(),
                        needs_shift ? shift->rounded_result() : py::none());
}

// (like, rows, columns) -> a new tensor of rows, contiguous.
py::object new_rows(PyObject* const* arguments) {
  return new_tensor(arguments[0], {integer(arguments[1]), integer(arguments[2])}).tensor;
}

// (normalised, weight, bias, threads) -> normalised * weight + bias.
py::object scale_shift_tensors(PyObject* const* arguments) {
  const auto rows = floats(arguments[0], 2);
  if (!rows || !rows->is_contiguous()) return py::none();
  bool fits = true;
  const Parameter weight = parameter(arguments[1], *rows, fits);
  const Parameter bias = parameter(arguments[2], *rows, fits);
  if (!fits || !weight.data) return py::none();
  const int threads = int(integer(arguments[3]));
  const NewTensor out = new_tensor(arguments[0], {rows->rows, rows->width});
  maybe_without_gil(rows->bytes(), [&] {
    scale_shift(rows->data, name_of(rows->dtype), rows->rows, rows->width, weight, bias, out.data,
                threads);
  });
  return out.tensor;
}

bool are_linears(PyObject* const* tensors, int count, const Floats& x, int64_t width,
                 int64_t& outputs) {
  for (int i = 0; i < count; ++i, tensors += 2) {
    const auto weight = floats(tensors[0], 2);
    if (!weight || !weight->is_like(x) || weight->width != width) return false;
    if (outputs == 0) outputs = weight->rows;
    if (weight->rows != outputs) return false;
    if (tensors[1] == Py_None) continue;
    const auto bias = floats(tensors[1], 1);
    if (!bias || !bias->is_like(x) || bias->width != outputs) return false;
  }
  return true;
}

// (x, gate weight, gate bias, up weight, up bias, and for a projector down weight, down bias): whether
// these are ordinary tensors of one dtype whose shapes go together.
py::object fit_tensors(PyObject* const* arguments, Py_ssize_t count) {
  const auto x = floats(arguments[0], 2);
  int64_t hidden = 0, outputs = 0;
  const bool fit = x && are_linears(arguments + 1, 2, *x, x->width, hidden) &&
                   (count == 5 || are_linears(arguments + 5, 1, *x, hidden, outputs));
  return py::bool_(fit);
}

// (gate, up, keeps, threads) -> activation(gate) * up, in the place of gate unless that is kept.
py::object gated_product_tensors(PyObject* const* arguments) {
  const auto gate = floats(arguments[0], 2), up = floats(arguments[1], 2);
  if (!gate || !up || !gate->is_contiguous() || !up->is_contiguous() || !gate->is_like(*up) ||
      gate->rows != up->rows || gate->width != up->width) {
    return py::none();
  }
  const int threads = int(integer(arguments[3]));
  NewTensor product = {py::reinterpret_borrow<py::object>(arguments[0]), gate->data};
  if (arguments[2] == Py_True) product = new_tensor(arguments[0], {gate->rows, gate->width});
  maybe_without_gil(gate->bytes(), [&] {
    gated_product({gate->data, up->data, gate->rows, gate->width}, false, product.data,
                  name_of(gate->dtype), threads);
  });
  return product.tensor;
}

// (d product, gate, up, needs_product, needs_sums, threads) -> (grads, product, sums), see swiglu.h;
// None for those that are not needed.
py::object gate_gradient_tensors(PyObject* const* arguments) {
  const auto grad = floats(arguments[0], 2), gate = floats(arguments[1], 2);
  const auto up = floats(arguments[2], 2);
  if (!grad || !gate || !up || !gate->is_contiguous() || !up->is_contiguous()) return py::none();
  for (const auto& other : {*grad, *up}) {
    if (!other.is_like(*gate) || other.rows != gate->rows || other.width != gate->width) {
      return py::none();
    }
  }
  const int threads = int(integer(arguments[5]));
  const NewTensor grads = new_tensor(arguments[1], {gate->rows, 2 * gate->width});
  NewTensor product = {py::none(), nullptr}, sums = product;
  if (arguments[3] == Py_True) product = new_tensor(arguments[1], {gate->rows, gate->width});
  if (arguments[4] == Py_True) {
    sums = new_tensor(arguments[1], {2 * gate->width}, sums_dtype(*gate));
    std::memset(sums.data, 0, size_t(2 * gate->width) * (gate->dtype.bits == 64 ? 8 : 4));
  }
  maybe_without_gil(gate->bytes(), [&] {
    gate_gradients({gate->data, up->data, gate->rows, gate->width},
                   {grad->const_rows(), grads.data, product.data, sums.data}, name_of(gate->dtype),
                   threads);
  });
  return py::make_tuple(grads.tensor, product.tensor, sums.tensor);
}

template <auto kFunction, int kArguments>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, kArguments, [&] { return kFunction(arguments); });
}

PyObject* call_fit_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, count == 7 ? 7 : 5, [&] { return fit_tensors(arguments, count); });
}

}  // namespace

void define_projector_calls(py::module_& module) {
  static PyMethodDef methods[] = {
      method("pool_norm_tensors", &call<&pool_norm_tensors, 8>),
      method("pool_norm_gradient_tensors", &call<&pool_norm_gradient_tensors, 9>),
      method("new_rows", &call<&new_rows, 3>),
      method("scale_shift_tensors", &call<&scale_shift_tensors, 4>),
      method("fit_tensors", &call_fit_tensors),
      method("gated_product_tensors", &call<&gated_product_tensors, 4>),
      method("gate_gradient_tensors", &call<&gate_gradient_tensors, 6>),
      {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace tokenflex
