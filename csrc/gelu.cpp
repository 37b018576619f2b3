// gelu(x) = x / 2 (1 + tanh(z / 2)) = x s(z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3) and the logistic s:
// it takes one exponential, where PyTorch's loop takes a far dearer tanh.
//
// Traffic: each number is read or written once.
#include "gelu.h"

#include <cmath>

#include "activation.h"
#include "dtypes.h"
#include "threads.h"
#include "vectors.h"

namespace tokenflex {
namespace {

constexpr double kLinear = 1.5957691216057308, kCubic = 0.044715 * kLinear;  // of z

template <class Real>
TOKENFLEX_INLINE Activation<Real> gelu_of(Real x) {
  const Real square = x * x;
  const Real slope = Real(kLinear) + Real(3 * kCubic) * square;  // dz / dx
  // As activation(z), with x in place of its factor z.
  const Real z = x * (Real(kLinear) + Real(kCubic) * square);
  const Real e = exp_of_negative(-std::fabs(z)), inverse = 1 / (1 + e);
  const Real negative = z < 0, other = 1 - negative;
  const Real above = other + negative * e, below = negative + other * e;
  const Real value = x * (above * inverse);
  return {value, above * inverse + value * (below * inverse) * slope};
}

template <class T>
TOKENFLEX_VERSIONS void values(const T* __restrict x, T* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(gelu_of(widened(x[i])).value);
}

template <class T>
TOKENFLEX_VERSIONS void gradients(const T* __restrict x, const T* __restrict grad,
                                  T* __restrict grad_x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    grad_x[i] = rounded<T>(widened(grad[i]) * gelu_of(widened(x[i])).derivative);
  }
}

}  // namespace

void gelu(const void* x, void* out, int64_t count, const std::string& dtype, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    const int64_t bytes = 2 * count * int64_t(sizeof(T));
    in_parts(count, worthwhile_parts(count, bytes, threads), [&](int64_t begin, int64_t end) {
      values(from + begin, to + begin, end - begin);
    });
  });
}

void gelu_gradient(const void* x, const void* grad, void* grad_x, int64_t count,
                   const std::string& dtype, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T *from = static_cast<const T*>(x), *incoming = static_cast<const T*>(grad);
    T* to = static_cast<T*>(grad_x);
    const int64_t bytes = 3 * count * int64_t(sizeof(T));
    in_parts(count, worthwhile_parts(count, bytes, threads), [&](int64_t begin, int64_t end) {
      gradients(from + begin, incoming + begin, to + begin, end - begin);
    });
  });
}

}  // namespace tokenflex
