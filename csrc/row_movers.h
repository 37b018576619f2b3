// Moving rows: one call copies `rows` rows of `row_bytes` bytes as the map of row_map.h says. Bytes are
// bytes: the movers know no dtype.
#pragma once

#include <cstdint>

#include "row_map.h"

namespace tokenflex {

// On host memory, with up to `threads` threads. A table or vision without data is rows of zeros.
void move_rows(const PackMap& map, int64_t rows, int64_t row_bytes, int threads);

// The same back again. Each row is read once.
void split_rows(const SplitMap& map, int64_t rows, int64_t row_bytes, int threads);

// Writes zeros to rows that lie next to each other.
void clear_rows(char* to, int64_t rows, int64_t row_bytes, int threads);

// Refuses a map that points outside its rows, with std::invalid_argument that names the entry: `source` must
// be in [-vision_rows, table_rows). Host memory only; 4 bytes a row, next to the row itself.
void check_source(const int32_t* source, int64_t rows, int64_t table_rows, int64_t vision_rows);
// The same for the `vision_rows` of an unpacking, which must be in [0, packed_rows).
void check_vision_rows(const int32_t* vision_rows, int64_t rows, int64_t packed_rows);

// On device memory, on `stream` (a cudaStream_t) of `device`; returns once the launch is queued.
// Throws std::runtime_error with CUDA's words when the launch is refused.
void move_rows_cuda(const PackMap& map, int64_t rows, int64_t row_bytes, int device, uintptr_t stream);

// How many CUDA devices the driver shows; 0 where there is no driver.
int cuda_device_count();

}  // namespace tokenflex
