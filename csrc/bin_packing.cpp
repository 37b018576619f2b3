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

// A tournament tree whose nodes hold the most room for tokens and the most room for tiles below them.
// There are never more bins than samples, and a bin that is not open yet is a leaf with all of its
// capacity, so opening one needs no special case.
class Rooms {
 public:
  Rooms(int64_t num_bins, Load capacity) {
    while (leaves_ < num_bins) leaves_ *= 2;
    nodes_.assign(size_t(2 * leaves_), capacity);
  }

  // Takes a sample's room from the first bin that has it, and says which bin that was.
  int64_t take(Load sample) {
    int64_t node = 1;
    for (;;) {
      if (fits(sample, node)) {
        if (node >= leaves_) break;
        node *= 2;
      } else {  // the next subtree to the right
        while (node % 2 == 1) node /= 2;
        ++node;
      }
    }
    const int64_t bin = node - leaves_;
    nodes_[size_t(node)].tokens -= sample.tokens;
    nodes_[size_t(node)].tiles -= sample.tiles;
    while ((node /= 2) >= 1) {
      const Load &left = nodes_[size_t(2 * node)], &right = nodes_[size_t(2 * node + 1)];
      nodes_[size_t(node)] = {std::max(left.tokens, right.tokens),
                              std::max(left.tiles, right.tiles)};
    }
    return bin;
  }

 private:
  bool fits(Load sample, int64_t node) const {
    const Load& room = nodes_[size_t(node)];
    return sample.tokens <= room.tokens && sample.tiles <= room.tiles;
  }

  int64_t leaves_ = 1;
  std::vector<Load> nodes_;  // node 1 is the root, node i has children 2i and 2i + 1
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

// Which bin each sample lies in.
struct Assignment {
  std::vector<int64_t> bin_of;
  int64_t num_bins = 0;
};

// The samples by falling share of a bin, of its tokens or its tiles, whichever is larger.
std::vector<int64_t> falling_shares(const std::vector<Load>& samples, Load capacity) {
  std::vector<int64_t> shares;
  for (const Load& sample : samples) {
    shares.push_back(std::max(sample.tokens * std::max<int64_t>(capacity.tiles, 1),
                              sample.tiles * capacity.tokens));
  }
  return falling(shares);
}

Assignment first_fit(const std::vector<Load>& samples, const std::vector<int64_t>& order,
                     Load capacity) {
  Rooms rooms(int64_t(samples.size()), capacity);
  Assignment found{std::vector<int64_t>(samples.size())};
  for (const int64_t sample : order) {
    const int64_t bin = rooms.take(samples[size_t(sample)]);
    found.bin_of[size_t(sample)] = bin;
    found.num_bins = std::max(found.num_bins, bin + 1);
  }
  return found;
}

std::vector<int64_t> in_place(int64_t num_bins) {
  std::vector<int64_t> places(static_cast<size_t>(num_bins));
  std::iota(places.begin(), places.end(), 0);
  return places;
}

// Makes `num_bins` of fewer bins: the costliest that holds several samples gives its cheapest one, until
// none is empty or all hold one.
Assignment spread(Assignment found, const std::vector<int64_t>& order,
                  const std::vector<int64_t>& costs, int64_t num_bins) {
  const Bins bins = flatten(order, found.bin_of, in_place(found.num_bins));
  std::vector<int64_t> ends(bins.offsets.begin() + 1, bins.offsets.end());
  std::priority_queue<std::pair<int64_t, int64_t>> givers;  // cost, minus the bin
  const auto add = [&](int64_t cost, int64_t bin) {
    if (ends[size_t(bin)] - bins.offsets[size_t(bin)] > 1) givers.push({cost, -bin});
  };
  for (int64_t bin = 0; bin < found.num_bins; ++bin) {
    int64_t cost = 0;
    for (int64_t at = bins.offsets[size_t(bin)]; at < ends[size_t(bin)]; ++at) {
      cost += costs[size_t(bins.order[size_t(at)])];
    }
    add(cost, bin);
  }
  for (; found.num_bins < num_bins && !givers.empty(); ++found.num_bins) {
    const auto [cost, minus_bin] = givers.top();
    givers.pop();
    const int64_t sample = bins.order[size_t(--ends[size_t(-minus_bin)])];
    found.bin_of[size_t(sample)] = found.num_bins;
    add(cost - costs[size_t(sample)], -minus_bin);
  }
  found.num_bins = num_bins;
  return found;
}

// The bins by falling cost, without the empty ones that no multiple asks for. Those are the last: among
// bins of no cost a sample goes to the lowest.
Bins by_falling_cost(const Assignment& found, const std::vector<int64_t>& order,
                     const std::vector<int64_t>& costs, int64_t multiple) {
  std::vector<int64_t> bin_costs(size_t(found.num_bins), 0);
  for (const int64_t sample : order) {
    bin_costs[size_t(found.bin_of[size_t(sample)])] += costs[size_t(sample)];
  }
  std::vector<int64_t> place_of(bin_costs.size());
  int64_t place = 0;
  for (const int64_t bin : falling(bin_costs)) place_of[size_t(bin)] = place++;
  Bins bins = flatten(order, found.bin_of, place_of);
  const auto all = int64_t(order.size());
  const auto used = std::lower_bound(bins.offsets.begin(), bins.offsets.end(), all);
  bins.offsets.resize(size_t(next_multiple(used - bins.offsets.begin(), multiple)) + 1);
  return bins;
}

}  // namespace

