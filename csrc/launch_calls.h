// Adds the functions of launch_calls.cpp to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace tokenflex {

void define_launch_calls(pybind11::module_& module);

}  // namespace tokenflex
