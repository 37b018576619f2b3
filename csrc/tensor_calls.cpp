// The row movers on host memory, called with tensors; and what calls of Triton kernels are known by.
//
// Reading a tensor through DLPack takes 50 ns, where Python takes 80 for an address and 300 for a
// stride; a batch of 16 rows is moved in less. Each function returns None where a tensor is anything
// but ordinary, for the caller to take the general way, which also knows the right error.
#include "tensor_calls.h"

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "merge_source.h"
#include "python_calls.h"
#include "row_map.h"
#include "row_movers.h"
#include "row_sums.h"
#include "tensor_views.h"

namespace py = pybind11;

namespace tokenflex {
namespace {

struct Method {
  PyObject* name;
  explicit Method(const char* text) : name(PyUnicode_InternFromString(text)) {}

  py::object operator()(py::handle self, py::handle argument = {}) const {
    PyObject* arguments[] = {self.ptr(), argument.ptr()};
    const size_t count = (argument ? 2 : 1) | PY_VECTORCALL_ARGUMENTS_OFFSET;
    PyObject* result = PyObject_VectorcallMethod(name, arguments, count, nullptr);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
};

// What may have business with an eager call, as library.is_plain_mode tells it; takes 0.3 us, not 1.3.
class Modes {
 public:
  Modes() {
    const py::module_ functions = py::module_::import("torch._C");
    for (const char* name : {"_are_functorch_transforms_active", "_get_tracing_state",
                             "_is_torch_function_mode_enabled", "_len_torch_dispatch_stack"}) {
      modes_.push_back(functions.attr(name));
    }
    modes_.push_back(py::module_::import("torch").attr("autograd").attr("_profiler_enabled"));
    is_grad_enabled_ = functions.attr("is_grad_enabled");
    has_key_ = functions.attr("_dispatch_tls_is_dispatch_key_included");
    for (const char* name : {"PreDispatch", "PythonDispatcher"}) {
      keys_.push_back(functions.attr("DispatchKey").attr(name));
    }
    forward_ad_ = py::module_::import("torch.autograd.forward_ad");
  }

  bool is_plain() const {
    for (const py::object& mode : modes_) {
      if (is_true(PyObject_CallNoArgs(mode.ptr()))) return false;
    }
    for (const py::object& key : keys_) {
      if (is_true(PyObject_CallOneArg(has_key_.ptr(), key.ptr()))) return false;
    }
    static PyObject* level = PyUnicode_InternFromString("_current_level");
    return PyLong_AsLong(checked(PyObject_GetAttr(forward_ad_.ptr(), level)).ptr()) < 0;
  }

  bool is_grad_enabled() const { return is_true(PyObject_CallNoArgs(is_grad_enabled_.ptr())); }

  static bool requires_grad(py::handle tensor) {
    static PyObject* name = PyUnicode_InternFromString("requires_grad");
    return is_true(PyObject_GetAttr(tensor.ptr(), name));
  }

