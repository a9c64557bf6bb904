// Merging on the CPU: the passes (select, sums, apply) over chunks of many tensors, std::thread, one reading of the inputs per
// pass, a few chunks of memory per thread whatever the model's size.
//
//   select   exact k-th largest key per list: a sample brackets it, one pass counts what lies above and stores what lies
//            inside; where the bracket misses or holds too much, histograms of 65536 bins refine it (at most two more passes)
//   sums     float64 reductions, per chunk, added in chunk order
//   apply    filter, combine, round once, write
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <unistd.h>
#include <utility>
#include <vector>

#include "isa.h"
#include "merge_blocks.h"
#include "ops.h"
#include "radix.h"
#include "team.h"

using namespace m2rl;

namespace {

int g_isa = best_isa(kAvx512);

const MergeBlocks& blocks() { return M2RL_VARIANT(merge_blocks, g_isa); }

int64_t item_size(int32_t dtype) { return dtype == M2RL_F32 ? 4 : 2; }

float load_one(const void* base, int32_t dtype, int64_t i) {
  if (dtype == M2RL_F32) {
    float x;
    std::memcpy(&x, static_cast<const char*>(base) + 4 * i, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, static_cast<const char*>(base) + 2 * i, 2);
  return dtype == M2RL_BF16 ? from_bf16(h) : from_f16(h);
}

float round_to(float x, int32_t dtype) {
  return dtype == M2RL_BF16 ? from_bf16(to_bf16(x)) : dtype == M2RL_F16 ? from_f16(to_f16(x)) : x;
}

struct Chunk {
  int64_t tensor, begin, end;
};

std::vector<Chunk> cut_chunks(const M2rlTensors& in, int64_t first, int64_t last, int64_t chunk, bool whole_rows) {
  std::vector<Chunk> chunks;
  for (int64_t t = first; t < last; ++t) {
    int64_t step = chunk;
    if (whole_rows) {  // four rows at a time, so that chunks start on 8-byte words
      const int64_t rows = std::max<int64_t>(1, in.row[t]) * 4;
      step = std::max<int64_t>(1, chunk / rows) * rows;
    }
    for (int64_t i = 0; i < in.numel[t]; i += step) chunks.push_back({t, i, std::min(i + step, in.numel[t])});
  }
  return chunks;
}

void add(int64_t* counter, int64_t value) {
  if (counter != nullptr && value != 0) __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

bool ranked(const M2rlRule* rule) { return rule != nullptr && (rule->filter & M2RL_RANDOM) && rule->spread != nullptr; }

// One thread's block: the base and the K filtered deltas, all in float32.
class Prepared {
 public:
  Prepared(const M2rlTensors& in, const M2rlRule* rule, const MergeBlocks& ops)
      : in_(in), rule_(rule), ops_(ops), storage_(static_cast<size_t>(in.experts + 4) * kRow),
        nonfinite_(static_cast<size_t>(in.experts + 1)), nonzero_(static_cast<size_t>(in.experts)), checksum_(static_cast<size_t>(in.experts + 2)) {
    b = storage_.data() + (kLine - reinterpret_cast<uintptr_t>(storage_.data()) % kLine) % kLine / sizeof(float);
    v = b + kRow, stored = v + kRow;
    for (int64_t k = 0; k < in.experts; ++k) d.push_back(stored + (k + 1) * kRow);
  }

  // DELLA: decide a chunk's mask row by row, before its blocks are visited.
  void rank_rows(const Chunk& c) {
    const int64_t t = c.tensor, size = c.end - c.begin, row = std::max<int64_t>(1, in_.row[t]);
    mask_.resize(static_cast<size_t>(in_.experts * size));
    order_.resize(static_cast<size_t>(std::min(row, size)));
    for (int64_t k = 0; k < in_.experts; ++k) {
      const double p = rule_->keep[t * in_.experts + k], spread = rule_->spread[t * in_.experts + k];
      for (int64_t at = 0; at < size; at += row) {
        const int64_t n = std::min(row, size - at);
        for (int64_t i = 0; i < n; ++i) {
          int64_t g = c.begin + at + i;
          float x = load_one(in_.expert[t * in_.experts + k], in_.expert_dtype[t * in_.experts + k], g);
          float delta = round_to(x - load_one(in_.base[t], in_.base_dtype[t], g), rule_->round);
          order_[i] = static_cast<uint64_t>(magnitude_key(delta)) << 32 | static_cast<uint32_t>(i);
        }
        std::sort(order_.begin(), order_.begin() + n);  // equal magnitudes: lower index, lower rank
        for (int64_t rank = 0; rank < n; ++rank) {
          int64_t i = static_cast<int64_t>(order_[rank] & 0xffffffffu);
          double chance = n == 1 ? p : p - spread + 2.0 * spread * static_cast<double>(rank) / static_cast<double>(n - 1);
          uint64_t bar = static_cast<uint64_t>(std::llrint(chance * 4294967296.0));
          uint64_t index = static_cast<uint64_t>(in_.offset[t] + c.begin + at + i);
          bool keep = p >= 1.0 || keep_element(index, rule_->expert_id[k], rule_->random_key[t], bar);
          mask_[static_cast<size_t>(k * size + at + i)] = !keep ? 0.0f : rule_->inverse_keep && p < 1.0 ? static_cast<float>(1.0 / chance) : 1.0f;
        }
      }
    }
    mask_begin_ = c.begin;
    mask_size_ = size;
  }

  // Load elements [i, i + n) of tensor t and apply the filters named in `filter`.
  void load(int64_t t, int64_t i, int n, int filter, const M2rlReport* report, double* abs_before = nullptr, double* abs_after = nullptr) {
    const int64_t K = in_.experts;
    const int round = rule_ == nullptr ? static_cast<int>(M2RL_F32) : rule_->round;
    const bool has_base = in_.base != nullptr && in_.base[t] != nullptr;
    if (has_base) {
      const char* from = static_cast<const char*>(in_.base[t]) + i * item_size(in_.base_dtype[t]);
      nonfinite_[0] += ops_.load(from, in_.base_dtype[t], n, b);
      checksum(report, 0, from, in_.base_dtype[t], i, n);
    }
    for (int64_t k = 0; k < K; ++k) {
      const int64_t e = t * K + k;
      const char* from = static_cast<const char*>(in_.expert[e]) + i * item_size(in_.expert_dtype[e]);
      nonfinite_[static_cast<size_t>(k + 1)] += has_base ? ops_.load_delta(from, in_.expert_dtype[e], n, b, round, d[k], &nonzero_[static_cast<size_t>(k)])
                                                         : ops_.load(from, in_.expert_dtype[e], n, d[k]);
      checksum(report, k + 1, from, in_.expert_dtype[e], i, n);
      if (abs_before != nullptr) ops_.sum_abs(d[k], n, abs_before + k * kLanes);
      if (filter & M2RL_RANDOM) {
        if (rule_->spread != nullptr) {
          ops_.keep_factors(d[k], n, mask_.data() + k * mask_size_ + (i - mask_begin_));
        } else if (rule_->keep[e] < 1.0) {
          uint64_t bar = static_cast<uint64_t>(std::llrint(rule_->keep[e] * 4294967296.0));
          ops_.keep_random(d[k], n, static_cast<uint64_t>(in_.offset[t] + i), rule_->expert_id[k], rule_->random_key[t], bar);
        }
      }
      if (filter & M2RL_MAGNITUDE) {
        topk(d[k], nullptr, n, i, rule_->low_key[e], rule_->low_cut[e], false);
        if (rule_->high_key != nullptr) topk(d[k], nullptr, n, i, rule_->high_key[e], rule_->high_cut[e], true);
      }
      if (abs_after != nullptr) ops_.sum_abs(d[k], n, abs_after + k * kLanes);
      if ((filter & M2RL_SCALE) && rule_->scale[e] != 1.0f) ops_.scale(d[k], n, rule_->scale[e], round);
    }
    if (filter & M2RL_VARIANCE) {
      ops_.variance(v, d.data(), static_cast<int>(K), n);
      for (int64_t k = 0; k < K; ++k) topk(d[k], v, n, i, rule_->variance_key[t], rule_->variance_cut[t], false);
    }
  }

  void checksum(const M2rlReport* report, int64_t who, const void* from, int32_t dtype, int64_t i, int64_t n) {
    if (report == nullptr || report->checksum == nullptr) return;
    const int64_t size = item_size(dtype);  // blocks start at multiples of 1024 elements, hence of 8 bytes
    checksum_[static_cast<size_t>(who)] += ops_.checksum(from, n * size, static_cast<uint64_t>(i * size / 8));
  }

  // What was counted since the last call, in `elements` elements of tensor t, goes to the report (or nowhere).
  void flush(int64_t t, int64_t elements, const M2rlReport* report) {
    if (report != nullptr) add(report->elements, elements);
    const int64_t K = in_.experts;
    auto move = [](int64_t* to, std::vector<int64_t>& from) {
      for (size_t k = 0; k < from.size(); ++k) add(to == nullptr ? nullptr : to + k, std::exchange(from[k], 0));
    };
    move(report == nullptr || report->nonfinite == nullptr ? nullptr : report->nonfinite + t * (K + 1), nonfinite_);
    move(report == nullptr || report->nonzero == nullptr ? nullptr : report->nonzero + t * K, nonzero_);
    for (size_t who = 0; who < checksum_.size(); ++who) {
      const uint64_t part = std::exchange(checksum_[who], 0);
      if (part != 0) __atomic_fetch_add(report->checksum + t * (K + 2) + static_cast<int64_t>(who), part, __ATOMIC_RELAXED);
    }
  }

  float* b;                // the base
  float* v;                // scratch: variance over experts, or what they are merged to
  float* stored;           // scratch: the same after rounding to storage
  std::vector<float*> d;   // the deltas (the experts themselves where there is no base)

 private:
  // Before the cut ties are kept, after it they are not: at most two ranges with one threshold each.
  void topk(float* x, const float* key, int n, int64_t i, uint32_t threshold, int64_t cut, bool invert) const {
    int head = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(n, cut - i + 1)));
    auto range = [&](int from, int size, uint32_t bar) {
      if (size <= 0) return;
      if (key != nullptr) ops_.keep_where(x + from, key + from, size, bar);
      else ops_.keep_above(x + from, size, bar, invert);
    };
    range(0, head, threshold);
    range(head, n - head, threshold == 0xffffffffu ? threshold : threshold + 1);
  }

  // Rows start on cache lines, an odd number of them apart: full-width loads touch one line, and rows do not collide.
  static constexpr size_t kLine = 64;
  static constexpr int64_t kRow = kBlock + kLine / sizeof(float);

  const M2rlTensors& in_;
  const M2rlRule* rule_;
  const MergeBlocks& ops_;
  std::vector<float> storage_;
  std::vector<float> mask_;
  std::vector<uint64_t> order_;
  std::vector<int64_t> nonfinite_, nonzero_;  // counted since flush(): base and experts; deltas
  std::vector<uint64_t> checksum_;            // base, experts, output
  int64_t mask_begin_ = 0, mask_size_ = 0;
};

// ---- select ----

// One list's search for its rank-th largest key.
struct Search {
  int64_t list, slot, rank;             // which keys; where the answer goes; how many to keep,
  double share = 0.0;                   // or, above 0, this share of the non-zero ones, which the scan counts
  int64_t nonzero = 0;
  uint32_t lo = 0, hi = 0x7fffffffu;    // the bracket
  bool store = true;
  // A heavy value at an end of the bracket (zero, or a step of bfloat16), just outside [lo, hi], is counted and not stored.
  struct Atom {
    bool on = false;
    uint32_t key = 0;
    int64_t count = 0;
    std::vector<int64_t> chunk;
  } top, bottom;
  int64_t above = 0, inside = 0;        // keys above the bracket and its atoms; keys inside
  std::vector<int64_t> chunk_inside;    // per chunk: how many keys lie in the bracket,
  std::vector<int64_t> chunk_at;        // where they were stored in the thread's buffer,
  std::vector<int32_t> chunk_thread;    // and whose buffer
  std::vector<std::vector<uint32_t>> stored;  // per thread
};

class Selector {
 public:
  Selector(const M2rlTensors& in, const M2rlRule* rule, const M2rlSelect& want, const M2rlReport* report, int64_t chunk)
      : in_(in), rule_(rule), want_(want), report_(report), chunk_(chunk), ops_(blocks()),
        lists_(want.key == 0 ? in.experts : 1), filter_(rule == nullptr ? 0 : rule->filter & (M2RL_RANDOM | M2RL_SCALE)) {}

