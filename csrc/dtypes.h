// The C++ type of a dtype's name, for functions that are told of tensors by addresses.
#pragma once

#include <string>

#include "float_types.h"
#include "refuse.h"

namespace tokenflex {

// Calls work(T()) for the C++ type T of a dtype's name; throws std::invalid_argument for other names.
template <class Work>
void with_dtype(const std::string& name, const Work& work) {
  if (name == "float32") return work(float());
  if (name == "bfloat16") return work(Bfloat16());
  if (name == "float16") return work(Half());
  if (name == "float64") return work(double());
  refuse("dtype must be float32, bfloat16, float16 or float64, got ", name);
}

}  // namespace tokenflex
