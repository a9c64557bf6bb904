// The vector primitives of merging: each works on one block of at most kBlock elements that stays in the first-level cache.
// merge_blocks.isa.h implements them once per instruction set; merge.cpp composes them. Arithmetic is float32 in one fixed
// order without contraction, so every variant gives the same bits.
#pragma once
#include <cstdint>

#include "lanes.h"

namespace m2rl {

constexpr int kBlock = 1024;

// How K task vectors of one tensor become one.
//   sum     num = sum_k round(w_k * d_k), den = divisor
//   elect   s = sign(sum_k round(e_k * d_k)), `zero_sign` (+1, -1 or 0) where that is 0; num and den add round(w_k * d_k) and w_k of
//           those d_k != 0 whose sign is s
// normalize: num = round(round(num) / round(den)), with den_substitute where |den| < den_floor or den = 0
// add_base:  v = round(b + round(lambda * round(num))), otherwise v = num
struct Combine {
  int experts, zero_sign, round;
  bool normalize, add_base;
  const float *weight, *elect;  // w, e [K]
  float divisor, den_floor, den_substitute, lambda;
};

struct BracketCount {
  int64_t above = 0, above_top = 0, from_low = 0, from_bottom = 0;
};

// `round` names the type every intermediate is rounded to: M2RL_F32 (no rounding), M2RL_BF16, M2RL_F16.
struct MergeBlocks {
  // dst = float32(src); returns how many are NaN or infinite
  int64_t (*load)(const void* src, int dtype, int n, float* dst);
  // d = round(float32(src) - b); returns how many of src are NaN or infinite, adds to `nonzero` how many of d are not 0
  int64_t (*load_delta)(const void* src, int dtype, int n, const float* b, int round, float* d, int64_t* nonzero);
  // dst = dtype(v), round to nearest even; returns how many results are NaN or infinite
  int64_t (*store)(const float* v, int n, int dtype, void* dst);

  // adds to `count` how many keys are > hi, > hi + 1, >= lo and (where `atoms`) >= lo - 1; keys in [lo, hi] are written to `inside` (room
  // for n + 16) unless it is null
  void (*bracket)(const float* d, int n, uint32_t lo, uint32_t hi, bool atoms, uint32_t* inside, BracketCount* count);
  // d = key(d) >= threshold ? d : 0        (`invert`: the other ones)
  void (*keep_above)(float* d, int n, uint32_t threshold, bool invert);
  // d = key(v) >= threshold ? d : 0
  void (*keep_where)(float* d, const float* v, int n, uint32_t threshold);
  // d = keep_element(index + i, expert, key, threshold) ? d : 0
  void (*keep_random)(float* d, int n, uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold);
  // d = factor[i] != 0 ? d * factor[i] : 0
  void (*keep_factors)(float* d, int n, const float* factor);
  // d = round(d * scale)
  void (*scale)(float* d, int n, float scale, int round);

  // s += w * d, with round(w * d) and no rounding of s
  void (*accumulate)(float* s, const float* d, int n, float w, int round);
  // v = what `c` makes of the K rows of d and of b; rows have room for n rounded up to kLanes
  void (*combine_sum)(float* v, const float* const* d, const float* b, int n, const Combine& c);
  void (*combine_elect)(float* v, const float* const* d, const float* b, int n, const Combine& c);
  // v = round(b + round(lambda * num))
  void (*finish)(float* v, const float* num, const float* b, int n, float lambda, int round);
  // variance over experts: v = mean_k (d_k - mean_k d_k)^2
  void (*variance)(float* v, const float* const* d, int experts, int n);
  // RAM: changed counts, then num: owners alone give scale_k * d_k, shared ones the mean of the changed
  void (*ram)(float* num, const float* const* d, int experts, int n, float epsilon, const float* scale, const float* weight,
              int64_t* unique, int64_t* shared);

  // lane-wise float64 sums: lanes[16] += |d|, d^2, a*b
  void (*sum_abs)(const float* d, int n, double* lanes);
  void (*sum_product)(const float* a, const float* b, int n, double* lanes);
  int64_t (*count_nonzero)(const float* d, int n);
  int64_t (*count_different)(const float* a, const float* b, int n);
  int64_t (*sum_sign)(const float* s, int n);  // (#positive) - (#negative)

  // 64-bit checksum of bytes, a sum over 8-byte words of (low ^ a(i)) * (high ^ b(i)), i = word index from `first`
  uint64_t (*checksum)(const void* bytes, int64_t size, uint64_t first);
};

extern const MergeBlocks merge_blocks_base;
#if defined(__x86_64__)
extern const MergeBlocks merge_blocks_avx2, merge_blocks_avx512;
#endif

}  // namespace m2rl
