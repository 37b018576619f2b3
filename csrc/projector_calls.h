// Adds the functions of projector_calls.cpp to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace tokenflex {

void define_projector_calls(pybind11::module_& module);

}  // namespace tokenflex
