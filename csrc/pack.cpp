// Packing on the host: which sequences share a forward pass, and copying their rows. The definition is plan_packing_ref in
// kernels/m2rl_kernels/packing.py; this follows it decision by decision, in O(n log K) with a stack per remaining room (step 1)
// and a tournament tree over the bins (step 2).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "ops.h"

namespace {

// Indices of `lengths` in descending order, equal lengths by index: least significant digit first, 11 bits at a time.
std::vector<int32_t> longest_first(const int64_t* lengths, int64_t n) {
  std::vector<int32_t> order(n), next(n);
  std::iota(order.begin(), order.end(), 0);
  const int64_t longest = n ? *std::max_element(lengths, lengths + n) : 0;
  for (int shift = 0; shift < 33 && (longest >> shift) > 0; shift += 11) {
    int64_t start[2049] = {0};
    for (int64_t i = 0; i < n; ++i) ++start[2047 - ((lengths[i] >> shift) & 2047) + 1];
    for (int d = 0; d < 2048; ++d) start[d + 1] += start[d];
    for (int32_t i : order) next[start[2047 - ((lengths[i] >> shift) & 2047)]++] = i;
    order.swap(next);
  }
  return order;
}

// The set of rooms some bin has: 64-ary tree of bits, successor in one step per level. Zero pages are never touched.
class RoomSet {
 public:
  explicit RoomSet(int64_t largest) {
    for (int64_t words = largest / 64 + 1;; words = (words - 1) / 64 + 1) {
      levels_.emplace_back(static_cast<uint64_t*>(std::calloc(words, 8)), &std::free);
      sizes_.push_back(words);
      if (words == 1) break;
    }
  }
  void insert(int64_t x) {
    for (auto& level : levels_) {
      level[x >> 6] |= uint64_t{1} << (x & 63);
      x >>= 6;
    }
  }
  void erase(int64_t x) {
    for (auto& level : levels_) {
      level[x >> 6] &= ~(uint64_t{1} << (x & 63));
      if (level[x >> 6]) return;
      x >>= 6;
    }
  }
  int64_t at_least(int64_t x) const {  // -1: none
    for (size_t up = 0; up < levels_.size(); ++up) {
      if ((x >> 6) >= sizes_[up]) return -1;
      uint64_t word = levels_[up][x >> 6] >> (x & 63);
      if (word) {
        x += __builtin_ctzll(word);
        while (up > 0) {
          --up;
          x = (x << 6) + __builtin_ctzll(levels_[up][x]);
        }
        return x;
      }
      x = (x >> 6) + 1;
    }
    return -1;
  }

 private:
  std::vector<std::unique_ptr<uint64_t[], decltype(&std::free)>> levels_;
  std::vector<int64_t> sizes_;
};

// Step 1: the bin of every sequence, and how many bins.
int64_t best_fit(const std::vector<int32_t>& order, const int64_t* lengths, int64_t capacity, int32_t* bin_of) {
  std::unique_ptr<int32_t[], decltype(&std::free)> top(static_cast<int32_t*>(std::calloc(capacity + 1, 4)), &std::free);
  std::vector<int32_t> below;  // stack of the bins with the same room, as bin + 1; 0 ends it
  RoomSet rooms(capacity);
  for (int32_t i : order) {
    const int64_t length = lengths[i];
    int64_t room = rooms.at_least(length);
    int32_t bin;
    if (room < 0) {
      bin = static_cast<int32_t>(below.size());
      below.push_back(0);
      room = capacity;
    } else {
      bin = top[room] - 1;
      top[room] = below[bin];
      if (!top[room]) rooms.erase(room);
    }
    bin_of[i] = bin;
    room -= length;
    below[bin] = top[room];
    top[room] = bin + 1;
    rooms.insert(room);
  }
  return static_cast<int64_t>(below.size());
}

// Step 2: among the bins with room, the one of least load, the lowest index first.
class LoadTree {
 public:
  LoadTree(int64_t bins, int64_t capacity) : width_(1) {
    while (width_ < bins) width_ *= 2;
    nodes_.assign(2 * width_, {std::numeric_limits<double>::infinity(), -1});
    for (int64_t k = 0; k < bins; ++k) nodes_[width_ + k] = {0, capacity};
    for (int64_t node = width_ - 1; node > 0; --node) nodes_[node] = joined(node);
  }
  int64_t find(int64_t length) const {  // -1: no bin has room
    int64_t best = -1;
    search(1, length, best);
    return best < 0 ? -1 : best - width_;
  }
  void add(int64_t bin, int64_t length, double cost) {
    int64_t node = width_ + bin;
    nodes_[node].load += cost;
    nodes_[node].room -= length;
    while (node >>= 1) {
      const Node now = joined(node);
      if (now.load == nodes_[node].load && now.room == nodes_[node].room) return;
      nodes_[node] = now;
    }
  }

 private:
  struct Node {  // of a subtree: the least load, the most room; together, so that a step reads one cache line
    double load;
    int64_t room;
  };

