// Both packers are greedy: samples in falling order, each into the best bin that has room for it. A scan
// over the bins would cost O(bins) per sample; each class below keeps them in a tree instead.
#include "bin_packing.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <queue>
#include <utility>

namespace tokenflex {
namespace {

// The samples by falling key; among equals the lower index first.
template <typename Key>
std::vector<int64_t> falling(const std::vector<Key>& keys) {
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return keys[size_t(a)] > keys[size_t(b)]; });
  return order;
}

// The bin of each sample.
struct Assignment {
  std::vector<int64_t> bin_of;
  int64_t num_bins = 0;
};

// A counting sort: the samples of a bin keep the order that they are given in.
Bins flatten(const std::vector<int64_t>& order, const Assignment& assignment) {
  Bins bins;
  bins.offsets.assign(size_t(assignment.num_bins) + 1, 0);
  for (const int64_t bin : assignment.bin_of) ++bins.offsets[size_t(bin) + 1];
  std::partial_sum(bins.offsets.begin(), bins.offsets.end(), bins.offsets.begin());
  std::vector<int64_t> next(bins.offsets);
  bins.order.resize(order.size());
  for (const int64_t sample : order) {
    bins.order[size_t(next[size_t(assignment.bin_of[size_t(sample)])]++)] = sample;
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

  // Takes a sample's room from the first bin that has it; returns the bin.
  int64_t put(Load sample) {
    int64_t node = 1;
    while (!sample.fits(nodes_[size_t(node)]) || node < leaves_) {
      if (sample.fits(nodes_[size_t(node)])) {
        node *= 2;
      } else {  // the next subtree to the right
        while (node % 2 == 1) node /= 2;
        ++node;
      }
    }
    const int64_t bin = node - leaves_;
    nodes_[size_t(node)] = nodes_[size_t(node)] - sample;
    while ((node /= 2) >= 1) {
      const Load &left = nodes_[size_t(2 * node)], &right = nodes_[size_t(2 * node + 1)];
      nodes_[size_t(node)] = {std::max(left.tokens, right.tokens),
                              std::max(left.tiles, right.tiles)};
    }
    return bin;
  }

 private:
  int64_t leaves_ = 1;
  std::vector<Load> nodes_;  // node 1 is the root, node i has children 2i and 2i + 1
};

// Bins by the room they have for tiles. Among those of equal room for tiles the cheapest is the one with
// the most room for tokens, so a heap for each has its only candidate on top. The heaps are the leaves of
// a binary tree over the numbers of tiles, made where they are used; a node holds the most room for tokens
// and the most worth of a room below it, so that subtrees are passed over.
class BalancedBins {
 public:
  BalancedBins(int64_t num_bins, Load capacity, Price price)
      : price_(price), room_(size_t(num_bins), capacity) {
    while (size_ <= capacity.tiles) size_ *= 2;
    for (int64_t bin = 0; bin < num_bins; ++bin) push(root_, 0, size_, bin);
  }

  // Puts a sample into the cheapest bin with room for it; returns the bin, -1 where none has room. The
  // cheaper bin is the one whose room is worth more. Of equal ones the lower wins.
  int64_t put(Load sample) {
    Bin best;
    find(root_, 0, size_, sample, best);
    if (best == Bin()) return -1;
    const int64_t bin = -best.second;
    pop(root_, 0, size_, room_[size_t(bin)].tiles);
    room_[size_t(bin)] = room_[size_t(bin)] - sample;
    push(root_, 0, size_, bin);
    return bin;
  }

  int64_t worth(int64_t bin) const { return price_.of(room_[size_t(bin)]); }

 private:
  struct Bin : std::pair<int64_t, int64_t> {  // a number, minus the bin: the largest is the one to take
    Bin() : pair(-1, 0) {}
    Bin(int64_t number, int64_t bin) : pair(number, -bin) {}
  };
  struct Node {
    int64_t tokens = -1;  // the most room
    Bin best;             // the most worth, and its bin
    std::unique_ptr<Node> children[2];
    std::priority_queue<Bin> bins;  // of a leaf, by their room for tokens
  };

  // A node is that of [first, first + size) tiles.
  void find(const Node& node, int64_t first, int64_t size, Load sample, Bin& best) const {
    if (node.tokens < sample.tokens || first + size <= sample.tiles || node.best <= best) return;
    if (size == 1) {
      best = node.best;
      return;
    }
    const int64_t half = size / 2;
    const auto& [left, right] = node.children;
    const bool right_first = right && (!left || right->best > left->best);
    if (right_first) find(*right, first + half, half, sample, best);
    if (left) find(*left, first, half, sample, best);
    if (right && !right_first) find(*right, first + half, half, sample, best);
  }

  void push(Node& node, int64_t first, int64_t size, int64_t bin) {
    const Load room = room_[size_t(bin)];
    node.tokens = std::max(node.tokens, room.tokens);
    node.best = std::max(node.best, Bin(price_.of(room), bin));
    if (size == 1) return node.bins.push(Bin(room.tokens, bin));
    const int64_t half = size / 2;
    const bool right = room.tiles >= first + half;
    std::unique_ptr<Node>& child = node.children[right];
    if (!child) child = std::make_unique<Node>();
    push(*child, first + right * half, half, bin);
  }

  void pop(Node& node, int64_t first, int64_t size, int64_t tiles) {
    node.tokens = -1;
    node.best = Bin();
    if (size == 1) {
      node.bins.pop();
      if (node.bins.empty()) return;
      const auto [tokens, minus_bin] = node.bins.top();
      node.tokens = tokens;
      node.best = Bin(price_.of({tokens, tiles}), -minus_bin);
      return;
    }
    const int64_t half = size / 2;
    const bool right = tiles >= first + half;
    pop(*node.children[right], first + right * half, half, tiles);
    for (const std::unique_ptr<Node>& child : node.children) {
      if (!child) continue;
      node.tokens = std::max(node.tokens, child->tokens);
      node.best = std::max(node.best, child->best);
    }
  }

  Price price_;
  std::vector<Load> room_;
  int64_t size_ = 1;
  Node root_;
};

int64_t next_multiple(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

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
  Assignment bins{std::vector<int64_t>(samples.size())};
  for (const int64_t sample : order) {
    const int64_t bin = rooms.put(samples[size_t(sample)]);
    bins.bin_of[size_t(sample)] = bin;
    bins.num_bins = std::max(bins.num_bins, bin + 1);
  }
  return bins;
}

// Makes `num_bins` of fewer bins: the costliest that holds several samples gives its cheapest one, until
// none is empty or all hold one.
Assignment spread(Assignment assignment, const std::vector<int64_t>& order,
                  const std::vector<int64_t>& costs, int64_t num_bins) {
  const Bins bins = flatten(order, assignment);
  std::vector<int64_t> ends(bins.offsets.begin() + 1, bins.offsets.end());
  std::priority_queue<std::pair<int64_t, int64_t>> givers;  // cost, minus the bin
  const auto add = [&](int64_t cost, int64_t bin) {
    if (ends[size_t(bin)] - bins.offsets[size_t(bin)] > 1) givers.push({cost, -bin});
  };
  for (int64_t bin = 0; bin < assignment.num_bins; ++bin) {
    int64_t cost = 0;
    for (int64_t at = bins.offsets[size_t(bin)]; at < ends[size_t(bin)]; ++at) {
      cost += costs[size_t(bins.order[size_t(at)])];
    }
    add(cost, bin);
  }
  for (; assignment.num_bins < num_bins && !givers.empty(); ++assignment.num_bins) {
    const auto [cost, minus_bin] = givers.top();
    givers.pop();
    const int64_t sample = bins.order[size_t(--ends[size_t(-minus_bin)])];
    assignment.bin_of[size_t(sample)] = assignment.num_bins;
    add(cost - costs[size_t(sample)], -minus_bin);
  }
  assignment.num_bins = num_bins;
  return assignment;
}

// Numbers the bins by falling cost; among equals in the order so far.
template <typename Cost>
void number_by_falling_cost(Assignment& bins, const std::vector<Cost>& bin_costs) {
  std::vector<int64_t> number(bin_costs.size());
  int64_t next = 0;
  for (const int64_t bin : falling(bin_costs)) number[size_t(bin)] = next++;
  for (int64_t& bin : bins.bin_of) bin = number[size_t(bin)];
}

void sort_bins(Assignment& bins, const std::vector<int64_t>& costs) {
  std::vector<int64_t> bin_costs(size_t(bins.num_bins), 0);
  for (size_t sample = 0; sample < costs.size(); ++sample) {
    bin_costs[size_t(bins.bin_of[sample])] += costs[sample];
  }
  number_by_falling_cost(bins, bin_costs);
}

// See `balanced_bins`. Of `num_bins` samples more, of no size, each bin holds one: to give a sample away is
// to swap it for that. Costs are only added, subtracted and compared, each in a fixed order.
void exchange_samples(Assignment& bins, std::vector<Load> samples, std::vector<double> costs,
                      Load capacity) {
  const size_t num_samples = samples.size();
  std::vector<int64_t> bin_of = bins.bin_of;
  for (int64_t bin = 0; bin < bins.num_bins; ++bin) bin_of.push_back(bin);
  samples.resize(bin_of.size());
  costs.resize(bin_of.size());

  std::vector<Load> loads(size_t(bins.num_bins));
  std::vector<double> bin_costs(size_t(bins.num_bins));
  for (size_t sample = 0; sample < num_samples; ++sample) {
    const auto bin = size_t(bin_of[sample]);
    loads[bin] = loads[bin] + samples[sample];
    bin_costs[bin] += costs[sample];
  }
  const double total = std::accumulate(bin_costs.begin(), bin_costs.end(), 0.0);
  const double mean = total / double(bins.num_bins);
  for (;;) {
    const auto costliest =
        size_t(std::max_element(bin_costs.begin(), bin_costs.end()) - bin_costs.begin());
    if (bin_costs[costliest] <= 1.002 * mean) break;
    double best = std::numeric_limits<double>::infinity();
    size_t given = 0, taken = 0;
    for (size_t own = 0; own < num_samples; ++own) {
      if (size_t(bin_of[own]) != costliest) continue;
      for (size_t other = 0; other < samples.size(); ++other) {
        const auto bin = size_t(bin_of[other]);
        const double saved = costs[own] - costs[other];
        const double costlier = std::max(bin_costs[costliest] - saved, bin_costs[bin] + saved);
        if (bin == costliest || costlier >= best) continue;
        const Load moved = samples[own] - samples[other];
        if (!(loads[costliest] - moved).fits(capacity) || !(loads[bin] + moved).fits(capacity)) {
          continue;
        }
        best = costlier;
        given = own;
        taken = other;
      }
    }
    // A gain must be more than a rounding error, so that the exchanges end.
    if (best >= bin_costs[costliest] - 1e-6 * mean) break;
    const auto bin = size_t(bin_of[taken]);
    const Load moved = samples[given] - samples[taken];
    const double saved = costs[given] - costs[taken];
    loads[costliest] = loads[costliest] - moved;
    loads[bin] = loads[bin] + moved;
    bin_costs[costliest] -= saved;
    bin_costs[bin] += saved;
    bin_of[given] = int64_t(bin);
    if (taken < num_samples) bin_of[taken] = int64_t(costliest);
  }
  bin_of.resize(num_samples);
  bins.bin_of = std::move(bin_of);
  number_by_falling_cost(bins, bin_costs);
}

}  // namespace

