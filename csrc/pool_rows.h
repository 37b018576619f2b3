// Loops over the channels of a row, which pooling and LayerNorm consist of, on host memory.
//
// Rows are of type T, their sums of SumOf<T>. A reduction adds up a fixed number of lanes, so its result
// is the same whatever vectors the CPU has.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace tokenflex {

// Rows that are added up together, in registers.
constexpr int kRowsAtOnce = 4;

// The rows of a weighted sum. Where `weighted` is false, all weights are 1.
template <class T>
struct RowSum {
  const T* rows[kRowsAtOnce];
  SumOf<T> weights[kRowsAtOnce];
  int count;
  bool weighted;
};

// sums = the sum of the rows, or with `adds`, sums += it.
template <class T>
void add_rows(const RowSum<T>& rows, bool adds, SumOf<T>* sums, int64_t width);

// out = the sum of the rows.
template <class T>
void write_rows(const RowSum<SumOf<T>>& rows, T* out, int64_t width);

// out = row / divisor.
template <class T>
void write_average(const SumOf<T>* row, SumOf<T> divisor, T* out, int64_t width);

template <class Sum>
struct Moments {
  Sum mean;
  Sum variance;
};

template <class Sum>
Moments<Sum> moments(const Sum* row, int64_t width);

// normalised = (row - mean) * inverse, unless it is null, and out = that * scale + shift.
template <class T>
void write_norm(const SumOf<T>* row, SumOf<T> mean, SumOf<T> inverse, const SumOf<T>* scale,
                const SumOf<T>* shift, T* normalised, T* out, int64_t width);

// grad = factor * (row * scale - its mean - z * the mean of its product with z), for z = normalised.
// `scratch` is a row.
template <class T>
void norm_gradient(const T* row, const T* normalised, const SumOf<T>* scale, SumOf<T> factor,
                   SumOf<T>* grad, SumOf<T>* scratch, int64_t width);

// grad = row / divisor.
template <class T>
void average_gradient(const T* row, SumOf<T> divisor, SumOf<T>* grad, int64_t width);

// scale_grad += row * normalised, shift_grad += row.
template <class T>
void add_scale_gradient(const T* row, const T* normalised, SumOf<T>* scale_grad,
                        SumOf<T>* shift_grad, int64_t width);

}  // namespace tokenflex