  Node joined(int64_t node) const {
    const Node &left = nodes_[2 * node], &right = nodes_[2 * node + 1];
    return {std::min(left.load, right.load), std::max(left.room, right.room)};
  }
  // Depth first, the lighter child first; a subtree is left out when no bin in it comes before `best` in (load, index).
  void search(int64_t node, int64_t length, int64_t& best) const {
    if (nodes_[node].room < length) return;
    if (best >= 0 && (nodes_[node].load > nodes_[best].load ||
                      (nodes_[node].load == nodes_[best].load && leftmost(node) > best)))
      return;
    if (node >= width_) {
      best = node;
      return;
    }
    const int64_t lighter = 2 * node + (nodes_[2 * node + 1].load < nodes_[2 * node].load);
    search(lighter, length, best);
    search(lighter ^ 1, length, best);
  }
  int64_t leftmost(int64_t node) const {
    while (node < width_) node *= 2;
    return node;
  }

  int64_t width_;
  std::vector<Node> nodes_;
};

bool deal(const std::vector<int32_t>& order, const int64_t* lengths, const double* costs, int64_t bins, int64_t capacity,
          int32_t* bin_of) {
  LoadTree tree(bins, capacity);
  for (int32_t i : order) {
    const int64_t bin = tree.find(lengths[i]);
    if (bin < 0) return false;
    bin_of[i] = static_cast<int32_t>(bin);
    tree.add(bin, lengths[i], costs[i]);
  }
  return true;
}

struct Dealt {
  std::vector<int64_t> place, count;  // of bin k: rank * bins_per_rank + row, sequences in it
  double imbalance = 1;               // cost of the busiest rank over the mean
};

// Step 3.
Dealt to_ranks(const std::vector<int32_t>& order, const double* costs, int64_t bins, int64_t world_size, const int32_t* bin_of) {
  Dealt dealt;
  std::vector<double> load(bins, 0.0), busy(world_size, 0.0);
  dealt.place.resize(bins);
  dealt.count.assign(bins, 0);
  for (int32_t i : order) load[bin_of[i]] += costs[i], ++dealt.count[bin_of[i]];
  std::vector<int32_t> by_cost(bins), lightest(world_size);
  std::iota(by_cost.begin(), by_cost.end(), 0);
  std::stable_sort(by_cost.begin(), by_cost.end(), [&](int32_t a, int32_t b) { return load[a] > load[b]; });
  for (int64_t row = 0; row < bins / world_size; ++row) {
    std::iota(lightest.begin(), lightest.end(), 0);
    std::stable_sort(lightest.begin(), lightest.end(), [&](int32_t a, int32_t b) { return busy[a] < busy[b]; });
    for (int64_t j = 0; j < world_size; ++j) {
      const int32_t bin = by_cost[row * world_size + j];
      dealt.place[bin] = lightest[j] * (bins / world_size) + row;
      busy[lightest[j]] += load[bin];
    }
  }
  double sum = 0, most = 0;
  for (double b : busy) sum += b, most = std::max(most, b);
  if (sum > 0) dealt.imbalance = most * world_size / sum;
  return dealt;
}

}  // namespace

int64_t m2rl_plan_packing(const int64_t* lengths, const double* costs, int64_t n, int64_t max_tokens, int64_t world_size,
                          double tolerance, int64_t* order, int64_t* bin_offsets) {
  const std::vector<int32_t> longest = longest_first(lengths, n);
  const int64_t total = std::accumulate(lengths, lengths + n, int64_t{0});
  const int64_t capacity = std::min(max_tokens, std::max<int64_t>(total, 1));  // more room than tokens changes no decision
  std::vector<int32_t> bin_of(n), fit(n);
  const int64_t needed = best_fit(longest, lengths, capacity, fit.data());
  int64_t K = std::max<int64_t>((needed + world_size - 1) / world_size, 1) * world_size;
  const bool roomy = deal(longest, lengths, costs, K, capacity, bin_of.data());
  Dealt dealt = to_ranks(longest, costs, K, world_size, roomy ? bin_of.data() : fit.data());
  if (!roomy) {
    if (dealt.imbalance > tolerance && deal(longest, lengths, costs, K + world_size, capacity, bin_of.data())) {
      Dealt more = to_ranks(longest, costs, K + world_size, world_size, bin_of.data());
      if (more.imbalance < dealt.imbalance) {
        K += world_size;
        dealt = std::move(more);
        fit = bin_of;
      }
    }
    bin_of.swap(fit);
  }
  std::fill(bin_offsets, bin_offsets + K + 1, 0);
  for (int64_t k = 0; k < K; ++k) bin_offsets[dealt.place[k] + 1] = dealt.count[k];
  std::partial_sum(bin_offsets, bin_offsets + K + 1, bin_offsets);
  std::vector<int64_t> next(bin_offsets, bin_offsets + K);
  for (int64_t i = 0; i < n; ++i) order[next[dealt.place[bin_of[i]]]++] = i;
  return K;
}

void m2rl_pack_rows(int32_t n_fields, const void* const* src, void* const* dst, const int64_t* row_bytes, const int32_t* shift,
                    const int64_t* fill, int64_t n_seqs, const int64_t* src_start, const int64_t* dst_start,
                    const int64_t* lengths) {
  for (int32_t f = 0; f < n_fields; ++f) {
    const char* from = static_cast<const char*>(src[f]);
    char* to = static_cast<char*>(dst[f]);
    const int64_t bytes = row_bytes[f];
    for (int64_t s = 0; s < n_seqs; ++s) {
      if (lengths[s] == 0) continue;
      const int64_t rows = lengths[s] - shift[f];
      std::memcpy(to + dst_start[s] * bytes, from + (src_start[s] + shift[f]) * bytes, rows * bytes);
      if (shift[f]) std::memcpy(to + (dst_start[s] + rows) * bytes, &fill[f], bytes);
    }
  }
}
