// The inner loops of delta statistics; stats_blocks.isa.h implements them once per instruction set.
#pragma once
#include <cstdint>

namespace m2rl {

constexpr int kStatsBlock = 4096;  // elements; a multiple of 64
constexpr int kStatsWords = kStatsBlock / 64;

struct StatsBlocks {
  // x := d = x - b; bits of d != 0 and of d < 0, 64 elements a word; counts where bf16(x) != bf16(b); adds sum |d|, max |d|,
  // and the histogram of d's biased exponents (256 bins; bin 0: zeros and subnormals)
  void (*delta)(const float* b, float* x, int n, uint64_t* nonzero, uint64_t* negative, int64_t* changed, double* l1,
                double* largest, int64_t* exponents);
  // sum of a[i] c[i]: float32 in 16 lanes over the block, then float64
  double (*dot)(const float* a, const float* c, int n);
  // popcounts of p & q and of p & q & ~(s ^ t)
  void (*overlap)(const uint64_t* p, const uint64_t* q, const uint64_t* s, const uint64_t* t, int words, int64_t* both,
                  int64_t* agree);
  // sum[(j + shift) mod size] += +-x[j], the sign from bit j of `signs` (1: minus), for j < n <= size
  void (*add_signed)(const float* x, int n, const uint32_t* signs, int64_t shift, int64_t size, double* sum);
};

}  // namespace m2rl
