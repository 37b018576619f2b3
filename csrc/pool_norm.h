// Pooling and LayerNorm of a batch of images on host memory, and their gradients: the maths is that of
// tokenflex_kernels/pool_norm/kernels.py.
//
// The patches of a batch are divided among threads by row: a part of the work is a range of patches, and
// has the rows of patches, or of cells by the first patch of their windows, that begin in it. Results do
// not depend on the number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "row_map.h"

namespace tokenflex {

// The pooling of a batch, as tokenflex_kernels/pool_norm/tables.py lays it out.
struct PoolTables {
  const int32_t* images;
  int64_t num_images;
  const int32_t* axes;
  const double* weights;
  bool weighted;  // whether any weight is not 1
  int64_t num_patches;
};

// A vector of LayerNorm's parameters, or none.
struct Parameter {
  const void* data;
  std::string dtype;
};

struct PoolNormForward {
  PoolTables tables;
  ConstRows x;
  std::string dtype;  // of x
  int64_t width;
  Parameter weight;  // without it, there is no norm
  Parameter bias;
  double eps;
  void* out;
  void* normalised;       // both null where they are not wanted
  void* inverse_std;      // of the sums' type
  std::string out_dtype;  // also of `normalised`; its sums are of the type that those of x are of
};

struct PoolNormBackward {
  PoolTables tables;
  ConstRows grad;
  const void* normalised;   // both null without norm
  const void* inverse_std;  // of the sums' type
  std::string dtype;        // of grad and normalised
  int64_t width;
  Parameter weight;
  void* grad_x;  // null where it is not wanted
  std::string grad_x_dtype;
  void* grad_scale;  // of the sums' type; both null where neither is wanted
  void* grad_shift;
};

void pool_norm_forward(const PoolNormForward& job, int threads);
void pool_norm_backward(const PoolNormBackward& job, int threads);

// out = normalised * weight + bias, rows next to each other.
void scale_shift(const void* normalised, const std::string& dtype, int64_t rows, int64_t width,
                 const Parameter& weight, const Parameter& bias, void* out, int threads);

}  // namespace tokenflex
