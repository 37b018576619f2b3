#include "pool_rows.h"

#include <cstring>

#include "vectors.h"

namespace tokenflex {
namespace {

// ---- sums of rows

template <int kCount, bool kWeighted, bool kAdds, class T, class Out>
TOKENFLEX_INLINE void sum_rows_of(const RowSum<T>& rows, Out* __restrict out, int64_t width) {
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
TOKENFLEX_INLINE void sum_any(const RowSum<T>& rows, Out* out, int64_t width) {
  static_assert(kRowsAtOnce == 4, "a case for each count");
  switch (rows.count) {
    case 1:
      return sum_rows_of<1, kWeighted, kAdds>(rows, out, width);
    case 2:
      return sum_rows_of<2, kWeighted, kAdds>(rows, out, width);
    case 3:
      return sum_rows_of<3, kWeighted, kAdds>(rows, out, width);
    case 4:
      return sum_rows_of<4, kWeighted, kAdds>(rows, out, width);
  }
}

template <bool kAdds, class T, class Out>
TOKENFLEX_INLINE void sum_rows(const RowSum<T>& rows, Out* out, int64_t width) {
  if (rows.weighted) {
    sum_any<true, kAdds>(rows, out, width);
  } else {
    sum_any<false, kAdds>(rows, out, width);
  }
}

// ---- reductions

// Lanes are added up in this many vectors at once, so that no addition waits for the one before.
constexpr int kChains = 4;

// Vectors, and vectors in memory that may lie at any address of a number.
template <class Sum>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Held __attribute__((vector_size(64)));
  typedef float Stored __attribute__((vector_size(64), aligned(sizeof(float)), may_alias));
};
template <>
struct Vectors<double> {
  typedef double Held __attribute__((vector_size(64)));
  typedef double Stored __attribute__((vector_size(64), aligned(sizeof(double)), may_alias));
};

template <int kCount, class Sum>
TOKENFLEX_INLINE Sum total_of(const Sum* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    Sum halves[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) halves[i] = values[i] + values[i + kCount / 2];
    return total_of<kCount / 2>(halves);
  }
}

// Sums of every kStep-th number of a row.
template <class Sum>
struct Lanes {
  using Vector = typename Vectors<Sum>::Held;
  using Stored = typename Vectors<Sum>::Stored;
  static constexpr int kVector = int(64 / sizeof(Sum));
  static constexpr int kStep = kChains * kVector;

  Vector sums[kChains] = {};

  TOKENFLEX_INLINE static const Stored* vectors(const Sum* from) {
    return reinterpret_cast<const Stored*>(from);
  }

  // The numbers from `at` on that are left of a row, as one of its last vectors, filled up with `fill`.
  TOKENFLEX_INLINE static Vector rest(const Sum* row, int64_t at, int64_t width, Sum fill) {
    Sum values[kVector];
    for (int i = 0; i < kVector; ++i) values[i] = at + i < width ? row[at + i] : fill;
    Vector vector;
    std::memcpy(&vector, values, sizeof vector);
    return vector;
  }

  TOKENFLEX_INLINE Sum total() const {
    const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    Sum values[kVector];
    std::memcpy(values, &all, sizeof all);
    return total_of<kVector>(values);
  }
};

template <class Sum>
TOKENFLEX_INLINE Sum sum_of(const Sum* row, int64_t width) {
  using L = Lanes<Sum>;
  const int64_t whole = width - width % L::kStep;
  L lanes;
  for (int64_t k = 0; k < whole; k += L::kStep) {
    for (int i = 0; i < kChains; ++i) lanes.sums[i] += L::vectors(row + k)[i];
  }
  for (int i = 0; i < kChains; ++i) {
    const int64_t at = whole + i * L::kVector;
    if (at < width) lanes.sums[i] += L::rest(row, at, width, 0);
  }
  return lanes.total();
}

template <class Sum>
TOKENFLEX_INLINE Moments<Sum> moments_of(const Sum* row, int64_t width) {
  using L = Lanes<Sum>;
  const int64_t whole = width - width % L::kStep;
  const Sum mean = sum_of(row, width) / Sum(width);
  // What the rounding of the mean leaves in the deviations is taken out of both moments.
  L rests, squares;
  for (int64_t k = 0; k < whole; k += L::kStep) {
    for (int i = 0; i < kChains; ++i) {
      const typename L::Vector deviations = L::vectors(row + k)[i] - mean;
      rests.sums[i] += deviations;
      squares.sums[i] += deviations * deviations;
    }
  }
  for (int i = 0; i < kChains; ++i) {
    const int64_t at = whole + i * L::kVector;
    if (at >= width) break;
    const typename L::Vector deviations = L::rest(row, at, width, mean) - mean;
    rests.sums[i] += deviations;
    squares.sums[i] += deviations * deviations;
  }
  const Sum rest = rests.total() / Sum(width);
  const Sum variance = squares.total() / Sum(width) - rest * rest;
  return {mean + rest, variance < 0 ? Sum(0) : variance};
}

template <class Sum>
TOKENFLEX_INLINE Sum dot(const Sum* a, const Sum* b, int64_t width) {
  using L = Lanes<Sum>;
  const int64_t whole = width - width % L::kStep;
  L lanes;
  for (int64_t k = 0; k < whole; k += L::kStep) {
    for (int i = 0; i < kChains; ++i) lanes.sums[i] += L::vectors(a + k)[i] * L::vectors(b + k)[i];
  }
  for (int i = 0; i < kChains; ++i) {
    const int64_t at = whole + i * L::kVector;
    if (at < width) lanes.sums[i] += L::rest(a, at, width, 0) * L::rest(b, at, width, 0);
  }
  return lanes.total();
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
    sum_rows<true>(rows, sums, width);
  } else {
    sum_rows<false>(rows, sums, width);
  }
}

template <class T>
TOKENFLEX_VERSIONS void write_rows(const RowSum<SumOf<T>>& rows, T* out, int64_t width) {
  sum_rows<false>(rows, out, width);
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
  const Sum mean = sum_of(grad, width) / Sum(width);
  const Sum mean_product = dot(grad, scratch, width) / Sum(width);
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
