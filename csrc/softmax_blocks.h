// Softmax of one short row; softmax_blocks.isa.h implements it once per instruction set.
#pragma once
#include <cstdint>

namespace m2rl {

constexpr int kSoftmaxRow = 4096;  // longest row; SHORT_ROW in kernels/m2rl_kernels/linear_logprob.py

struct SoftmaxBlocks {
  // p = softmax(z * scale) over n <= kSoftmaxRow elements. logp = log p[target], or NaN where there is no such element;
  // plogp = sum p log p, unless null; grad = weight * (p, less 1 at the target), unless null (it may be z).
  void (*row)(const float* z, int n, float scale, int64_t target, float weight, float* grad, float* logp, float* plogp);
};

}  // namespace m2rl
