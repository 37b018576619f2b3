// The activation of the gated unit: SiLU and its derivative, without branches, so that loops over them
// become vector instructions. `activation` has the same name in the reference and in the Triton kernels:
// another activation is an edit of these three functions.
#pragma once

#include <cmath>
#include <cstdint>

#include "float_types.h"
#include "vectors.h"

namespace tokenflex {

template <class Real>
struct Activation {
  Real value;
  Real derivative;
};

// e^x for x <= 0, to about a unit in the last place, subnormal results too.
//
// x = n log(2) + r with |r| <= log(2) / 2: e^r is Taylor's polynomial, whose next term is less than
// 6e-9, and 2^n is multiplied in two steps, because its exponent may be below that of normal numbers.
TOKENFLEX_INLINE float exp_of_negative(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = x < -104.0f ? -104.0f : x;           // e^-104 is rounded to 0; no number stays no number
  const float shifted = x * 1.44269504f + kRounder;
  const int32_t n = int32_t(float_bits(shifted) - float_bits(kRounder));
  const float whole = shifted - kRounder;
  const float r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  float power = 1.0f / 5040;
  power = power * r + 1.0f / 720;
  power = power * r + 1.0f / 120;
  power = power * r + 1.0f / 24;
  power = power * r + 1.0f / 6;
  power = power * r + 0.5f;
  power = power * r * r + r + 1.0f;
  const int32_t half = n / 2;
  return power * float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(n - half + 127) << 23);
}

TOKENFLEX_INLINE double exp_of_negative(double x) { return std::exp(x); }

// gate * s, and s (1 + gate (1 - s)), with s = 1 / (1 + e^-gate). Of e^-|gate|, which does not overflow,
// both s and 1 - s are exact to the last places.
template <class Real>
TOKENFLEX_INLINE Activation<Real> activation(Real gate) {
  const Real e = exp_of_negative(-std::fabs(gate)), sum = 1 + e, inverse = 1 / sum;
  // Arithmetic, because a compiler may make branches of choices, and no vectors of those.
  const Real negative = gate < 0, other = 1 - negative;
  const Real above = other + negative * e, below = negative + other * e;
  const Real value = gate * above / sum;  // is rounded less often than gate * s
  return {value, above * inverse + value * (below * inverse)};
}

}  // namespace tokenflex
