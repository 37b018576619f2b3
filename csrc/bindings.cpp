// The Python face of the extension. Tensors arrive as addresses, sizes and byte strides, so that one
// binary serves every torch version and no torch is needed to build it; the Python callers in
// tokenflex_kernels check shapes, dtypes and devices and keep the tensors alive. Every function that
// works on a batch gives up the GIL meanwhile. std::invalid_argument becomes ValueError,
// std::runtime_error RuntimeError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bin_packing.h"
#include "huge_pages.h"
#include "launch_calls.h"
#include "merge_source.h"
#include "mover_grid.h"
#include "pack_plan.h"
#include "pool_norm.h"
#include "projector_calls.h"
#include "row_map.h"
#include "row_movers.h"
#include "row_split.h"
#include "row_sums.h"
#include "swiglu.h"
#include "tensor_calls.h"
#include "threads.h"

namespace py = pybind11;

namespace tokenflex {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// ---- planning

using Ints = py::array_t<int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

// Checks and counts, allocates, fills. Nobody else may write to the arrays meanwhile.
py::dict plan(const Ints& ids, const Ints& offsets, const Ints& counts,
              const std::optional<Ints>& image_index, int64_t image_token_id, bool expanded,
              const std::optional<Ints>& given_labels, int64_t ignore_index) {
  const PlanInput input = {ids.data(),
                           offsets.data(),
                           offsets.size() - 1,
                           counts.data(),
                           counts.size(),
                           image_index ? image_index->data() : nullptr,
                           image_index ? image_index->size() : counts.size(),
                           image_token_id,
                           expanded};
  const PlanLabels labels = {given_labels ? given_labels->data() : nullptr, ignore_index};
  PlanTotals totals;
  {
    const py::gil_scoped_release release;
    totals = check_and_count(input);
  }
  py::array_t<int64_t> tokens(totals.rows), positions(totals.rows), targets(totals.rows);
  py::array_t<int32_t> source(totals.rows), vision_rows(totals.vision_rows);
  py::array_t<int32_t> cu_seqlens(offsets.size());
  const PlanBuffers buffers = {tokens.mutable_data(),      positions.mutable_data(),
                               targets.mutable_data(),     source.mutable_data(),
                               vision_rows.mutable_data(), cu_seqlens.mutable_data()};
  {
    const py::gil_scoped_release release;
    fill_plan(input, labels, buffers);
  }
  using namespace py::literals;
  return py::dict("input_ids"_a = tokens, "position_ids"_a = positions, "labels"_a = targets,
                  "source"_a = source, "vision_rows"_a = vision_rows, "cu_seqlens"_a = cu_seqlens,
                  "max_token_id"_a = totals.max_token_id,
                  "num_token_ids"_a = totals.num_token_ids);
}

void merge_source(Address vision_rows, bool is_int64, int64_t num_vision, Address source,
                  int64_t rows) {
  const py::gil_scoped_release release;
  if (is_int64) {
    fill_merge_source(at<const int64_t>(vision_rows), num_vision, at<int32_t>(source), rows);
  } else {
    fill_merge_source(at<const int32_t>(vision_rows), num_vision, at<int32_t>(source), rows);
  }
}

#ifdef TOKENFLEX_CUDA
void merge_source_cuda(Address vision_rows, bool is_int64, int64_t num_vision, Address source,
                       int64_t rows, int device, Address stream) {
  const py::gil_scoped_release release;
  if (is_int64) {
    fill_merge_source_cuda(at<const int64_t>(vision_rows), num_vision, at<int32_t>(source), rows,
                           device, stream);
  } else {
    fill_merge_source_cuda(at<const int32_t>(vision_rows), num_vision, at<int32_t>(source), rows,
                           device, stream);
  }
}
#endif

// ---- bins

// Two lists of ints: a list for each of many bins is slow to make while Python's cyclic garbage
// collector is on, and it is for Python to pause that.
py::tuple as_tuple(const Bins& bins) { return py::make_tuple(bins.order, bins.offsets); }

py::tuple bin_pack(const Ints& lengths, int64_t capacity) {
  const int64_t* length = lengths.data();
  std::vector<Load> samples(size_t(lengths.size()));
  Bins bins;
  {
    const py::gil_scoped_release release;
    for (Load& sample : samples) sample.tokens = *length++;
    bins = first_fit_decreasing(samples, {capacity, 0});
  }
  return as_tuple(bins);
}

py::tuple balance_bins(const Ints& tokens, const Ints& tiles, int64_t max_tokens,
                       int64_t max_tiles, int64_t token_price, int64_t tile_price, int64_t least,
                       int64_t multiple, const Doubles& exchange_costs) {
  const int64_t *token = tokens.data(), *tile = tiles.data();
  const std::vector<double> costs(exchange_costs.data(),
                                  exchange_costs.data() + exchange_costs.size());
  std::vector<Load> samples(size_t(tokens.size()));
  Bins bins;
  {
    const py::gil_scoped_release release;
    for (Load& sample : samples) sample = {*token++, *tile++};
    bins = balanced_bins(samples, {max_tokens, max_tiles}, {token_price, tile_price}, least,
                         multiple, costs);
  }
  return as_tuple(bins);
}

// ---- moving rows

// Without an address of vision, a map of text alone.
PackMap pack_map(Address table, int64_t table_stride, Address vision, int64_t vision_stride,
                 Address packed, int64_t packed_stride, Address source) {
  return {{at<const char>(table), table_stride},
          {at<const char>(vision), vision_stride},
          {at<char>(packed), packed_stride},
          at<const int32_t>(source),
          vision == 0};
}

void pack_rows(Address table, int64_t table_stride, Address vision, int64_t vision_stride,
               Address packed, int64_t packed_stride, Address source, int64_t rows,
               int64_t row_bytes, int64_t table_rows, int64_t vision_rows, bool unpacks,
               int threads) {
  const py::gil_scoped_release release;
  if (unpacks) {
    check_vision_rows(at<const int32_t>(source), rows, table_rows);
  } else {
    check_source(at<const int32_t>(source), rows, table_rows, vision_rows);
  }
  move_rows(pack_map(table, table_stride, vision, vision_stride, packed, packed_stride, source),
            rows, row_bytes, threads);
}

// For tests: how the device divides rows among threads and splits a row, and the device's threads one
// after another.
py::tuple pack_rows_by_threads(Address table, int64_t table_stride, Address vision,
                               int64_t vision_stride, Address packed, int64_t packed_stride,
                               Address source, int64_t rows, int64_t row_bytes, bool moves) {
  const PackMap map =
      pack_map(table, table_stride, vision, vision_stride, packed, packed_stride, source);
  const MoverGrid grid = mover_grid(map.alignment_bits(), rows, row_bytes);
  const auto work = grid.wide ? move_as_thread<true> : move_as_thread<false>;
  for (int64_t block = 0; moves && block < grid.blocks; ++block) {
    for (int thread = 0; thread < kMoverBlock; ++thread) {
      work(map, rows, row_bytes, grid.threads_per_row, block, thread);
    }
  }
  return py::make_tuple(grid.wide, grid.threads_per_row, grid.blocks);
}

py::tuple row_split(Address from, Address to, int64_t bytes) {
  const RowSplit split = split_row(at<const void>(from), at<const void>(to), bytes);
  return py::make_tuple(split.width, split.head, split.body, split.tail);
}

void copy_row_by_lanes(Address from, Address to, int64_t bytes, int lanes) {
  for (int lane = 0; lane < lanes; ++lane) {
    copy_split({at<const char>(from), at<char>(to)}, bytes, lane, lanes);
  }
}

// ---- summing rows

RowSums row_sums(Address grad, int64_t grad_stride, Address sums, int64_t sums_stride,
                 Address partials, int64_t partials_stride, Address slots, Address rows,
                 int64_t num_rows, int64_t width) {
  return {{at<const int32_t>(slots), at<const int64_t>(rows), num_rows},
          {at<const char>(grad), grad_stride},
          {at<char>(sums), sums_stride},
          {at<char>(partials), partials_stride},
          width};
}

void sum_rows_on_host(Address grad, int64_t grad_stride, Address sums, int64_t sums_stride,
                      Address partials, int64_t partials_stride, Address slots, Address rows,
                      int64_t num_rows, int64_t width, const std::string& dtype, int64_t num_slots,
                      int threads) {
  const py::gil_scoped_release release;
  const RowSums job = row_sums(grad, grad_stride, sums, sums_stride, partials, partials_stride,
                               slots, rows, num_rows, width);
  check_slots(job.segments, num_slots);
  sum_rows(job, dtype, threads);
}

#ifdef TOKENFLEX_CUDA
void sum_rows_on_device(Address grad, int64_t grad_stride, Address sums, int64_t sums_stride,
                        Address partials, int64_t partials_stride, Address slots, Address rows,
                        int64_t num_rows, int64_t width, const std::string& dtype, int device,
                        Address stream) {
  const py::gil_scoped_release release;
  sum_rows_cuda(row_sums(grad, grad_stride, sums, sums_stride, partials, partials_stride, slots,
                         rows, num_rows, width),
                dtype, device, stream);
}

void pack_rows_cuda(Address table, int64_t table_stride, Address vision, int64_t vision_stride,
                    Address packed, int64_t packed_stride, Address source, int64_t rows,
                    int64_t row_bytes, int device, Address stream) {
  const py::gil_scoped_release release;
  move_rows_cuda(
      pack_map(table, table_stride, vision, vision_stride, packed, packed_stride, source), rows,
      row_bytes, device, stream);
}
#endif

// ---- the gated unit

GateUp gate_up(Address gate, Address up, int64_t rows, int64_t hidden) {
  return {at<const void>(gate), at<const void>(up), rows, hidden};
}

void gated_product_on_host(Address gate, Address up, int64_t rows, int64_t hidden, bool by_columns,
                           Address product, const std::string& dtype, int threads) {
  const py::gil_scoped_release release;
  gated_product(gate_up(gate, up, rows, hidden), by_columns, at<void>(product), dtype, threads);
}

void gate_gradients_on_host(Address gate, Address up, int64_t rows, int64_t hidden, Address grad,
                            int64_t grad_stride, Address grads, Address product, Address sums,
                            const std::string& dtype, int threads) {
  const py::gil_scoped_release release;
  gate_gradients(
      gate_up(gate, up, rows, hidden),
      {{at<const char>(grad), grad_stride}, at<void>(grads), at<void>(product), at<void>(sums)},
      dtype, threads);
}

void transpose_on_host(Address from, int64_t from_stride, Address to, int64_t rows,
                       int64_t columns, const std::string& dtype, int threads) {
  const py::gil_scoped_release release;
  transpose({at<const char>(from), from_stride}, at<void>(to), rows, columns, dtype, threads);
}

// ---- pooling and LayerNorm

PoolTables pool_tables(Address images, int64_t num_images, Address axes, Address weights,
                       bool weighted, int64_t num_patches) {
  return {at<const int32_t>(images), num_images, at<const int32_t>(axes),
          at<const double>(weights), weighted,   num_patches};
}

// The tables are the five arguments from `images` on.
void pool_norm_forward_on_host(Address x, int64_t x_stride, const std::string& dtype,
                               int64_t width, Address weight, const std::string& weight_dtype,
                               Address bias, const std::string& bias_dtype, double eps,
                               Address out, Address normalised, Address inverse_std,
                               const std::string& out_dtype, Address images, int64_t num_images,
                               Address axes, Address weights, bool weighted, int64_t num_patches,
                               int threads) {
  const py::gil_scoped_release release;
  pool_norm_forward({pool_tables(images, num_images, axes, weights, weighted, num_patches),
                     {at<const char>(x), x_stride},
                     dtype,
                     width,
                     {at<const void>(weight), weight_dtype},
                     {at<const void>(bias), bias_dtype},
                     eps,
                     at<void>(out),
                     at<void>(normalised),
                     at<void>(inverse_std),
                     out_dtype},
                    threads);
}

void pool_norm_backward_on_host(Address grad, int64_t grad_stride, const std::string& dtype,
                                int64_t width, Address normalised, Address inverse_std,
                                Address weight, const std::string& weight_dtype, Address grad_x,
                                const std::string& grad_x_dtype, Address grad_scale,
                                Address grad_shift, Address images, int64_t num_images,
                                Address axes, Address weights, bool weighted,
                                int64_t num_patches, int threads) {
  const py::gil_scoped_release release;
  pool_norm_backward({pool_tables(images, num_images, axes, weights, weighted, num_patches),
                      {at<const char>(grad), grad_stride},
                      at<const void>(normalised),
                      at<const void>(inverse_std),
                      dtype,
                      width,
                      {at<const void>(weight), weight_dtype},
                      at<void>(grad_x),
                      grad_x_dtype,
                      at<void>(grad_scale),
                      at<void>(grad_shift)},
                     threads);
}

void scale_shift_on_host(Address normalised, const std::string& dtype, int64_t rows,
                         int64_t width, Address weight, const std::string& weight_dtype,
                         Address bias, const std::string& bias_dtype, Address out, int threads) {
  const py::gil_scoped_release release;
  scale_shift(at<const void>(normalised), dtype, rows, width,
              {at<const void>(weight), weight_dtype}, {at<const void>(bias), bias_dtype},
              at<void>(out), threads);
}

// What the extension was built for, e.g. {"sm_80", "sm_90", "compute_90"}.
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
#ifdef TOKENFLEX_CUDA
  std::istringstream words(TOKENFLEX_CUDA);
  for (std::string name; words >> name;) names.push_back(name);
#endif
  return names;
}

}  // namespace
}  // namespace tokenflex

