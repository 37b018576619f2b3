// The row movers on host memory, called with tensors.
//
// Reading a tensor through DLPack takes 50 ns, where Python takes 80 for an address and 300 for a
// stride; a batch of 16 rows is moved in less. Each function returns None where a tensor is anything
// but ordinary, for the caller to take the general way, which also knows the right error.
#include "tensor_calls.h"

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "dlpack.h"
#include "merge_source.h"
#include "row_map.h"
#include "row_movers.h"
#include "row_sums.h"

namespace py = pybind11;

namespace tokenflex {
namespace {

constexpr int64_t kBytesWithoutGil = 1 << 16;  // below, other Python threads can wait

// What is needed of torch, which the extension does not link.
struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  py::object tensor, parameter, empty_like, int32, empty;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    parameter = torch.attr("nn").attr("Parameter");
    empty_like = torch.attr("empty_like");
    empty = torch.attr("empty");
    int32 = torch.attr("int32");
    const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
    api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    while (api != nullptr && api->major != dlpack::kMajorVersion) api = api->previous;
    if (api == nullptr || api->view == nullptr) {
      throw std::runtime_error("this release of torch has no version 1 of DLPack's exchange API");
    }
  }
};

const Torch& torch() {
  static const Torch* loaded = new Torch;  // never destroyed: Python may end first
  return *loaded;
}

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

// A tensor in host memory that holds the numbers that it stands for.
std::optional<dlpack::Tensor> host_tensor(py::handle object) {
  static const Method is_neg("is_neg");
  const PyTypeObject* type = Py_TYPE(object.ptr());
  const auto is = [&](const py::object& other) { return (PyObject*)type == other.ptr(); };
  if (!is(torch().tensor) && !is(torch().parameter)) return std::nullopt;
  dlpack::Tensor tensor;
  if (torch().api->view(object.ptr(), &tensor) != 0) {  // it has no memory
    PyErr_Clear();
    return std::nullopt;
  }
  if (tensor.device.type != dlpack::kCpu || tensor.dtype.lanes != 1) return std::nullopt;
  if (is_neg(object).ptr() == Py_True) return std::nullopt;
  return tensor;
}

bool is_float(dlpack::DataType dtype) {
  return (dtype.code == dlpack::kFloat && dtype.bits >= 16) ||
         (dtype.code == dlpack::kBfloat && dtype.bits == 16);
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
  ConstRows const_rows() const { return {data, stride}; }
};

std::optional<RowsView> float_rows(py::handle object) {
  const auto tensor = host_tensor(object);
  if (!tensor || tensor->ndim != 2 || !is_float(tensor->dtype)) return std::nullopt;
  const int64_t count = tensor->shape[0], width = tensor->shape[1];
  if (tensor->strides[1] != 1 && width > 1) return std::nullopt;
  if (tensor->data == nullptr && count * width > 0) return std::nullopt;  // zeros without memory
  return RowsView{tensor->dtype, count, width, static_cast<char*>(tensor->data),
                  tensor->strides[0] * (tensor->dtype.bits / 8)};
}

struct IntsView {
  const void* data;
  int64_t count;
  bool is_int64;
};

std::optional<IntsView> host_ints(py::handle object, bool may_be_int64 = false) {
  const auto tensor = host_tensor(object);
  if (!tensor || tensor->ndim != 1) return std::nullopt;
  const bool is_int64 = may_be_int64 && is_int(tensor->dtype, 64);
  if (!is_int64 && !is_int(tensor->dtype, 32)) return std::nullopt;
  if (tensor->strides[0] != 1 && tensor->shape[0] > 1) return std::nullopt;
  return IntsView{tensor->data, tensor->shape[0], is_int64};
}

char* address(py::handle tensor) {
  dlpack::Tensor view;
  if (torch().api->view(tensor.ptr(), &view) != 0) throw py::error_already_set();
  return static_cast<char*>(view.data);
}

