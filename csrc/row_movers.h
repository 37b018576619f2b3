// Moving rows: one call copies `rows` rows of `row_bytes` bytes between the places a map of row_map.h
// names. Bytes are bytes: the movers know no dtype. Map is PackMap or GatherMap.
#pragma once

#include <cstdint>

#include "row_map.h"

namespace tokenflex {

// On host memory, with up to `threads` threads.
template <class Map>
void move_rows(const Map& map, int64_t rows, int64_t row_bytes, int threads);

// Both refuse maps that point outside the rows they are for, with std::invalid_argument that names the
// row: `source` where it is not in [-vision_rows, table_rows), `index` where it is not in
// [0, from_rows). Host memory only; 4 bytes a row, next to the row itself.
void check_source(const int32_t* source, int64_t rows, int64_t table_rows, int64_t vision_rows);
void check_index(const int32_t* index, int64_t rows, int64_t from_rows);

// On device memory, on `stream` (a cudaStream_t) of `device`; returns once the launch is queued.
// Throws std::runtime_error with CUDA's words when the launch is refused.
template <class Map>
void move_rows_cuda(const Map& map, int64_t rows, int64_t row_bytes, int device, uintptr_t stream);

// How many CUDA devices the driver shows; 0 where there is no driver.
int cuda_device_count();

}  // namespace tokenflex