  void group(int64_t g, int threads) {
    first_ = want_.start[g], last_ = want_.start[g + 1];
    base_.assign(1, 0);
    for (int64_t t = first_; t < last_; ++t) base_.push_back(base_.back() + in_.numel[t]);
    total_ = base_.back();
    chunks_ = cut_chunks(in_, first_, last_, chunk_, ranked(rule_));
    std::vector<Search> searches;
    for (int64_t l = 0; l < lists_; ++l)
      for (int64_t r = 0; r < want_.ranks; ++r) {
        const int64_t slot = (g * lists_ + l) * want_.ranks + r;
        const double share = want_.share != nullptr ? want_.share[slot] : 0.0;
        const int64_t rank = want_.share == nullptr ? want_.rank[slot] : share >= 1.0 ? total_ : 0;
        const bool counted = share > 0.0 && share < 1.0 && total_ > 0;
        if (!counted && answered(slot, rank)) continue;
        searches.emplace_back();
        searches.back().list = l, searches.back().slot = slot, searches.back().rank = rank;
        if (counted) searches.back().share = share;
      }
    if (searches.empty()) return;
    if (total_ > kWhole) guess(searches, threads);
    std::vector<Search*> active;
    for (auto& s : searches) active.push_back(&s);
    scan(active, threads, report_);
    std::vector<char> settled(searches.size());
    parallel_for(static_cast<int64_t>(searches.size()), threads, [&](int64_t j, int) {
      Search& s = searches[static_cast<size_t>(j)];
      settled[static_cast<size_t>(j)] = settle(s);
      s.stored.clear();
    });
    for (size_t j = 0; j < searches.size(); ++j) {
      if (settled[j]) continue;
      refine(searches[j], threads);
      scan({&searches[j]}, threads, nullptr);
      settle(searches[j]);
    }
  }

