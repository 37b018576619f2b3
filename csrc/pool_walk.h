// Walking over the images of a batch, their rows and windows, as tokenflex_kernels/pool_norm/tables.py lays
// them out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "pool_norm.h"
#include "pool_rows.h"
#include "refuse.h"

namespace tokenflex {

// The patches of one cell along an axis.
struct Window {
  int32_t first;
  int32_t count;
  int32_t divisor;
  int32_t weights;  // index of the first one

  int32_t end() const { return first + count; }
};

// The cells along an axis whose windows hold one patch.
struct Cover {
  int32_t first;
  int32_t count;

  int32_t end() const { return first + count; }
};

struct Image {
  int64_t first_patch, in_h, in_w;
  int64_t first_cell, out_h, out_w;
  const Window *windows_h, *windows_w;
  const Cover *covers_h, *covers_w;

  int64_t patch(int64_t r, int64_t c) const { return first_patch + r * in_w + c; }
  int64_t cell(int64_t i, int64_t j) const { return first_cell + i * out_w + j; }
};

constexpr int64_t kImageFields = 10;

inline Image image_of(const PoolTables& tables, int64_t index) {
  const int32_t* fields = tables.images + index * kImageFields;
  const auto windows = [&](int field) {
    return reinterpret_cast<const Window*>(tables.axes + fields[field]);
  };
  const auto covers = [&](int field) {
    return reinterpret_cast<const Cover*>(tables.axes + fields[field]);
  };
  return {fields[0], fields[1],  fields[2],  fields[3], fields[4],
          fields[5], windows(6), windows(7), covers(8), covers(9)};
}

// A range of patches of a batch.
struct Part {
  int64_t begin;
  int64_t end;

  bool holds(int64_t patch) const { return begin <= patch && patch < end; }
};

inline Part part_of(const PoolTables& tables, int64_t index, int64_t parts) {
  return {tables.num_patches * index / parts, tables.num_patches * (index + 1) / parts};
}

// Calls work(image) for each image that has patches in the part.
template <class Work>
void for_images(const PoolTables& tables, Part part, const Work& work) {
  const auto first_patch = [&](int64_t index) { return tables.images[index * kImageFields]; };
  int64_t index = 0;  // the last image that begins at or before the part
  for (int64_t end = tables.num_images; end - index > 1;) {
    const int64_t middle = (index + end) / 2;
    (first_patch(middle) <= part.begin ? index : end) = middle;
  }
  for (; index < tables.num_images && first_patch(index) < part.end; ++index) {
    work(image_of(tables, index));
  }
}

// Collects the rows of a weighted sum, and hands over as many at a time as are summed at once.
template <class T>
class RowCollector {
 public:
  explicit RowCollector(bool weighted) { rows_.weighted = weighted; }

  template <class Flush>
  void add(const T* row, SumOf<T> weight, const Flush& flush) {
    if (rows_.count == kRowsAtOnce) {
      flush(rows_);
      rows_.count = 0;
    }
    rows_.rows[rows_.count] = row;
    rows_.weights[rows_.count++] = weight;
  }

  template <class Flush>
  void flush(const Flush& flush) {
    flush(rows_);
    rows_.count = 0;
  }

  // Those that were not handed over, at least one if any was added.
  const RowSum<T>& rest() const { return rows_; }

 private:
  RowSum<T> rows_ = {};
};

// The parameter in the type of sums; zeros for none.
template <class Sum>
std::vector<Sum> widened_vector(const Parameter& parameter, int64_t width) {
  std::vector<Sum> vector(static_cast<size_t>(width));
  if (parameter.data) {
    with_dtype(parameter.dtype, [&](auto element) {
      using T = decltype(element);
      const T* data = static_cast<const T*>(parameter.data);
      for (int64_t k = 0; k < width; ++k) vector[size_t(k)] = Sum(widened(data[k]));
    });
  }
  return vector;
}

// Calls work(T()) for those dtypes whose sums are of type Sum.
template <class Sum, class Work>
void with_dtype_of_sums(const std::string& name, const Work& work) {
  with_dtype(name, [&](auto element) {
    if constexpr (std::is_same_v<SumOf<decltype(element)>, Sum>) {
      work(element);
    } else {
      refuse("dtype must have the sums of the other rows' dtype, got ", name);
    }
  });
}

}  // namespace tokenflex
