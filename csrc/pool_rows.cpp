#include "pool_rows.h"

#include <cstring>

#include "vectors.h"

namespace tokenflex {
namespace {

// ---- sums of rows

template <int kCount, bool kWeighted, bool kAdds, class T, class Out>
TOKENFLEX_INLINE void sum_of(const RowSum<T>& rows, Out* __restrict out, int64_t width) {
  using Sum = SumOf<T>;
  const T* row[kCount];
  Sum weight[kCount];
  for (int i = 0; i < kCount; ++i) {
    row[i] = rows.rows[i];
    weight[i] = rows.weights[i];
  }
  for (int64_t k = 0; k < width; ++k) {
    Sum sum = kAdds ? widened(out[k]) : Sum(0);
    for (int i = 0; i < kCount; ++i) {
      const Sum value = widened(row[i][k]);
      const Sum term = kWeighted ? value * weight[i] : value;
      sum = kAdds || i > 0 ? sum + term : term;
    }
    out[k] = rounded<Out>(sum);
  }
}

template <bool kWeighted, bool kAdds, class T, class Out>
TOKENFLEX_INLINE void sum_of_any(const RowSum<T>& rows, Out* out, int64_t width) {
  static_assert(kRowsAtOnce == 4, "a case for each count");
  switch (rows.count) {
    case 1:
      return sum_of<1, kWeighted, kAdds>(rows, out, width);
    case 2:
      return sum_of<2, kWeighted, kAdds>(rows, out, width);
    case 3:
      return sum_of<3, kWeighted, kAdds>(rows, out, width);
    case 4:
      return sum_of<4, kWeighted, kAdds>(rows, out, width);
  }
}

template <bool kAdds, class T, class Out>
TOKENFLEX_INLINE void sum_of_rows(const RowSum<T>& rows, Out* out, int64_t width) {
  if (rows.weighted) {
    sum_of_any<true, kAdds>(rows, out, width);
  } else {
    sum_of_any<false, kAdds>(rows, out, width);
  }
}

// ---- reductions

template <class Sum>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <class Sum>
using Lanes = typename LanesOf<Sum>::type;
template <class Sum>
constexpr int kLaneCount = int(64 / sizeof(Sum));

template <class Sum>
TOKENFLEX_INLINE void load(const Sum* from, Lanes<Sum>& lanes) {
  std::memcpy(&lanes, from, sizeof lanes);
}

// Neighbours first, whose sums are neighbours then.
template <class Sum>
TOKENFLEX_INLINE Sum sum_of_lanes(const Lanes<Sum>& lanes) {
  Sum sums[kLaneCount<Sum>];
  std::memcpy(sums, &lanes, sizeof lanes);
  for (int half = kLaneCount<Sum> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <class Sum>
TOKENFLEX_INLINE Moments<Sum> moments_of(const Sum* row, int64_t width) {
  constexpr int kStep = kLaneCount<Sum>;
  const int64_t whole = width - width % kStep;
  Lanes<Sum> lanes, sums = {};
  for (int64_t k = 0; k < whole; k += kStep) {
    load(row + k, lanes);
    sums += lanes;
  }
  Sum sum = sum_of_lanes<Sum>(sums);
  for (int64_t k = whole; k < width; ++k) sum += row[k];
  const Sum mean = sum / Sum(width);

  // What the rounding of the mean leaves in the deviations is taken out of both moments.
  Lanes<Sum> rests = {}, squares = {};
  for (int64_t k = 0; k < whole; k += kStep) {
    load(row + k, lanes);
    lanes -= mean;
    rests += lanes;
    squares += lanes * lanes;
  }
  Sum rest = sum_of_lanes<Sum>(rests), square = sum_of_lanes<Sum>(squares);
  for (int64_t k = whole; k < width; ++k) {
    const Sum deviation = row[k] - mean;
    rest += deviation;
    square += deviation * deviation;
  }
  rest /= Sum(width);
  const Sum variance = square / Sum(width) - rest * rest;
  return {mean + rest, variance < 0 ? Sum(0) : variance};
}

// The sum of `a`, and of the products of `a` and `b`.
template <class Sum>
struct SumAndDot {
  Sum sum;
  Sum dot;
};

template <class Sum>
TOKENFLEX_INLINE SumAndDot<Sum> sum_and_dot(const Sum* a, const Sum* b, int64_t width) {
  constexpr int kStep = kLaneCount<Sum>;
  const int64_t whole = width - width % kStep;
  Lanes<Sum> of_a, of_b, sums = {}, dots = {};
  for (int64_t k = 0; k < whole; k += kStep) {
    load(a + k, of_a);
    load(b + k, of_b);
    sums += of_a;
    dots += of_a * of_b;
  }
  SumAndDot<Sum> result = {sum_of_lanes<Sum>(sums), sum_of_lanes<Sum>(dots)};
  for (int64_t k = whole; k < width; ++k) {
    result.sum += a[k];
    result.dot += a[k] * b[k];
  }
  return result;
}

template <bool kSaves, class T>
TOKENFLEX_INLINE void norm_of(const SumOf<T>* row, SumOf<T> mean, SumOf<T> inverse,
                              const SumOf<T>* scale, const SumOf<T>* shift,
                              T* __restrict normalised, T* __restrict out, int64_t width) {
  for (int64_t k = 0; k < width; ++k) {
    const SumOf<T> z = (row[k] - mean) * inverse;
    if (kSaves) normalised[k] = rounded<T>(z);
    out[k] = rounded<T>(z * scale[k] + shift[k]);
  }
}

}  // namespace

template <class T>
TOKENFLEX_VERSIONS void add_rows(const RowSum<T>& rows, bool adds, SumOf<T>* sums, int64_t width) {
  if (adds) {
    sum_of_rows<true>(rows, sums, width);
  } else {
    sum_of_rows<false>(rows, sums, width);
  }
}

template <class T>
TOKENFLEX_VERSIONS void write_rows(const RowSum<SumOf<T>>& rows, T* out, int64_t width) {
  sum_of_rows<false>(rows, out, width);
}

template <class T>
TOKENFLEX_VERSIONS void write_average(const SumOf<T>* row, SumOf<T> divisor, T* __restrict out,
                                      int64_t width) {
  for (int64_t k = 0; k < width; ++k) out[k] = rounded<T>(row[k] / divisor);
}

template <class Sum>
TOKENFLEX_VERSIONS Moments<Sum> moments(const Sum* row, int64_t width) {
  return moments_of(row, width);
}

template <class T>
TOKENFLEX_VERSIONS void write_norm(const SumOf<T>* row, SumOf<T> mean, SumOf<T> inverse,
                                   const SumOf<T>* scale, const SumOf<T>* shift, T* normalised,
                                   T* out, int64_t width) {
  if (normalised) {
    norm_of<true>(row, mean, inverse, scale, shift, normalised, out, width);
  } else {
    norm_of<false>(row, mean, inverse, scale, shift, normalised, out, width);
  }
}

template <class T>
TOKENFLEX_VERSIONS void norm_gradient(const T* row, const T* normalised, const SumOf<T>* scale,
                                      SumOf<T> factor, SumOf<T>* __restrict grad,
                                      SumOf<T>* __restrict scratch, int64_t width) {
  using Sum = SumOf<T>;
  for (int64_t k = 0; k < width; ++k) {
    grad[k] = widened(row[k]) * scale[k];
    scratch[k] = widened(normalised[k]);
  }
  const SumAndDot<Sum> sums = sum_and_dot<Sum>(grad, scratch, width);
  const Sum mean = sums.sum / Sum(width), mean_product = sums.dot / Sum(width);
  for (int64_t k = 0; k < width; ++k) {
    grad[k] = (grad[k] - mean - scratch[k] * mean_product) * factor;
  }
}

template <class T>
TOKENFLEX_VERSIONS void average_gradient(const T* row, SumOf<T> divisor, SumOf<T>* __restrict grad,
                                         int64_t width) {
  for (int64_t k = 0; k < width; ++k) grad[k] = widened(row[k]) / divisor;
}

template <class T>
TOKENFLEX_VERSIONS void add_scale_gradient(const T* row, const T* normalised,
                                           SumOf<T>* __restrict scale_grad,
                                           SumOf<T>* __restrict shift_grad, int64_t width) {
  for (int64_t k = 0; k < width; ++k) {
    const SumOf<T> value = widened(row[k]);
    scale_grad[k] += value * widened(normalised[k]);
    shift_grad[k] += value;
  }
}

#define TOKENFLEX_ROWS_OF(T)                                                                   \
  template void add_rows(const RowSum<T>&, bool, SumOf<T>*, int64_t);                          \
  template void write_rows(const RowSum<SumOf<T>>&, T*, int64_t);                              \
  template void write_average(const SumOf<T>*, SumOf<T>, T*, int64_t);                         \
  template void write_norm(const SumOf<T>*, SumOf<T>, SumOf<T>, const SumOf<T>*,               \
                           const SumOf<T>*, T*, T*, int64_t);                                  \
  template void norm_gradient(const T*, const T*, const SumOf<T>*, SumOf<T>, SumOf<T>*,        \
                              SumOf<T>*, int64_t);                                             \
  template void average_gradient(const T*, SumOf<T>, SumOf<T>*, int64_t);                      \
  template void add_scale_gradient(const T*, const T*, SumOf<T>*, SumOf<T>*, int64_t)
TOKENFLEX_ROWS_OF(float);
TOKENFLEX_ROWS_OF(double);
TOKENFLEX_ROWS_OF(Half);
TOKENFLEX_ROWS_OF(Bfloat16);
template Moments<float> moments(const float*, int64_t);
template Moments<double> moments(const double*, int64_t);

}  // namespace tokenflex