Bins first_fit_decreasing(const std::vector<Load>& samples, Load capacity) {
  const std::vector<int64_t> order = falling_shares(samples, capacity);
  const Assignment found = first_fit(samples, order, capacity);
  return flatten(order, found.bin_of, in_place(found.num_bins));
}

Bins balanced_bins(const std::vector<Load>& samples, Load capacity, Price price, int64_t least,
                   int64_t multiple) {
  std::vector<int64_t> costs;
  for (const Load& sample : samples) costs.push_back(price.of(sample));
  const std::vector<int64_t> order = falling(costs);
  const double total = std::accumulate(costs.begin(), costs.end(), 0.0);

  Assignment best;
  double best_score = 0;
  // Whether the samples fit into so many bins, the cheapest first.
  const auto fit_into = [&](int64_t num_bins) {
    BalancedBins balanced(num_bins, capacity, price);
    Assignment found{std::vector<int64_t>(samples.size()), num_bins};
    for (const int64_t sample : order) {
      const int64_t bin = balanced.put(samples[size_t(sample)]);
      if (bin < 0) return false;
      found.bin_of[size_t(sample)] = bin;
    }
    int64_t most = 0;
    for (int64_t bin = 0; bin < num_bins; ++bin) {
      most = std::max(most, price.of(capacity) - price.of(balanced.room(bin)));
    }
    const double score = double(num_bins) * double(most);  // max / mean, times the total
    if (best.num_bins == 0 || score < best_score) {
      best = std::move(found);
      best_score = score;
    }
    return true;
  };

  const int64_t most_bins = next_multiple(
      std::min(least + (2 * least) / 9 + 1, int64_t(samples.size())), multiple);
  int64_t num_bins = next_multiple(least, multiple);
  for (int tries = 0; tries < 10;) {
    tries += fit_into(num_bins);
    if ((tries > 0 && best_score <= 1.02 * total) || num_bins == most_bins) break;
    num_bins = next_multiple(num_bins + std::max<int64_t>(1, num_bins / 100), multiple);
    num_bins = std::min(num_bins, most_bins);
  }
  if (best.num_bins == 0) {
    Assignment tight = first_fit(samples, falling_shares(samples, capacity), capacity);
    num_bins = next_multiple(tight.num_bins, multiple);
    if (num_bins <= most_bins || !fit_into(num_bins)) {
      best = spread(std::move(tight), order, costs, num_bins);
    }
  }
  return by_falling_cost(best, order, costs, multiple);
}

}  // namespace tokenflex
