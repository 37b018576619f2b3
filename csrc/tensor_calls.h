// Adds the functions of tensor_calls.cpp to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace tokenflex {

void define_tensor_calls(pybind11::module_& module);

}  // namespace tokenflex