 private:
  static py::object checked(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  static bool is_true(PyObject* result) { return PyObject_IsTrue(checked(result).ptr()) == 1; }

  std::vector<py::object> modes_, keys_;
  py::object is_grad_enabled_, has_key_, forward_ad_;
};

const Modes& modes() {
  static const Modes* loaded = new Modes;  // never destroyed: Python may end first
  return *loaded;
}

// The result of a call as autograd is to see it: record(*floats, (result, others, sizes)) where it records,
// with the number of rows of each of `floats`.
py::object recorded(py::handle record, std::initializer_list<py::handle> floats, py::object result,
                    py::handle others) {
  bool requires_grad = false;
  for (const py::handle tensor : floats) requires_grad |= Modes::requires_grad(tensor);
  if (!requires_grad || !modes().is_grad_enabled()) return result;
  std::vector<PyObject*> arguments;
  py::tuple sizes(floats.size());
  for (const py::handle tensor : floats) {
    sizes[arguments.size()] = tensor_views().host(tensor.ptr())->shape[0];
    arguments.push_back(tensor.ptr());
  }
  const py::tuple call = py::make_tuple(result, others, sizes);
  arguments.push_back(call.ptr());
  PyObject* seen = PyObject_Vectorcall(record.ptr(), arguments.data(), arguments.size(), nullptr);
  if (seen == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(seen);
}

bool is_int(dlpack::DataType dtype, int bits) {
  return dtype.code == dlpack::kInt && dtype.bits == bits;
}

// Float rows [.., width] with neighbouring elements.
struct RowsView {
  dlpack::DataType dtype;
  int64_t count, width;
  char* data;
  int64_t stride;  // bytes

  int64_t row_bytes() const { return width * (dtype.bits / 8); }
  int64_t bytes() const { return count * row_bytes(); }
  ConstRows const_rows() const { return {data, stride}; }
};

std::optional<RowsView> float_rows(py::handle object) {
  const auto tensor = tensor_views().floats(object.ptr());
  if (!tensor || tensor->ndim != 2) return std::nullopt;
  const int64_t count = tensor->shape[0], width = tensor->shape[1];
  if (tensor->strides[1] != 1 && width > 1) return std::nullopt;
  if (tensor->data == nullptr && count * width > 0) return std::nullopt;  // zeros without memory
  return RowsView{tensor->dtype, count, width, static_cast<char*>(tensor->data),
                  tensor->strides[0] * (tensor->dtype.bits / 8)};
}

// Contiguous floats [.., width] as rows.
std::optional<RowsView> contiguous_rows(py::handle object) {
  const auto tensor = tensor_views().floats(object.ptr());
  if (!tensor || tensor->ndim < 1) return std::nullopt;
  const int64_t width = tensor->shape[tensor->ndim - 1];
  int64_t count = 1, stride = width;
  for (int32_t axis = tensor->ndim - 2; axis >= 0; --axis) {
    if (tensor->shape[axis] > 1 && tensor->strides[axis] != stride) return std::nullopt;
    count *= tensor->shape[axis], stride *= tensor->shape[axis];
  }
  if (width > 1 && tensor->strides[tensor->ndim - 1] != 1) return std::nullopt;
  if (count > INT32_MAX || (tensor->data == nullptr && count * width > 0)) return std::nullopt;
  return RowsView{tensor->dtype, count, width, static_cast<char*>(tensor->data),
                  width * (tensor->dtype.bits / 8)};
}

struct IntsView {
  const void* data;
  int64_t count;
  bool is_int64;
};

std::optional<IntsView> host_ints(py::handle object, bool may_be_int64 = false) {
  const auto tensor = tensor_views().host(object.ptr());
  if (!tensor || tensor->ndim != 1) return std::nullopt;
  const bool is_int64 = may_be_int64 && is_int(tensor->dtype, 64);
  if (!is_int64 && !is_int(tensor->dtype, 32)) return std::nullopt;
  if (tensor->strides[0] != 1 && tensor->shape[0] > 1) return std::nullopt;
  return IntsView{tensor->data, tensor->shape[0], is_int64};
}

py::object empty_like(py::handle tensor) {
  static const py::object* function =
      new py::object(py::module_::import("torch").attr("empty_like"));
  return (*function)(tensor);
}

char* address(py::handle tensor) {
  return static_cast<char*>(tensor_views().address(tensor.ptr()));
}

// packed[r] = table[source[r]] if source[r] >= 0 else vision[~source[r]]. A table or vision of None is
// any number of rows of zeros; `expected_vision` of -1 is any number of rows.
py::object pack_tensors(py::handle table, py::handle vision, py::handle source, bool unpacks,
                        int64_t expected_vision, int64_t least_table, int threads) {
  const auto ints = host_ints(source);
  const py::handle like = table.is_none() ? vision : table;
  const auto first = float_rows(like);
  if (!ints || !first) return py::none();
  std::optional<RowsView> second = first;
  if (like.ptr() == table.ptr() && !vision.is_none() && !unpacks) second = float_rows(vision);
  if (!second || !(second->dtype == first->dtype) || second->width != first->width) {
    return py::none();
  }
  const int64_t row_bytes = first->row_bytes(), endless = int64_t(1) << 31;
  const ConstRows none = {nullptr, 0};
  const int64_t table_count = table.is_none() ? endless : first->count;
  const int64_t vision_count = vision.is_none() ? endless : second->count;
  if (table_count < least_table || (expected_vision >= 0 && vision_count != expected_vision)) {
    return py::none();
  }
  const auto entries = static_cast<const int32_t*>(ints->data);
  if (table.is_none() && vision_count == 0) {  // zeros alone, which the system need not write
    check_source(entries, ints->count, table_count, 0);
    static const Method new_zeros("new_zeros");
    return new_zeros(like, py::make_tuple(ints->count, first->width));
  }
  static const Method new_empty("new_empty");
  py::object packed = new_empty(like, py::make_tuple(ints->count, first->width));
  const PackMap map = {table.is_none() ? none : first->const_rows(),
                       vision.is_none() ? none : second->const_rows(),
                       {address(packed), row_bytes},
                       entries};
  maybe_without_gil(ints->count * row_bytes, [&] {
    if (unpacks) {
      check_vision_rows(entries, ints->count, table_count);
    } else {
      check_source(entries, ints->count, table_count, vision_count);
    }
    move_rows(map, ints->count, row_bytes, threads);
  });
  return packed;
}

// packed[r] = table[source[r]] where source[r] >= 0; vision rows are left as they are. Returns whether the
// tensors are ordinary, fit together, and have been written to.
bool write_text(py::handle packed, py::handle table, py::handle source, int64_t num_vision,
                int64_t least_table, int threads) {
  const auto to = float_rows(packed), from = float_rows(table);
  const auto ints = host_ints(source);
  if (!to || !from || !ints || to->count != ints->count) return false;
  if (!(to->dtype == from->dtype) || to->width != from->width || from->count < least_table) {
    return false;
  }
  const auto entries = static_cast<const int32_t*>(ints->data);
  const PackMap map = {from->const_rows(), {nullptr, 0}, {to->data, to->stride}, entries, true};
  maybe_without_gil(ints->count * to->row_bytes(), [&] {
    check_source(entries, ints->count, from->count, num_vision);
    move_rows(map, ints->count, to->row_bytes(), threads);
  });
  return true;
}

std::vector<int32_t> merge_source(const IntsView& vision_rows, int64_t rows) {
  std::vector<int32_t> source(static_cast<size_t>(rows));
  const auto fill = [&](const auto* numbers) {
    fill_merge_source(numbers, vision_rows.count, source.data(), rows);
  };
  if (vision_rows.is_int64) {
    fill(static_cast<const int64_t*>(vision_rows.data));
  } else {
    fill(static_cast<const int32_t*>(vision_rows.data));
  }
  return source;
}

// A copy of contiguous inputs_embeds [.., D] with vision rows in place of some.
py::object merge_tensors(py::handle inputs_embeds, py::handle vision, py::handle vision_rows,
                         int threads) {
  const auto embeds = contiguous_rows(inputs_embeds);
  const auto rows = float_rows(vision);
  const auto numbers = host_ints(vision_rows, true);
  if (!embeds || !rows || !numbers || numbers->count != rows->count) return py::none();
  if (!(embeds->dtype == rows->dtype) || embeds->width != rows->width) return py::none();

  py::object merged = empty_like(inputs_embeds);
  const int64_t row_bytes = rows->row_bytes();
  const Rows to = {address(merged), row_bytes};
  maybe_without_gil(embeds->count * row_bytes, [&] {
    const std::vector<int32_t> source = merge_source(*numbers, embeds->count);
    move_rows({embeds->const_rows(), rows->const_rows(), to, source.data()}, embeds->count,
              row_bytes, threads);
  });
  return merged;
}

// The gradients of inputs_embeds and vision, or None for those that are not wanted, from that of their
// merge [.., D], which is contiguous.
py::object merge_gradients(py::handle grad, py::handle vision_rows, bool wants_inputs,
                           bool wants_vision, int threads) {
  const auto rows = contiguous_rows(grad);
  const auto numbers = host_ints(vision_rows, true);
  if (!rows || !numbers) return py::none();
  py::object inputs = py::none(), vision = py::none();
  static const Method new_empty("new_empty");
  if (wants_vision) vision = new_empty(grad, py::make_tuple(numbers->count, rows->width));
  if (numbers->count == 0) {  // the inputs came out as they are
    if (wants_inputs) inputs = py::reinterpret_borrow<py::object>(grad);
    return py::make_tuple(inputs, vision);
  }
  if (wants_inputs) inputs = empty_like(grad);
  char* to_inputs = wants_inputs ? address(inputs) : nullptr;
  char* to_vision = wants_vision ? address(vision) : nullptr;
  maybe_without_gil(rows->bytes(), [&] {
    const std::vector<int32_t> source = merge_source(*numbers, rows->count);
    split_rows({rows->data, to_inputs, to_vision, source.data()}, rows->count, rows->row_bytes(),
               threads);
  });
  return py::make_tuple(inputs, vision);
}

// The text rows of grad, added up by token id: [num_rows, D].
py::object table_gradient(py::handle grad, py::handle source, int64_t num_vision, int64_t num_rows,
                          int threads) {
  const auto rows = float_rows(grad);
  const auto ints = host_ints(source);
  if (!rows || !ints || rows->count != ints->count) return py::none();
  static const Method new_empty("new_empty");
  py::object sums = new_empty(grad, py::make_tuple(num_rows, rows->width));
  const Rows to = {address(sums), rows->row_bytes()};
  maybe_without_gil((rows->count + num_rows) * rows->row_bytes(), [&] {
    clear_rows(to.data, num_rows, to.stride, threads);
    const TextRows text =
        text_by_id(static_cast<const int32_t*>(ints->data), ints->count, num_vision);
    const Segments segments = {text.ids.data(), text.rows.data(), int64_t(text.ids.size())};
    check_slots(segments, num_rows);
    const int64_t sum_bytes = rows->width * (rows->dtype.bits == 64 ? 8 : 4);
    std::vector<char> partials(size_t(segments.tiles() * sum_bytes));
    sum_rows({segments, rows->const_rows(), to, {partials.data(), sum_bytes}, rows->width},
             name_of(rows->dtype), threads);
  });
  return sums;
}

PyObject* call_pack_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, 7, [&] {
    return pack_tensors(arguments[0], arguments[1], arguments[2], arguments[3] == Py_True,
                        integer(arguments[4]), integer(arguments[5]), int(integer(arguments[6])));
  });
}

PyObject* call_write_text(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, 6, [&]() -> py::object {
    return py::bool_(write_text(arguments[0], arguments[1], arguments[2], integer(arguments[3]),
                                integer(arguments[4]), int(integer(arguments[5]))));
  });
}

// As `pack_tensors`, for a call in plain eager mode alone, which `record` is to record with its
// `others`: those arguments that are no floats. None for calls that need not be recorded.
PyObject* call_pack_eagerly(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, 9, [&]() -> py::object {
    const py::handle record = arguments[7], others = arguments[8];
    if (!modes().is_plain() || (record.is_none() && modes().is_grad_enabled())) return py::none();
    const bool unpacks = arguments[3] == Py_True;
    py::object packed =
        pack_tensors(arguments[0], arguments[1], arguments[2], unpacks, integer(arguments[4]),
                     integer(arguments[5]), int(integer(arguments[6])));
    if (packed.is_none() || record.is_none()) return packed;
    if (unpacks) return recorded(record, {arguments[0]}, packed, others);
    return recorded(record, {arguments[0], arguments[1]}, packed, others);
  });
}

PyObject* call_merge_eagerly(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, 5, [&]() -> py::object {
    if (!modes().is_plain()) return py::none();
    const py::handle embeds = arguments[0], vision = arguments[1], vision_rows = arguments[2];
    py::object merged = merge_tensors(embeds, vision, vision_rows, int(integer(arguments[3])));
    if (merged.is_none()) return merged;
    return recorded(arguments[4], {embeds, vision}, merged, py::make_tuple(vision_rows));
  });
}

