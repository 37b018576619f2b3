// Putting samples into bins of bounded size.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenflex {

// Bin b holds the samples order[offsets[b] .. offsets[b + 1]), the first that was put there first. Flat,
// because a vector for each of many bins costs more than the packing.
struct Bins {
  std::vector<int64_t> order;    // [samples]
  std::vector<int64_t> offsets;  // [bins + 1], offsets[0] = 0
};

struct Load {
  int64_t tokens = 0;
  int64_t tiles = 0;

  Load operator+(Load other) const { return {tokens + other.tokens, tiles + other.tiles}; }
  Load operator-(Load other) const { return {tokens - other.tokens, tiles - other.tiles}; }
  bool fits(Load room) const { return tokens <= room.tokens && tiles <= room.tiles; }
};

// First-fit-decreasing: the sample with the largest share of a bin first, of its tokens or its tiles (ties:
// the lower index first), each into the first bin with room for both. Expects every sample to fit into an
// empty bin, and shares (tokens * capacity.tiles, tiles * capacity.tokens) not to pass int64. O(n log n)
// where only one of the bounds is ever met.
Bins first_fit_decreasing(const std::vector<Load>& samples, Load capacity);

// What a token and a tile cost, in one integer unit: exact, and so the same on every machine.
struct Price {
  int64_t token = 0;
  int64_t tile = 0;

  int64_t of(Load load) const { return token * load.tokens + tile * load.tiles; }
};

// Bins of nearly equal cost: the costliest sample first (ties: the lower index first), each into the
// bin of least cost (ties: the lower bin first) that has room for its tokens and its tiles. Starts with
// `least` bins, which must be a lower bound of what any packing needs, and adds 1 % while a sample finds
// no room, or while the costliest bin is more than 2 % above the mean, of which it tries ten and keeps
// the best. It goes up to 11/9 `least` + 1 bins. If the samples fit into none of these, it takes as many
// bins as first-fit-decreasing finds, and if they do not fit into those by cost, its very bins. The
// number of bins is rounded up to a multiple of `multiple`, and by no more than that are there more bins
// than samples, or empty ones. Returns them by falling cost, the samples of each by falling cost. Expects
// every sample to fit into an empty bin, and no cost of a full bin to pass int64. A try is O(n log n)
// where the cheapest bins have room.
//
// With `exchange_costs`, one cost a sample, the costliest bin by these costs then swaps a sample for one of another bin, or gives it away, whatever
// makes the costlier of the two cheapest (ties: the lower index given, then taken; to take nothing comes
// last), until nothing helps or it is 0.2 % above the mean. An exchange is O(its samples * n).
Bins balanced_bins(const std::vector<Load>& samples, Load capacity, Price price, int64_t least,
                   int64_t multiple, const std::vector<double>& exchange_costs);

}  // namespace tokenflex
