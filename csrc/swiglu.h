// The pointwise halves of the gated unit on host memory, around matrix products that are PyTorch's.
#pragma once

#include <cstdint>
#include <string>

#include "row_map.h"

namespace tokenflex {

struct GateUp {
  const void* gate;
  const void* up;
  int64_t rows;
  int64_t hidden;
};

// product = activation(gate) * up, contiguous [rows, hidden]. gate and up are contiguous too, or with
// `by_columns` their transposes are: of few rows, the products that make them are faster that way.
void gated_product(const GateUp& inputs, bool by_columns, void* product, const std::string& dtype,
                   int threads);

// Backward from d product, [rows, hidden] with any row stride, and contiguous gate and up:
//
//   grads = (d product * up * activation'(gate), d product * activation(gate))     [rows, 2 hidden]
//
// product [rows, hidden] is written unless it is null, and the grads' columns are added to sums [2 hidden],
// in the accumulation type, unless they are null: 32 rows at a time, whatever the number of threads.
struct GateGradients {
  ConstRows grad;
  void* grads;
  void* product;
  void* sums;
};
void gate_gradients(const GateUp& inputs, const GateGradients& results, const std::string& dtype,
                    int threads);

// to = from^T: [rows, columns] with any row stride -> contiguous [columns, rows].
void transpose(const ConstRows& from, void* to, int64_t rows, int64_t columns,
               const std::string& dtype, int threads);

}  // namespace tokenflex
