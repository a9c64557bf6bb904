// Weight synchronisation on the CPU: many strided 2-D copies with a conversion, and position-dependent checksums.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "ops.h"
#include "sync_blocks.h"
#include "team.h"

using namespace m2rl;

namespace m2rl {
extern const SyncBlocks sync_blocks_base, sync_blocks_avx2, sync_blocks_avx512;
}

namespace {

constexpr int64_t kTask = 1 << 18;  // elements handed to a thread at a time

const SyncBlocks& blocks() { return M2RL_VARIANT(sync_blocks, this_isa()); }

int64_t item_size(int32_t dtype) { return dtype == M2RL_F32 ? 4 : 2; }

struct Task {
  const M2rlCopy* copy;
  int64_t row, rows, column, columns;
};

// Pieces of at most about kTask elements: whole rows, or a part of one row.
std::vector<Task> split(const M2rlCopy* copies, int64_t n) {
  std::vector<Task> tasks;
  for (int64_t c = 0; c < n; ++c) {
    const M2rlCopy& copy = copies[c];
    if (copy.rows <= 0 || copy.columns <= 0) continue;
    if (copy.columns >= kTask) {
      for (int64_t r = 0; r < copy.rows; ++r)
        for (int64_t j = 0; j < copy.columns; j += kTask) tasks.push_back({&copy, r, 1, j, std::min(kTask, copy.columns - j)});
    } else {
      const int64_t step = kTask / copy.columns;
      for (int64_t r = 0; r < copy.rows; r += step) tasks.push_back({&copy, r, std::min(step, copy.rows - r), 0, copy.columns});
    }
  }
  return tasks;
}

}  // namespace

void m2rl_sync_copy(const M2rlCopy* copies, int64_t n, int32_t src_dtype, int32_t dst_dtype, int32_t threads) {
  const SyncBlocks& ops = blocks();
  const int64_t in = item_size(src_dtype), out = item_size(dst_dtype);
  const std::vector<Task> tasks = split(copies, n);
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i, int) {
    const Task& t = tasks[static_cast<size_t>(i)];
    const M2rlCopy& c = *t.copy;
    for (int64_t r = t.row; r < t.row + t.rows; ++r)
      ops.convert(static_cast<const char*>(c.src) + (r * c.src_stride + t.column) * in, src_dtype,
                  static_cast<char*>(c.dst) + (r * c.dst_stride + t.column) * out, dst_dtype, t.columns);
  });
}

void m2rl_sync_checksum(const M2rlCopy* copies, int64_t n, int32_t src_dtype, int32_t dst_dtype, uint64_t* sums, int32_t threads) {
  const SyncBlocks& ops = blocks();
  const int64_t in = item_size(src_dtype), out = item_size(dst_dtype);
  const std::vector<Task> tasks = split(copies, n);
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i, int) {
    const Task& t = tasks[static_cast<size_t>(i)];
    const M2rlCopy& c = *t.copy;
    std::vector<char> converted(4096 * out);
    uint64_t sum[2] = {0, 0};
    for (int64_t r = t.row; r < t.row + t.rows; ++r)
      for (int64_t j = t.column; j < t.column + t.columns; j += 4096) {
        const int64_t m = std::min<int64_t>(4096, t.column + t.columns - j);
        const char* from = static_cast<const char*>(c.src) + (r * c.src_stride + j) * in;
        if (src_dtype != dst_dtype) ops.convert(from, src_dtype, converted.data(), dst_dtype, m);
        ops.checksum(src_dtype != dst_dtype ? converted.data() : from, static_cast<int>(out), m,
                     static_cast<uint64_t>(c.dst_first + r * c.dst_stride + j), sum);
      }
    __atomic_fetch_add(sums + 2 * c.tensor, sum[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(sums + 2 * c.tensor + 1, sum[1], __ATOMIC_RELAXED);
  });
}
