// The inner loops of the policy loss; policy_loss_blocks.isa.h implements them once per instruction set.
#pragma once
#include <cstdint>

#include "ops.h"

namespace m2rl {

constexpr int kLossBlock = 512;  // tokens
constexpr int kLossStats = 15;   // STATS in kernels/m2rl_kernels/policy_loss.py

struct PolicyLossBlocks {
  // Tokens [at, at + n), n <= kLossBlock: their statistics to table [kLossStats][kLossBlock], their gradients to the arguments'
  // arrays. ratio [tokens]: gspo's, or null; slope [tokens]: takes the ratio's part of the gradient instead of grad_logp, or null.
  void (*tokens)(const M2rlPolicyLoss& args, int64_t at, int n, const float* ratio, float* slope, float* table);
  // sum of x[0, n): float32 in 16 lanes
  float (*sum)(const float* x, int n);
  float (*exp)(float x);
};

}  // namespace m2rl
