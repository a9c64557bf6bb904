// Policy loss, gradients and statistics on the host, a block of tokens at a time in cache. The definition is policy_loss_ref in
// kernels/m2rl_kernels/policy_loss.py.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "ops.h"
#include "policy_loss_blocks.h"

namespace m2rl {
extern const PolicyLossBlocks policy_loss_blocks_base, policy_loss_blocks_avx2, policy_loss_blocks_avx512;
}

using namespace m2rl;

namespace {

const PolicyLossBlocks& blocks() { return M2RL_VARIANT(policy_loss_blocks, this_isa()); }

}  // namespace

void m2rl_policy_loss(const M2rlPolicyLoss* args) {
  const M2rlPolicyLoss& a = *args;
  const PolicyLossBlocks& ops = blocks();
  const bool by_sequence = a.kind == M2RL_GSPO;
  std::vector<float> ratio(by_sequence ? a.tokens : 0), slope(by_sequence ? a.tokens : 0);
  for (int64_t s = 0; by_sequence && s < a.sequences; ++s) {
    const int64_t begin = a.cu_seqlens[s], end = a.cu_seqlens[s + 1];
    double log_ratio = 0;
    for (int64_t i = begin; i < end; ++i) log_ratio += a.logp[i] - (a.old_logp ? a.old_logp : a.logp)[i];
    const float r = ops.exp(static_cast<float>(log_ratio / std::max<int64_t>(end - begin, 1)));
    std::fill(ratio.begin() + begin, ratio.begin() + end, r);
  }
  std::vector<double> sums(a.segments * kLossStats, 0.0);
  double loss = 0;
  std::vector<float> table(kLossStats * kLossBlock);
  for (int64_t at = 0; at < a.tokens; at += kLossBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kLossBlock, a.tokens - at));
    ops.tokens(a, at, n, by_sequence ? ratio.data() : nullptr, by_sequence ? slope.data() : nullptr, table.data());
    loss += ops.sum(&table[3 * kLossBlock], n);
    for (int i = 0, end; i < n; i = end) {  // tokens of one segment lie in runs
      const int64_t segment = a.segment ? a.segment[at + i] : 0;
      for (end = a.segment ? i + 1 : n; end < n && a.segment[at + end] == segment;) ++end;
      if (segment < 0 || segment >= a.segments) continue;
      for (int c = 0; c < kLossStats; ++c) sums[segment * kLossStats + c] += ops.sum(&table[c * kLossBlock + i], end - i);
    }
  }
  for (int64_t s = 0; by_sequence && s < a.sequences; ++s) {  // every token of a sequence moves its one ratio
    const int64_t begin = a.cu_seqlens[s], end = a.cu_seqlens[s + 1];
    double total = 0;
    for (int64_t i = begin; i < end; ++i) total += slope[i];
    const float mean = static_cast<float>(total / std::max<int64_t>(end - begin, 1));
    for (int64_t i = begin; i < end; ++i) a.grad_logp[i] += mean;
  }
  *a.loss = static_cast<float>(loss);
  std::copy(sums.begin(), sums.end(), a.stats);
}
