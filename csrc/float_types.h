// Numbers of 16 bits without a library for them: what they are to a sum in float, and a sum rounded back
// to them, to nearest with ties to even. The device has instructions for both; the host's results are
// theirs, and have no branches, so that a loop over a row is compiled to vector instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace tokenflex {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

// What numbers of type T are added up in.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TOKENFLEX_HOST_DEVICE inline double widened(double value) { return value; }
TOKENFLEX_HOST_DEVICE inline float widened(float value) { return value; }

TOKENFLEX_HOST_DEVICE inline float widened(Bfloat16 value) {
#ifdef __CUDA_ARCH__
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
#else
  return float_of(uint32_t(value.bits) << 16);
#endif
}

TOKENFLEX_HOST_DEVICE inline float widened(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Exponent and fraction go to where a float has them, and the exponent's bias is changed: twice for
  // infinity and what is no number. Below 2^-14 numbers are multiples of 2^-24, which 0.5 has as its last
  // digits. No step has a subnormal float: where those count as zero, PyTorch keeps these numbers too.
  constexpr uint32_t kRebias = uint32_t(127 - 15) << 23, kHalf = 0x3f000000;
  const uint32_t magnitude = value.bits & 0x7fff;
  const uint32_t subnormal = float_bits(float_of(kHalf + magnitude) - 0.5f);
  const uint32_t special = magnitude >= 0x7c00 ? kRebias : 0;
  const uint32_t normal = (magnitude << 13) + kRebias + special;
  const uint32_t result = magnitude < 0x400 ? subnormal : normal;
  return float_of(result | uint32_t(value.bits & 0x8000) << 16);
#endif
}

template <class T>
TOKENFLEX_HOST_DEVICE T rounded(SumOf<T> value) {
  return value;
}

template <>
TOKENFLEX_HOST_DEVICE inline Bfloat16 rounded<Bfloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool is_number = (bits & 0x7fffffff) <= 0x7f800000;
  return {uint16_t(is_number ? nearest : bits >> 16 | 0x40)};  // stays no number
#endif
}

template <>
TOKENFLEX_HOST_DEVICE inline Half rounded<Half>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14: a multiple of 2^-24, as which it is rounded where it is added to 0.5.
  const uint32_t subnormal = float_bits(float_of(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t rebiased = magnitude - (uint32_t(127 - 15) << 23);
  const uint32_t normal = (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more are rounded to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;   // stays no number
  return {uint16_t((bits >> 16 & 0x8000) | half)};
#endif
}

}  // namespace tokenflex
