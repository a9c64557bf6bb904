// Statistics of deltas d_k = x_k - base in one reading, and count-sketches. Work is cut into tasks of fixed size whose sums are
// added in the order of tasks: the result does not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "counter_rng.h"
#include "isa.h"
#include "ops.h"
#include "stats_blocks.h"
#include "sync_blocks.h"
#include "team.h"

using namespace m2rl;

namespace m2rl {
extern const StatsBlocks stats_blocks_base, stats_blocks_avx2, stats_blocks_avx512;
extern const SyncBlocks sync_blocks_base, sync_blocks_avx2, sync_blocks_avx512;
}

namespace {

constexpr int64_t kTask = 64 * kStatsBlock;

const StatsBlocks& stats() { return M2RL_VARIANT(stats_blocks, this_isa()); }
const SyncBlocks& conversions() { return M2RL_VARIANT(sync_blocks, this_isa()); }

void read(const void* from, int32_t dtype, int64_t at, int64_t n, float* to) {
  conversions().convert(static_cast<const char*>(from) + at * (dtype == M2RL_F32 ? 4 : 2), dtype, to, M2RL_F32, n);
}

}  // namespace

void m2rl_delta_stats(int64_t numel, int32_t models, const void* base, int32_t base_dtype, const void* const* x,
                      const int32_t* x_dtype, double* sums, int64_t* counts, int32_t threads) {
  const StatsBlocks& ops = stats();
  const int64_t M = models, tasks = (numel + kTask - 1) / kTask, n_sums = M * M + 2 * M, n_counts = 2 * M * M + M + M * 256;
  std::vector<double> task_sums(tasks * n_sums, 0.0);
  std::atomic<int64_t>* total = nullptr;
  static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t), "counts are added in place");
  total = reinterpret_cast<std::atomic<int64_t>*>(counts);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    std::vector<float> b(kStatsBlock), d(M * kStatsBlock);
    std::vector<uint64_t> bits(2 * M * kStatsWords);
    std::vector<int64_t> count(n_counts, 0);
    double* gram = task_sums.data() + task * n_sums;
    double *l1 = gram + M * M, *largest = l1 + M;
    int64_t *both = count.data(), *agree = both + M * M, *changed = agree + M * M, *exponents = changed + M;
    for (int64_t at = task * kTask; at < std::min(numel, (task + 1) * kTask); at += kStatsBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kStatsBlock, numel - at)), words = (n + 63) / 64;
      read(base, base_dtype, at, n, b.data());
      for (int64_t k = 0; k < M; ++k) {
        read(x[k], x_dtype[k], at, n, d.data() + k * kStatsBlock);
        ops.delta(b.data(), d.data() + k * kStatsBlock, n, bits.data() + 2 * k * kStatsWords, bits.data() + (2 * k + 1) * kStatsWords,
                  changed + k, l1 + k, largest + k, exponents + k * 256);
      }
      for (int64_t i = 0; i < M; ++i)
        for (int64_t j = i; j < M; ++j) {
          gram[i * M + j] += ops.dot(d.data() + i * kStatsBlock, d.data() + j * kStatsBlock, n);
          const uint64_t *p = bits.data() + 2 * i * kStatsWords, *q = bits.data() + 2 * j * kStatsWords;
          ops.overlap(p, q, p + kStatsWords, q + kStatsWords, words, both + i * M + j, agree + i * M + j);
        }
    }
    for (int64_t c = 0; c < n_counts; ++c) total[c].fetch_add(count[c], std::memory_order_relaxed);
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t s = 0; s < n_sums; ++s) {
      const double value = task_sums[task * n_sums + s];
      sums[s] = s >= M * M + M ? std::max(sums[s], value) : sums[s] + value;
    }
}

void m2rl_count_sketch(int64_t numel, const void* x, int32_t x_dtype, const void* base, int32_t base_dtype, uint64_t key,
                       int64_t size, double* sketch, int32_t threads) {
  const StatsBlocks& ops = stats();
  const int64_t per_task = std::max<int64_t>(1, (int64_t{1} << 20) / size), tiles = (numel + size - 1) / size;
  const int64_t tasks = (tiles + per_task - 1) / per_task;
  std::vector<double> partial(tasks * size, 0.0);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    std::vector<float> d(size), b(base != nullptr ? size : 0);
    std::vector<uint32_t> signs((size + 127) / 128 * 4);
    for (int64_t tile = task * per_task; tile < std::min(tiles, (task + 1) * per_task); ++tile) {
      const int64_t at = tile * size, n = std::min(size, numel - at);
      read(x, x_dtype, at, n, d.data());
      if (base != nullptr) {
        read(base, base_dtype, at, n, b.data());
        for (int64_t j = 0; j < n; ++j) d[j] -= b[j];
      }
      const int64_t blocks = (n + 127) / 128;
      for (int64_t k = 0; k < blocks; ++k) {
        const Philox4 words = philox4x32_7(static_cast<uint64_t>(tile) << 24 | static_cast<uint64_t>(k), 0, 2, key);
        for (int w = 0; w < 4; ++w) signs[4 * k + w] = words.word[w];
      }
      const Philox4 place = philox4x32_7(static_cast<uint64_t>(tile), 0, 3, key);
      const int64_t shift = static_cast<int64_t>((static_cast<uint64_t>(place.word[1]) << 32 | place.word[0]) % static_cast<uint64_t>(size));
      ops.add_signed(d.data(), static_cast<int>(n), signs.data(), shift, size, partial.data() + task * size);
    }
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t j = 0; j < size; ++j) sketch[j] += partial[task * size + j];
}
