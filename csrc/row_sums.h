// Summing the rows of each segment, as segments.h has it, for rows of one of four float types.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dtypes.h"
#include "segments.h"

namespace tokenflex {

// The text rows of a plan's `source` by ascending token id, those of an id ascending.
struct TextRows {
  std::vector<int32_t> ids;
  std::vector<int64_t> rows;
};

// Refuses a source of another number of vision rows than `num_vision`. O(rows): a radix sort.
TextRows text_by_id(const int32_t* source, int64_t rows, int64_t num_vision);

// On host memory, with up to `threads` threads.
void sum_rows(const RowSums& job, const std::string& dtype, int threads);

// Refuses slots outside [0, num_slots), with std::invalid_argument in the words of their caller, whose
// slots come from a plan's `source`. Host memory only.
void check_slots(const Segments& segments, int64_t num_slots);

// On device memory, on `stream` (a cudaStream_t) of `device`; returns once both launches are queued.
// Throws std::runtime_error with CUDA's words when a launch is refused.
void sum_rows_cuda(const RowSums& job, const std::string& dtype, int device, uintptr_t stream);

}  // namespace tokenflex