 private:
  static constexpr int64_t kWhole = 4096;  // up to here every key is stored and no sample is needed
  static constexpr int64_t kCluster = 32, kMostDraws = 65536;  // elements per draw of the sample, and draws at most
  static constexpr int64_t kAhead = 16;                        // draws between asking for memory and reading it

  void answer(int64_t slot, uint32_t threshold, int64_t cut, int64_t above, int64_t equal) const {
    want_.threshold[slot] = threshold, want_.cut[slot] = cut;
    if (want_.above != nullptr) want_.above[slot] = above;
    if (want_.equal != nullptr) want_.equal[slot] = equal;
  }

  // Nothing or everything is kept: that needs no search.
  bool answered(int64_t slot, int64_t rank) const {
    if (rank <= 0) answer(slot, 0xffffffffu, -1, 0, 0);
    else if (rank >= total_) answer(slot, 0, total_ - 1, -1, -1);
    else return false;
    return true;
  }

  // Bracket each rank by 4 standard deviations of a stratified sample of clusters: neighbours share a cache line and a page, which
  // is what a draw costs. How alike neighbours are is measured, by the spread of the clusters' counts.
  void guess(std::vector<Search>& searches, int threads) const {
    const int64_t draws = std::min<int64_t>(kMostDraws, std::max<int64_t>(64, total_ / (128 * kCluster)));
    std::vector<std::vector<uint32_t>> keys(static_cast<size_t>(lists_));
    std::vector<int> sizes;
    Prepared block(in_, rule_, ops_);
    Place ahead{first_, 0}, place{first_, 0};
    for (int64_t j = 0; j < draws + kAhead; ++j) {  // every draw is a cache miss: ask for it early
      if (j < draws) {
        ahead = stratum(j, draws, ahead);
        prefetch(ahead);
      }
      if (j < kAhead) continue;
      place = stratum(j - kAhead, draws, place);
      sizes.push_back(static_cast<int>(std::min<int64_t>(kCluster, in_.numel[place.tensor] - place.index)));
      block.load(place.tensor, place.index, sizes.back(), ranked(rule_) ? filter_ & ~M2RL_RANDOM : filter_, nullptr);
      for (int64_t l = 0; l < lists_; ++l) {
        const float* x = keys_of(block, l, sizes.back());
        for (int i = 0; i < sizes.back(); ++i) keys[static_cast<size_t>(l)].push_back(magnitude_key(x[i]));
      }
    }
    const int64_t m = static_cast<int64_t>(keys[0].size()), heavy = std::max<int64_t>(8, m / 256);
    parallel_for(static_cast<int64_t>(searches.size()), threads, [&](int64_t index, int) {
      Search& s = searches[static_cast<size_t>(index)];
      const auto& list = keys[static_cast<size_t>(s.list)];
      auto order = list;
      auto pick = [&](int64_t rank, int64_t begin, int64_t end) {  // of the keys at those ranks
        std::nth_element(order.begin() + begin, order.begin() + rank, order.begin() + end, std::greater<uint32_t>());
        return order[static_cast<size_t>(rank)];
      };
      const bool counted = s.share > 0.0;  // then the draws that matter are the sample's non-zero keys
      const int64_t size = counted ? m - std::count(list.begin(), list.end(), 0u) : m;
      const double centre = static_cast<double>(size) * (counted ? s.share : static_cast<double>(s.rank) / static_cast<double>(total_));
      const int64_t middle = std::min(m - 1, static_cast<int64_t>(centre));
      const double slack = 4.0 * spread(list, sizes, pick(middle, 0, m), counted, size) + 3.0;
      const int64_t from = static_cast<int64_t>(std::floor(centre - slack)), upto = static_cast<int64_t>(std::ceil(centre + slack));
      s.hi = from < 0 ? 0x7fffffffu : pick(from, 0, middle);
      s.lo = upto >= m ? 0 : pick(upto, middle + 1, m);
      s.store = s.lo != s.hi;  // one heavy value: counting is enough
      if (!s.store) return;
      if (std::count(list.begin(), list.end(), s.hi) > heavy) s.top.on = true, s.top.key = s.hi--;
      if (std::count(list.begin(), list.end(), s.lo) > heavy) s.bottom.on = true, s.bottom.key = s.lo++;
    });
  }

