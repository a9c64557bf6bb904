// The two inner loops of weight synchronisation; sync_blocks.isa.h implements them once per instruction set.
#pragma once
#include <cstdint>

#include "radix.h"

namespace m2rl {

struct SyncBlocks {
  // dst[i] = dst_dtype(src[i]), round to nearest even
  void (*convert)(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n);
  // sum[0..1] += the two hashes of elements first, first + 1, ... of `size` bytes each
  void (*checksum)(const void* bits, int size, int64_t n, uint64_t first, uint64_t* sum);
};

// Position-dependent, so that swapped rows are seen; the sum over elements does not depend on the order of adding. Mirrored by
// checksum_ref in kernels/m2rl_kernels/weight_sync.py.
static M2RL_HD void add_hash(uint64_t index, uint64_t bits, uint64_t& first, uint64_t& second) {
  uint64_t a = (index + 1) * 0x9E3779B97F4A7C15ull + bits * 0xD1B54A32D192ED03ull;
  a ^= a >> 32;
  a *= 0xD6E8FEB86659FD93ull;
  a ^= a >> 32;
  first += a;
  a *= 0xD6E8FEB86659FD93ull;
  a ^= a >> 29;
  second += a;
}

}  // namespace m2rl