PYBIND11_MODULE(_C, module) {
  using namespace tokenflex;
  module.doc() = "Packing and pooling on the host and the device. Private: use tokenflex_kernels.";

  module.def("plan", &plan);
  module.def("merge_source", &merge_source);
  module.def("bin_pack", &bin_pack);
  module.def("balance_bins", &balance_bins);

  module.def("access_bytes", &access_bytes);
  module.def("worthwhile_parts", &worthwhile_parts);
  module.def("has_torch_team", &has_torch_team);
  module.def("allow_torch_team", &allow_torch_team);
  module.def("prefer_huge_pages", [](Address data, int64_t bytes) {  // for tests
    prefer_huge_pages(at<void>(data), bytes);
  });
  module.def("pack_rows_by_threads", &pack_rows_by_threads);
  module.def("row_split", &row_split);
  module.def("copy_row_by_lanes", &copy_row_by_lanes);
  module.def("pack_rows", &pack_rows);

  define_tensor_calls(module);
  define_launch_calls(module);
  define_projector_calls(module);

  module.attr("sum_tile") = kTile;
  module.def("sum_rows", &sum_rows_on_host);

  module.def("gated_product", &gated_product_on_host);
  module.def("gate_gradients", &gate_gradients_on_host);
  module.def("transpose", &transpose_on_host);
  module.def("pool_norm_forward", &pool_norm_forward_on_host);
  module.def("pool_norm_backward", &pool_norm_backward_on_host);
  module.def("scale_shift", &scale_shift_on_host);

  module.attr("cuda_architectures") = cuda_architectures();
#ifdef TOKENFLEX_CUDA
  module.attr("has_cuda") = true;
  module.def("merge_source_cuda", &merge_source_cuda);
  module.def("pack_rows_cuda", &pack_rows_cuda);
  module.def("sum_rows_cuda", &sum_rows_on_device);
  module.def("cuda_device_count", &cuda_device_count);
#else
  module.attr("has_cuda") = false;
  module.def("cuda_device_count", [] { return 0; });
#endif
}