  // Standard deviation of how many of the sample's keys lie above `key` (or reach it: the larger of the two), cluster by cluster.
  static double spread(const std::vector<uint32_t>& list, const std::vector<int>& sizes, uint32_t key, bool counted, int64_t size) {
    int64_t over = 0, upto = 0;
    for (uint32_t x : list) over += x > key, upto += x >= key;
    const double p = static_cast<double>(over) / static_cast<double>(std::max<int64_t>(1, size));
    const double q = static_cast<double>(upto) / static_cast<double>(std::max<int64_t>(1, size));
    double above = 0.0, reached = 0.0;
    const uint32_t* x = list.data();
    for (int n : sizes) {
      int o = 0, u = 0, w = 0;
      for (int i = 0; i < n; ++i) o += x[i] > key, u += x[i] >= key, w += x[i] != 0;
      if (!counted) w = n;
      above += (o - p * w) * (o - p * w), reached += (u - q * w) * (u - q * w);
      x += n;
    }
    return std::sqrt(std::max(above, reached));
  }

  struct Place {
    int64_t tensor, index;
  };

  // Cluster j of `draws`, jittered inside its stratum by a fixed hash; `near` is a place not far from it.
  Place stratum(int64_t j, int64_t draws, const Place& near) const {
    const uint64_t jitter = (static_cast<uint64_t>(j) * 0x9E3779B97F4A7C15ull) >> 40;
    const int64_t width = std::max<int64_t>(1, total_ / draws);
    const int64_t at = std::min(total_ - 1, j * width + static_cast<int64_t>(jitter % static_cast<uint64_t>(width)));
    int64_t t = near.tensor;
    while (at >= base_[static_cast<size_t>(t - first_ + 1)]) ++t;
    while (at < base_[static_cast<size_t>(t - first_)]) --t;
    return {t, (at - base_[static_cast<size_t>(t - first_)]) / kCluster * kCluster};
  }

  void prefetch(const Place& p) const {
    __builtin_prefetch(static_cast<const char*>(in_.base[p.tensor]) + p.index * item_size(in_.base_dtype[p.tensor]));
    for (int64_t e = p.tensor * in_.experts; e < (p.tensor + 1) * in_.experts; ++e)
      __builtin_prefetch(static_cast<const char*>(in_.expert[e]) + p.index * item_size(in_.expert_dtype[e]));
  }

