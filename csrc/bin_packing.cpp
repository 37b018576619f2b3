// Both packers are greedy: samples in falling order, each into the best bin that has room for it. A scan
// over the bins would cost O(bins) per sample; each class below keeps them in the order its question
// is asked in.
#include "bin_packing.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <queue>
#include <utility>

namespace tokenflex {
namespace {

// The samples by falling key; among equals the lower index first.
std::vector<int64_t> falling(const std::vector<int64_t>& keys) {
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return keys[size_t(a)] > keys[size_t(b)]; });
  return order;
}

// Sample s lies in bin `bin_of[s]`; bin b comes at place `place_of[b]`. A counting sort: samples keep
// the order they are given in.
Bins flatten(const std::vector<int64_t>& order, const std::vector<int64_t>& bin_of,
             const std::vector<int64_t>& place_of) {
  Bins bins;
  bins.offsets.assign(place_of.size() + 1, 0);
  for (const int64_t sample : order) {
    ++bins.offsets[size_t(place_of[size_t(bin_of[size_t(sample)])]) + 1];
  }
  std::partial_sum(bins.offsets.begin(), bins.offsets.end(), bins.offsets.begin());
  std::vector<int64_t> next(bins.offsets);
  bins.order.resize(order.size());
  for (const int64_t sample : order) {
    const auto place = size_t(place_of[size_t(bin_of[size_t(sample)])]);
    bins.order[size_t(next[place]++)] = sample;
  }
  return bins;
}

// A tournament tree whose nodes hold the largest remaining capacity below them. There are never more
// bins than samples, and a bin that is not open yet is a leaf with all of its capacity, so opening one
// needs no special case.
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

// Bins by the room they have for tiles. Among those of equal room for tiles the cheapest is the one
// with the most room for tokens, so a heap for each has its only candidate on top, and there are as
// many heaps as different numbers: a handful.
class BalancedBins {
 public:
  BalancedBins(int64_t num_bins, Load capacity, Price price)
      : price_(price), room_(size_t(num_bins), capacity) {
    std::vector<Entry> entries;
    for (int64_t bin = 0; bin < num_bins; ++bin) entries.push_back({capacity.tokens, -bin});
    by_tiles_.emplace(capacity.tiles, Heap(std::less<Entry>(), std::move(entries)));
  }

  // Puts a sample into the cheapest bin with room for it, and says which; -1 where there is none.
  int64_t put(Load sample) {
    const auto none = by_tiles_.end();
    auto best = none;
    int64_t most = 0, best_bin = -1;
    for (auto it = by_tiles_.lower_bound(sample.tiles); it != none; ++it) {
      const auto [tokens, minus_bin] = it->second.top();
      if (tokens < sample.tokens) continue;
      // The cheaper bin is the one whose room is worth more. Of equal ones the lower wins.
      const int64_t worth = price_.of({tokens, it->first});
      if (best == none || worth > most || (worth == most && -minus_bin < best_bin)) {
        best = it;
        most = worth;
        best_bin = -minus_bin;
      }
    }
    if (best == none) return -1;
    best->second.pop();
    if (best->second.empty()) by_tiles_.erase(best);
    Load& room = room_[size_t(best_bin)];
    room = {room.tokens - sample.tokens, room.tiles - sample.tiles};
    by_tiles_[room.tiles].push({room.tokens, -best_bin});
    return best_bin;
  }

  Load room(int64_t bin) const { return room_[size_t(bin)]; }

 private:
  using Entry = std::pair<int64_t, int64_t>;  // room for tokens, minus the bin
  using Heap = std::priority_queue<Entry>;

  Price price_;
  std::vector<Load> room_;
  std::map<int64_t, Heap> by_tiles_;  // no heap is empty
};

int64_t next_multiple(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

}  // namespace

Bins first_fit_decreasing(const std::vector<int64_t>& lengths, int64_t capacity) {
  RemainingCapacities remaining(int64_t(lengths.size()), capacity);
  const std::vector<int64_t> order = falling(lengths);
  std::vector<int64_t> bin_of(lengths.size());
  int64_t num_bins = 0;
  for (const int64_t sample : order) {
    const int64_t bin = remaining.take(lengths[size_t(sample)]);
    bin_of[size_t(sample)] = bin;
    num_bins = std::max(num_bins, bin + 1);
  }
  std::vector<int64_t> in_place(static_cast<size_t>(num_bins));
  std::iota(in_place.begin(), in_place.end(), 0);
  return flatten(order, bin_of, in_place);
}

Bins balanced_bins(const std::vector<Load>& samples, Load capacity, Price price, int64_t least,
                   int64_t multiple) {
  std::vector<int64_t> costs;
  for (const Load& sample : samples) costs.push_back(price.of(sample));
  const std::vector<int64_t> order = falling(costs);
  const double total = std::accumulate(costs.begin(), costs.end(), 0.0);

  std::vector<int64_t> best;  // the bin of each sample
  std::vector<int64_t> best_costs;
  double best_score = 0;
  // A bin for each sample always fits, so this ends.
  for (int64_t num_bins = next_multiple(least, multiple), tries = 0; tries < 10;
       num_bins = next_multiple(num_bins + std::max<int64_t>(1, num_bins / 100), multiple)) {
    BalancedBins balanced(num_bins, capacity, price);
    std::vector<int64_t> bin_of(samples.size());
    const bool all_fit = std::all_of(order.begin(), order.end(), [&](int64_t sample) {
      const int64_t bin = balanced.put(samples[size_t(sample)]);
      bin_of[size_t(sample)] = bin;
      return bin >= 0;
    });
    if (!all_fit) continue;
    ++tries;
    std::vector<int64_t> bin_costs;
    for (int64_t bin = 0; bin < num_bins; ++bin) {
      bin_costs.push_back(price.of(capacity) - price.of(balanced.room(bin)));
    }
    const int64_t most = *std::max_element(bin_costs.begin(), bin_costs.end());
    const double score = double(num_bins) * double(most);  // max / mean, times the total
    if (best_costs.empty() || score < best_score) {
      best = std::move(bin_of);
      best_costs = std::move(bin_costs);
      best_score = score;
    }
    if (score <= 1.02 * total) break;
  }

  std::vector<int64_t> place_of(best_costs.size());
  int64_t place = 0;
  for (const int64_t bin : falling(best_costs)) place_of[size_t(bin)] = place++;
  return flatten(order, best, place_of);
}

}  // namespace tokenflex
