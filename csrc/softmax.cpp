// Log-probability, entropy and gradient of softmax rows on the host. Python: kernels/m2rl_kernels/linear_logprob.py.
#include <algorithm>

#include "isa.h"
#include "ops.h"
#include "softmax_blocks.h"
#include "team.h"

namespace m2rl {
extern const SoftmaxBlocks softmax_blocks_base, softmax_blocks_avx2, softmax_blocks_avx512;
}

using namespace m2rl;

namespace {

const SoftmaxBlocks& blocks() { return M2RL_VARIANT(softmax_blocks, this_isa()); }

constexpr int64_t kWorthAThread = int64_t{1} << 17;  // elements: what starting one costs

}  // namespace

void m2rl_softmax_rows(const float* z, int64_t rows, int64_t columns, float scale, const int64_t* target, const float* weight,
                       float* grad, float* logp, float* plogp, int32_t threads) {
  const SoftmaxBlocks& ops = blocks();
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows * columns / kWorthAThread));
  parallel_for(parts, threads, [&](int64_t part, int) {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
      ops.row(z + r * columns, static_cast<int>(columns), scale, target[r], weight == nullptr ? 1.0f : weight[r],
              grad == nullptr ? nullptr : grad + r * columns, logp + r, plogp == nullptr ? nullptr : plogp + r);
  });
}