  const float* keys_of(Prepared& block, int64_t list, int n) const {
    if (want_.key == 0) return block.d[static_cast<size_t>(list)];
    ops_.variance(block.v, block.d.data(), static_cast<int>(in_.experts), n);
    return block.v;
  }

  std::vector<std::unique_ptr<Prepared>> teams(int threads) const {
    std::vector<std::unique_ptr<Prepared>> all;
    for (int i = 0; i < std::max(1, threads); ++i) all.push_back(std::make_unique<Prepared>(in_, rule_, ops_));
    return all;
  }

  template <typename F>
  void each_block(int threads, const M2rlReport* report, F&& fn) const {
    auto team = teams(threads);
    parallel_for(static_cast<int64_t>(chunks_.size()), threads, [&](int64_t c, int thread) {
      Prepared& block = *team[static_cast<size_t>(thread)];
      const Chunk& chunk = chunks_[static_cast<size_t>(c)];
      if (ranked(rule_)) block.rank_rows(chunk);
      for (int64_t i = chunk.begin; i < chunk.end; i += kBlock) {
        int n = static_cast<int>(std::min<int64_t>(kBlock, chunk.end - i));
        block.load(chunk.tensor, i, n, filter_, report);
        fn(block, c, thread, i, n);
      }
      block.flush(chunk.tensor, chunk.end - chunk.begin, report);
    });
  }

  // One pass: per search, count above and inside the bracket, and store the inside unless that is too much.
  void scan(const std::vector<Search*>& searches, int threads, const M2rlReport* report) const {
    const int64_t room = std::max<int64_t>(2 * kWhole, std::min<int64_t>(total_ / 8, int64_t{1} << 24));
    std::vector<std::atomic<int64_t>> held(searches.size());
    // one cache line per search and thread: keys above the bracket, keys that are not zero
    std::vector<int64_t> counts(searches.size() * static_cast<size_t>(threads) * 8, 0);
    for (auto* s : searches) {
      s->above = s->inside = s->nonzero = 0;
      for (auto* atom : {&s->top, &s->bottom}) {
        atom->count = 0;
        atom->chunk.assign(atom->on ? chunks_.size() : 0, 0);
      }
      s->chunk_inside.assign(chunks_.size(), 0);
      s->chunk_at.assign(chunks_.size(), 0);
      s->chunk_thread.assign(chunks_.size(), 0);
      s->stored.assign(static_cast<size_t>(threads), {});
    }
    std::vector<std::vector<uint32_t>> scratch(static_cast<size_t>(threads), std::vector<uint32_t>(kBlock + 32));
    each_block(threads, report, [&](Prepared& block, int64_t c, int thread, int64_t i, int n) {
      const float* keys = nullptr;
      int64_t list = -1;
      for (size_t j = 0; j < searches.size(); ++j) {
        Search& s = *searches[j];
        if (s.list != list) keys = keys_of(block, s.list, n), list = s.list;
        const bool store = s.store && held[j].load(std::memory_order_relaxed) <= room;
        auto& mine = s.stored[static_cast<size_t>(thread)];
        if (i == chunks_[static_cast<size_t>(c)].begin) {
          s.chunk_at[static_cast<size_t>(c)] = static_cast<int64_t>(mine.size());
          s.chunk_thread[static_cast<size_t>(c)] = thread;
        }
        uint32_t* out = scratch[static_cast<size_t>(thread)].data();
        int64_t* count = &counts[(j * static_cast<size_t>(threads) + static_cast<size_t>(thread)) * 8];
        BracketCount found;
        ops_.bracket(keys, n, s.lo, s.hi, s.top.on || s.bottom.on, store ? out : nullptr, &found);
        const int64_t in = found.from_low - found.above;
        count[0] += found.above;
        if (s.share > 0.0) count[1] += ops_.count_nonzero(keys, n);
        if (store && in != 0) {
          mine.insert(mine.end(), out, out + in);
          held[j].fetch_add(in, std::memory_order_relaxed);
        }
        s.chunk_inside[static_cast<size_t>(c)] += in;
        if (s.top.on) s.top.chunk[static_cast<size_t>(c)] += found.above - found.above_top;
        if (s.bottom.on) s.bottom.chunk[static_cast<size_t>(c)] += found.from_bottom - found.from_low;
      }
    });
    for (size_t j = 0; j < searches.size(); ++j) {
      for (int t = 0; t < threads; ++t) {
        const int64_t* count = &counts[(j * static_cast<size_t>(threads) + static_cast<size_t>(t)) * 8];
        searches[j]->above += count[0], searches[j]->nonzero += count[1];
      }
      for (int64_t in : searches[j]->chunk_inside) searches[j]->inside += in;
      for (auto* atom : {&searches[j]->top, &searches[j]->bottom})
        for (int64_t count : atom->chunk) atom->count += count;
    }
  }

