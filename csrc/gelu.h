// GELU by its tanh formula, on host memory: contiguous numbers, at any count.
#pragma once

#include <cstdint>
#include <string>

namespace tokenflex {

// out = gelu(x)
void gelu(const void* x, void* out, int64_t count, const std::string& dtype, int threads);

// grad_x = grad * gelu'(x)
void gelu_gradient(const void* x, const void* grad, void* grad_x, int64_t count,
                   const std::string& dtype, int threads);

}  // namespace tokenflex
