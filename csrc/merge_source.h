// The `source` map [rows] of a merge: row r keeps row r of inputs_embeds, but row vision_rows[v] is given
// vision row v. It is filled first and scattered into then. Index is int32_t or int64_t.
#pragma once

#include <cstdint>

namespace tokenflex {

// On host memory. Throws std::invalid_argument where a row is out of range or comes twice.
template <class Index>
void fill_merge_source(const Index* vision_rows, int64_t num_vision, int32_t* source, int64_t rows);

// On device memory, on `stream` (a cudaStream_t) of `device`; returns once both launches are queued.
// There a row out of range is an assertion that fails on the device, and of a row that comes twice either
// vision row may win. Throws std::runtime_error with CUDA's words when a launch is refused.
template <class Index>
void fill_merge_source_cuda(const Index* vision_rows, int64_t num_vision, int32_t* source,
                            int64_t rows, int device, uintptr_t stream);

}  // namespace tokenflex