  // From a scan to the answer; false if the bracket missed or not all of it was stored: then [lo, hi] and `above` say where to look.
  bool settle(Search& s) const {
    if (s.share > 0.0) {
      s.rank = static_cast<int64_t>(s.share * static_cast<double>(s.nonzero));
      if (answered(s.slot, s.rank)) return true;
    }
    const int64_t over = s.above - s.top.count, upto = s.above + s.inside;  // keys above everything counted; down to the interior
    if (s.rank <= over) {
      s.lo = (s.top.on ? s.top.key : s.hi) + 1, s.hi = 0x7fffffffu, s.above = 0;
      return false;
    }
    if (s.rank > upto + s.bottom.count) {
      s.hi = (s.bottom.on ? s.bottom.key : s.lo) - 1, s.lo = 0, s.above = upto + s.bottom.count;
      return false;
    }
    if (s.rank <= s.above) return conclude(s, s.top.key, over, s.top.count);
    if (s.rank > upto) return conclude(s, s.bottom.key, upto, s.bottom.count);
    if (s.lo == s.hi) return conclude(s, s.lo, s.above, s.inside);
    std::vector<uint32_t> all;
    for (auto& part : s.stored) all.insert(all.end(), part.begin(), part.end());
    if (static_cast<int64_t>(all.size()) != s.inside) return false;
    auto nth = all.begin() + (s.rank - s.above - 1);
    std::nth_element(all.begin(), nth, all.end(), std::greater<uint32_t>());
    int64_t above = s.above, equal = 0;
    for (uint32_t key : all) above += key > *nth, equal += key == *nth;
    return conclude(s, *nth, above, equal);
  }

  bool conclude(const Search& s, uint32_t threshold, int64_t above, int64_t equal) const {
    const int64_t quota = s.rank - above;
    answer(s.slot, threshold, quota < equal ? find_cut(s, threshold, quota) : total_ - 1, above, equal);
    return true;
  }

  // Flat index of the quota-th key equal to the threshold, lowest index first.
  int64_t find_cut(const Search& s, uint32_t threshold, int64_t quota) const {
    for (size_t c = 0; c < chunks_.size(); ++c) {
      int64_t ties = 0;
      if (s.top.on && threshold == s.top.key) {
        ties = s.top.chunk[c];
      } else if (s.bottom.on && threshold == s.bottom.key) {
        ties = s.bottom.chunk[c];
      } else if (s.lo == s.hi) {
        ties = s.chunk_inside[c];
      } else {
        const uint32_t* keys = s.stored[static_cast<size_t>(s.chunk_thread[c])].data() + s.chunk_at[c];
        for (int64_t j = 0; j < s.chunk_inside[c]; ++j) ties += keys[j] == threshold;
      }
      if (quota > ties) {
        quota -= ties;
        continue;
      }
      Prepared block(in_, rule_, ops_);
      const Chunk& chunk = chunks_[c];
      if (ranked(rule_)) block.rank_rows(chunk);
      for (int64_t i = chunk.begin; i < chunk.end; i += kBlock) {
        int n = static_cast<int>(std::min<int64_t>(kBlock, chunk.end - i));
        block.load(chunk.tensor, i, n, filter_, nullptr);
        const float* keys = keys_of(block, s.list, n);
        for (int j = 0; j < n; ++j)
          if (magnitude_key(keys[j]) == threshold && --quota == 0) return base_[static_cast<size_t>(chunk.tensor - first_)] + i + j;
      }
    }
    return total_ - 1;
  }

  // Narrow [lo, hi], of which `above` keys lie beyond, to one value: 65536 bins per pass.
  void refine(Search& s, int threads) const {
    constexpr uint64_t kBins = 65536;
    while (s.lo != s.hi) {
      const uint64_t span = static_cast<uint64_t>(s.hi) - s.lo + 1, width = (span + kBins - 1) / kBins;
      std::vector<std::vector<int64_t>> bins(static_cast<size_t>(threads), std::vector<int64_t>(kBins, 0));
      std::vector<std::vector<uint32_t>> scratch(static_cast<size_t>(threads), std::vector<uint32_t>(kBlock + 32));
      each_block(threads, nullptr, [&](Prepared& block, int64_t, int thread, int64_t, int n) {
        auto& mine = bins[static_cast<size_t>(thread)];
        uint32_t* inside = scratch[static_cast<size_t>(thread)].data();
        BracketCount found;
        ops_.bracket(keys_of(block, s.list, n), n, s.lo, s.hi, false, inside, &found);
        const int64_t in = found.from_low - found.above;
        if (width == 1) for (int64_t j = 0; j < in; ++j) ++mine[inside[j] - s.lo];
        else for (int64_t j = 0; j < in; ++j) ++mine[(inside[j] - s.lo) / width];
      });
      int64_t above = s.above;
      for (uint64_t bin = kBins; bin-- > 0;) {
        int64_t count = 0;
        for (auto& mine : bins) count += mine[bin];
        if (above + count >= s.rank) {
          uint32_t lo = s.lo + static_cast<uint32_t>(bin * width);
          uint64_t hi = static_cast<uint64_t>(lo) + width - 1;
          s.hi = hi < s.hi ? static_cast<uint32_t>(hi) : s.hi;
          s.lo = lo;
          break;
        }
        above += count;
      }
      s.above = above;
    }
    s.store = s.top.on = s.bottom.on = false;
  }

  const M2rlTensors& in_;
  const M2rlRule* rule_;
  const M2rlSelect& want_;
  const M2rlReport* report_;
  const int64_t chunk_;
  const MergeBlocks& ops_;
  const int64_t lists_;
  const int filter_;
  int64_t first_ = 0, last_ = 0, total_ = 0;
  std::vector<int64_t> base_;  // flat index in the group where each tensor starts
  std::vector<Chunk> chunks_;
};

double sum_lanes(const double* lanes) {
  double total = 0.0;
  for (int q = 0; q < kLanes; ++q) total += lanes[q];
  return total;
}

// A group of more elements is never one thread's task: what it stores should stay small.
constexpr int64_t kLargeGroup = int64_t{1} << 24;

int64_t block_multiple(int64_t chunk) { return std::max<int64_t>(kBlock, (chunk + kBlock - 1) / kBlock * kBlock); }

}  // namespace

