// Putting samples into bins of a fixed capacity.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenflex {

// First-fit-decreasing: the longest sample first (ties: the lower index first), each into the first bin
// with room. Returns the sample indices of each bin in the order they were put there.
// Expects 0 <= lengths[i] <= capacity. O(n log n).
std::vector<std::vector<int64_t>> first_fit_decreasing(const int64_t* lengths, int64_t num_samples,
                                                       int64_t capacity);

}  // namespace tokenflex