template <class Work>
void maybe_without_gil(int64_t bytes, const Work& work) {
  if (bytes < kBytesWithoutGil) return work();
  const py::gil_scoped_release release;
  work();
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
  const std::vector<char> zeros(table.is_none() || vision.is_none() ? size_t(row_bytes) : 0);
  const ConstRows none = {zeros.data(), 0};
  const int64_t table_count = table.is_none() ? endless : first->count;
  const int64_t vision_count = vision.is_none() ? endless : second->count;
  if (table_count < least_table || (expected_vision >= 0 && vision_count != expected_vision)) {
    return py::none();
  }
  static const Method new_empty("new_empty");
  py::object packed = new_empty(like, py::make_tuple(ints->count, first->width));
  const auto entries = static_cast<const int32_t*>(ints->data);
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

// A copy of contiguous inputs_embeds [.., D] with vision rows in place of some; with its source map
// where that is wanted.
py::object merge_tensors(py::handle inputs_embeds, py::handle vision, py::handle vision_rows,
                         bool wants_source, int threads) {
  const auto embeds = host_tensor(inputs_embeds);
  const auto rows = float_rows(vision);
  const auto numbers = host_ints(vision_rows, true);
  if (!embeds || !rows || !numbers || embeds->ndim < 1 || numbers->count != rows->count) {
    return py::none();
  }
  const int64_t width = embeds->shape[embeds->ndim - 1];
  if (!(embeds->dtype == rows->dtype) || width != rows->width) return py::none();
  int64_t count = 1, stride = width;
  for (int32_t axis = embeds->ndim - 2; axis >= 0; --axis) {
    if (embeds->shape[axis] > 1 && embeds->strides[axis] != stride) return py::none();
    count *= embeds->shape[axis], stride *= embeds->shape[axis];
  }
  if (width > 1 && embeds->strides[embeds->ndim - 1] != 1) return py::none();
  if (count > INT32_MAX || (embeds->data == nullptr && count * width > 0)) return py::none();

  py::object merged = torch().empty_like(inputs_embeds), source;
  std::vector<int32_t> scratch;
  int32_t* entries = nullptr;
  if (wants_source) {
    source = torch().empty(count, py::arg("dtype") = torch().int32);
    entries = reinterpret_cast<int32_t*>(address(source));
  } else {
    scratch.resize(size_t(count));
    entries = scratch.data();
  }
  const int64_t row_bytes = rows->row_bytes();
  const PackMap map = {{static_cast<const char*>(embeds->data), row_bytes},
                       rows->const_rows(),
                       {address(merged), row_bytes},
                       entries};
  maybe_without_gil(count * row_bytes, [&] {
    if (numbers->is_int64) {
      fill_merge_source(static_cast<const int64_t*>(numbers->data), numbers->count, entries, count);
    } else {
      fill_merge_source(static_cast<const int32_t*>(numbers->data), numbers->count, entries, count);
    }
    move_rows(map, count, row_bytes, threads);
  });
  return wants_source ? py::make_tuple(merged, source) : merged;
}

std::string name_of(dlpack::DataType dtype) {
  return (dtype.code == dlpack::kBfloat ? "bfloat" : "float") + std::to_string(dtype.bits);
}

// The text rows of grad, added up by token id: [num_rows, D].
py::object table_gradient(py::handle grad, py::handle source, int64_t num_vision, int64_t num_rows,
                          int threads) {
  const auto rows = float_rows(grad);
  const auto ints = host_ints(source);
  if (!rows || !ints || rows->count != ints->count) return py::none();
  static const Method new_zeros("new_zeros");
  py::object sums = new_zeros(grad, py::make_tuple(num_rows, rows->width));
  const Rows to = {address(sums), rows->row_bytes()};
  maybe_without_gil(rows->count * rows->row_bytes(), [&] {
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

}  // namespace

void define_tensor_calls(py::module_& module) {
  module.def("pack_tensors", &pack_tensors);
  module.def("merge_tensors", &merge_tensors);
  module.def("table_gradient", &table_gradient);
}

}  // namespace tokenflex