int32_t m2rl_merge_isa_limit(int32_t limit) { return g_isa = best_isa(limit); }

int32_t m2rl_merge_select(const M2rlTensors* in, const M2rlRule* rule, const M2rlSelect* want, const M2rlReport* report, int64_t chunk,
                          int32_t threads) {
  chunk = block_multiple(chunk);
  // The whole team works on a group that is a large part of the work; the others are one thread's task each, largest first.
  std::vector<int64_t> order(static_cast<size_t>(want->groups)), size(static_cast<size_t>(want->groups), 0);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t g : order)
    for (int64_t t = want->start[g]; t < want->start[g + 1]; ++t) size[static_cast<size_t>(g)] += in->numel[t];
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return size[static_cast<size_t>(a)] > size[static_cast<size_t>(b)]; });
  const int64_t all = std::accumulate(size.begin(), size.end(), int64_t{0});
  const int64_t large = std::max<int64_t>(2 * chunk, std::min<int64_t>(all / (4 * std::max(1, threads)), kLargeGroup));
  const auto first_small = std::partition_point(order.begin(), order.end(), [&](int64_t g) { return size[static_cast<size_t>(g)] > large; });
  for (auto g = order.begin(); g != first_small; ++g) Selector(*in, rule, *want, report, chunk).group(*g, threads);
  parallel_for(order.end() - first_small, threads, [&](int64_t i, int) {
    Selector(*in, rule, *want, report, chunk).group(first_small[i], 1);
  });
  return 0;
}

int32_t m2rl_merge_sums(const M2rlTensors* in, const M2rlRule* rule, const M2rlSums* want, const M2rlReport* report, int64_t chunk,
                        int32_t threads) {
  const MergeBlocks& ops = blocks();
  const int64_t K = in->experts, T = in->tensors;
  const auto chunks = cut_chunks(*in, 0, T, block_multiple(chunk), ranked(rule));
  const int filter = rule == nullptr ? 0 : rule->filter;
  const bool norms = want->abs_before != nullptr || want->abs_after != nullptr;
  // Per chunk: K sums before, K after, K squares, K*K products.
  const size_t width = static_cast<size_t>(3 * K + (want->gram != nullptr ? K * K : 0));
  std::vector<double> partial(chunks.size() * width, 0.0);
  std::vector<std::unique_ptr<Prepared>> team;
  std::vector<std::vector<double>> lanes(static_cast<size_t>(std::max(1, threads)), std::vector<double>(width * kLanes));
  std::vector<std::vector<float>> room(static_cast<size_t>(std::max(1, threads)), std::vector<float>(2 * kBlock));
  for (int i = 0; i < std::max(1, threads); ++i) team.push_back(std::make_unique<Prepared>(*in, rule, ops));
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t c, int thread) {
    const Chunk& part = chunks[static_cast<size_t>(c)];
    const int64_t t = part.tensor;
    Prepared& block = *team[static_cast<size_t>(thread)];
    auto& lane = lanes[static_cast<size_t>(thread)];
    std::fill(lane.begin(), lane.end(), 0.0);
    double* before = lane.data();
    double* after = before + K * kLanes;
    double* square = after + K * kLanes;
    double* gram = square + K * kLanes;
    float* s = room[static_cast<size_t>(thread)].data();
    int64_t sign = 0;
    std::vector<int64_t> unique(static_cast<size_t>(K), 0), shared(static_cast<size_t>(K), 0);
    if (ranked(rule)) block.rank_rows(part);
    for (int64_t i = part.begin; i < part.end; i += kBlock) {
      int n = static_cast<int>(std::min<int64_t>(kBlock, part.end - i));
      block.load(t, i, n, filter, report, norms ? before : nullptr, norms ? after : nullptr);
      for (int64_t k = 0; k < K; ++k) {
        if (want->square != nullptr) ops.sum_product(block.d[k], block.d[k], n, square + k * kLanes);
        if (want->gram != nullptr)
          for (int64_t j = 0; j <= k; ++j) ops.sum_product(block.d[k], block.d[j], n, gram + (k * K + j) * kLanes);
      }
      if (want->sign != nullptr) {
        std::fill(s, s + n, 0.0f);
        for (int64_t k = 0; k < K; ++k) ops.accumulate(s, block.d[k], n, rule->elect[t * K + k], rule->round);
        sign += ops.sum_sign(s, n);
      }
      if (want->unique != nullptr)
        ops.ram(s, block.d.data(), static_cast<int>(K), n, rule->epsilon, rule->scale + t * K, rule->weight + t * K, unique.data(), shared.data());
    }
    block.flush(t, part.end - part.begin, report);
    for (size_t w = 0; w < width; ++w) partial[static_cast<size_t>(c) * width + w] = sum_lanes(lane.data() + w * kLanes);
    if (want->sign != nullptr) add(want->sign + t, sign);
    for (int64_t k = 0; want->unique != nullptr && k < K; ++k) {
      add(want->unique + t * K + k, unique[static_cast<size_t>(k)]);
      add(want->shared + t * K + k, shared[static_cast<size_t>(k)]);
    }
  });
  for (size_t c = 0; c < chunks.size(); ++c) {  // chunk order: the same sum for any number of threads
    const double* p = partial.data() + c * width;
    const int64_t t = chunks[c].tensor;
    for (int64_t k = 0; k < K; ++k) {
      if (want->abs_before != nullptr) want->abs_before[t * K + k] += p[k];
      if (want->abs_after != nullptr) want->abs_after[t * K + k] += p[K + k];
      if (want->square != nullptr) want->square[t * K + k] += p[2 * K + k];
      for (int64_t j = 0; want->gram != nullptr && j <= k; ++j) {
        want->gram[(t * K + k) * K + j] += p[3 * K + k * K + j];
        if (j != k) want->gram[(t * K + j) * K + k] += p[3 * K + k * K + j];
      }
    }
  }
  return 0;
}