Bins first_fit_decreasing(const std::vector<Load>& samples, Load capacity) {
  const std::vector<int64_t> order = falling_shares(samples, capacity);
  return flatten(order, first_fit(samples, order, capacity));
}

Bins balanced_bins(const std::vector<Load>& samples, Load capacity, Price price, int64_t least,
                   int64_t multiple, const std::vector<double>& exchange_costs) {
  std::vector<int64_t> costs;
  for (const Load& sample : samples) costs.push_back(price.of(sample));
  const std::vector<int64_t> order = falling(costs);
  const double total = std::accumulate(costs.begin(), costs.end(), 0.0);

  Assignment best;
  double best_score = 0;
  // Whether the samples fit into so many bins, the cheapest first.
  const auto fit_into = [&](int64_t num_bins) {
    BalancedBins rooms(num_bins, capacity, price);
    Assignment bins{std::vector<int64_t>(samples.size()), num_bins};
    for (const int64_t sample : order) {
      const int64_t bin = rooms.put(samples[size_t(sample)]);
      if (bin < 0) return false;
      bins.bin_of[size_t(sample)] = bin;
    }
    int64_t most = 0;
    for (int64_t bin = 0; bin < num_bins; ++bin) {
      most = std::max(most, price.of(capacity) - rooms.worth(bin));
    }
    const double score = double(num_bins) * double(most);  // max / mean, times the total
    if (best.num_bins == 0 || score < best_score) {
      best = std::move(bins);
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
  sort_bins(best, costs);
  // Without the empty bins that no multiple asks for. They are the last: among bins of no cost a sample
  // goes to the lowest.
  const int64_t used = 1 + *std::max_element(best.bin_of.begin(), best.bin_of.end());
  best.num_bins = next_multiple(used, multiple);
  if (!exchange_costs.empty()) exchange_samples(best, samples, exchange_costs, capacity);
  return flatten(order, best);
}

}  // namespace tokenflex
