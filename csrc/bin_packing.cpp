// First-fit-decreasing in O(n log n).
//
// A scan for the first bin with room would cost O(n) per sample. Instead the bins are the leaves of a
// tournament tree whose nodes hold the largest remaining capacity below them: descending to the left
// child whenever it has room finds the first bin that fits in log n steps. There are never more bins
// than samples, and a bin that is not open yet is a leaf with all of its capacity, so opening one needs
// no special case.
#include "bin_packing.h"

#include <algorithm>
#include <numeric>

namespace tokenflex {
namespace {

class RemainingCapacities {
 public:
  RemainingCapacities(int64_t num_bins, int64_t capacity) {
    while (leaves_ < num_bins) leaves_ *= 2;
    nodes_.assign(size_t(2 * leaves_), capacity);
  }

  // Takes `length` from the first bin that has it, and says which bin that was.
  int64_t take(int64_t length) {
    int64_t node = 1;
    while (node < leaves_) {
      node *= 2;
      if (nodes_[node] < length) ++node;
    }
    const int64_t bin = node - leaves_;
    nodes_[node] -= length;
    while ((node /= 2) >= 1) nodes_[node] = std::max(nodes_[2 * node], nodes_[2 * node + 1]);
    return bin;
  }

 private:
  int64_t leaves_ = 1;
  std::vector<int64_t> nodes_;  // node 1 is the root, node i has children 2i and 2i + 1
};

}  // namespace

std::vector<std::vector<int64_t>> first_fit_decreasing(const int64_t* lengths, int64_t num_samples,
                                                       int64_t capacity) {
  std::vector<int64_t> order(static_cast<size_t>(num_samples));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  RemainingCapacities remaining(num_samples, capacity);
  std::vector<std::vector<int64_t>> bins;
  for (const int64_t sample : order) {
    const auto bin = size_t(remaining.take(lengths[sample]));
    if (bin >= bins.size()) bins.resize(bin + 1);
    bins[bin].push_back(sample);
  }
  return bins;
}

}  // namespace tokenflex