int32_t m2rl_merge_apply(const M2rlTensors* in, const M2rlRule* rule, const M2rlOutput* out, const M2rlReport* report, int64_t chunk,
                         int32_t threads) {
  const MergeBlocks& ops = blocks();
  const int64_t K = in->experts, T = in->tensors;
  const auto chunks = cut_chunks(*in, 0, T, block_multiple(chunk), ranked(rule));
  std::atomic<int32_t> failure{0};
  struct Room {
    std::unique_ptr<Prepared> block;
    std::vector<char> bytes;
    std::vector<int64_t> unique, shared;
  };
  std::vector<Room> rooms(static_cast<size_t>(std::max(1, threads)));
  for (auto& room : rooms) {
    room.block = std::make_unique<Prepared>(*in, rule, ops);
    room.unique.resize(static_cast<size_t>(K)), room.shared.resize(static_cast<size_t>(K));
  }
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t c, int thread) {
    if (failure.load(std::memory_order_relaxed) != 0) return;
    const Chunk& part = chunks[static_cast<size_t>(c)];
    const int64_t t = part.tensor;
    const bool elect = rule->combine == M2RL_ELECT;
    const Combine combine{static_cast<int>(K), rule->zero_sign[t], rule->round, rule->normalize != 0, rule->combine != M2RL_LINEAR,
                          rule->weight + t * K, rule->elect + t * K, rule->divisor[t], elect ? rule->den_floor : 0.0f,
                          elect ? rule->den_substitute : 1.0f, rule->lambda[t]};
    Room& room = rooms[static_cast<size_t>(thread)];
    Prepared& block = *room.block;
    float *v = block.v, *stored = block.stored;
    const int64_t size = item_size(out->dtype[t]);
    const bool to_memory = out->address != nullptr;
    if (!to_memory) room.bytes.resize(static_cast<size_t>((part.end - part.begin) * size));
    char* target = to_memory ? static_cast<char*>(out->address[t]) + part.begin * size : room.bytes.data();
    int64_t overflow = 0, changed = 0;
    if (ranked(rule)) block.rank_rows(part);
    for (int64_t i = part.begin; i < part.end; i += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, part.end - i));
      block.load(t, i, n, rule->filter, report);
      if (rule->combine == M2RL_ELECT) {
        ops.combine_elect(v, block.d.data(), block.b, n, combine);
      } else if (rule->combine == M2RL_RAM) {
        ops.ram(v, block.d.data(), static_cast<int>(K), n, rule->epsilon, rule->scale + t * K, combine.weight, room.unique.data(), room.shared.data());
        ops.finish(v, v, block.b, n, rule->lambda[t], rule->round);
      } else {
        ops.combine_sum(v, block.d.data(), block.b, n, combine);
      }
      char* here = target + (i - part.begin) * size;
      overflow += ops.store(v, n, out->dtype[t], here);
      block.checksum(report, K + 1, here, out->dtype[t], i, n);
      if (report != nullptr && report->changed != nullptr && in->base != nullptr && in->base[t] != nullptr) {
        ops.load(here, out->dtype[t], n, stored);
        changed += ops.count_different(stored, block.b, n);
      }
    }
    block.flush(t, part.end - part.begin, report);
    if (report != nullptr && report->overflow != nullptr) add(report->overflow + t, overflow);
    if (report != nullptr && report->changed != nullptr) add(report->changed + t, changed);
    if (!to_memory) {
      int64_t at = out->position[t] + part.begin * size, left = (part.end - part.begin) * size;
      for (const char* from = target; left > 0;) {
        ssize_t written = pwrite(out->file[t], from, static_cast<size_t>(left), at);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) {
          failure.store(written < 0 ? errno : EIO);
          return;
        }
        from += written, at += written, left -= written;
      }
    }
  });
  return failure.load();
}

uint64_t m2rl_merge_checksum(const void* bytes, int64_t size, int32_t threads) {
  const int64_t step = int64_t{1} << 20, parts = (size + step - 1) / step;
  std::atomic<uint64_t> total{0};
  parallel_for(parts, threads, [&](int64_t p, int) {
    total += blocks().checksum(static_cast<const char*>(bytes) + p * step, std::min(step, size - p * step), static_cast<uint64_t>(p * step / 8));
  });
  return total.load();
}