PyObject* call_merge_gradients(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, 5, [&]() -> py::object {
    if (!modes().is_plain() || modes().is_grad_enabled()) return py::none();
    return merge_gradients(arguments[0], arguments[1], arguments[2] == Py_True,
                           arguments[3] == Py_True, int(integer(arguments[4])));
  });
}

// The part of a tensor's description before its shape and strides; without padding, so that equal ones
// are equal bytes.
struct Described {
  int32_t ndim, device_type, device;
  uint8_t code, bits, offset, is_differentiated;
};
static_assert(sizeof(Described) == 16);

// (*tensors) -> all that an eager call on them depends on but their numbers, as bytes: dtype, device,
// shape and strides of each, its address modulo 16, and whether the call is differentiated by it. None
// outside of plain eager mode, and where one is neither ordinary nor None.
PyObject* call_tensor_key(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_python_errors(count, count, [&]() -> py::object {
    if (!modes().is_plain()) return py::none();
    const bool may_record = modes().is_grad_enabled();
    std::string key;
    key.reserve(size_t(count) * 64);
    const auto append = [&](const void* bytes, size_t size) {
      key.append(static_cast<const char*>(bytes), size);
    };
    for (Py_ssize_t i = 0; i < count; ++i) {
      Described described = {-1, 0, 0, 0, 0, 0, 0};
      if (arguments[i] == Py_None) {
        append(&described, sizeof described);
        continue;
      }
      const auto tensor = tensor_views().plain(arguments[i]);
      if (!tensor || tensor_views().is_negated(arguments[i])) return py::none();
      const auto offset = uint8_t(reinterpret_cast<uintptr_t>(tensor->data) % 16);
      described = {tensor->ndim,
                   tensor->device.type,
                   tensor->device.id,
                   tensor->dtype.code,
                   tensor->dtype.bits,
                   offset,
                   may_record && Modes::requires_grad(arguments[i])};
      append(&described, sizeof described);
      const size_t axes = size_t(tensor->ndim);
      append(tensor->shape, axes * sizeof(int64_t));
      append(tensor->strides, axes * sizeof(int64_t));
      if (tensor->data == nullptr) {  // zeros without memory, unless there are no elements
        const int64_t* const shape = tensor->shape;
        if (std::find(shape, shape + axes, 0) == shape + axes) return py::none();
      }
    }
    return py::bytes(key);
  });
}

}  // namespace

void define_tensor_calls(py::module_& module) {
  static PyMethodDef methods[] = {method("pack_tensors", &call_pack_tensors),
                                  method("write_text", &call_write_text),
                                  method("pack_eagerly", &call_pack_eagerly),
                                  method("merge_eagerly", &call_merge_eagerly),
                                  method("merge_gradients", &call_merge_gradients),
                                  method("tensor_key", &call_tensor_key),
                                  {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("table_gradient", &table_gradient);
}

}  // namespace tokenflex
