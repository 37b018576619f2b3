// Putting samples into bins of bounded size.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenflex {

// Bin b holds the samples order[offsets[b] .. offsets[b + 1]), in the order they were put there. Flat,
// because a vector for each of many bins costs more than the packing.
struct Bins {
  std::vector<int64_t> order;    // [samples]
  std::vector<int64_t> offsets;  // [bins + 1], offsets[0] = 0
};

// First-fit-decreasing: the longest sample first (ties: the lower index first), each into the first bin
// with room. Expects 0 <= lengths[i] <= capacity. O(n log n).
Bins first_fit_decreasing(const std::vector<int64_t>& lengths, int64_t capacity);

struct Load {
  int64_t tokens;
  int64_t tiles;
};

// What a token and a tile cost, in one integer unit: exact, and so the same on every machine.
struct Price {
  int64_t token;
  int64_t tile;

  int64_t of(Load load) const { return token * load.tokens + tile * load.tiles; }
};

// Bins of nearly equal cost: the costliest sample first (ties: the lower index first), each into the
// bin of least cost (ties: the lower bin first) that has room for its tokens and its tiles. Starts with
// `least` bins and adds 1 % while a sample finds no room, or while the costliest bin is more than 2 %
// above the mean, of which it tries ten and keeps the best. The number of bins is always a multiple of
// `multiple`. Returns them by falling cost. Expects every sample to fit into an empty bin, and no cost
// of a full bin to pass int64. O(n log n) a try, times the number of different tile counts.
Bins balanced_bins(const std::vector<Load>& samples, Load capacity, Price price, int64_t least,
                   int64_t multiple);

}  // namespace tokenflex
