// Compiled once per instruction set (see CMakeLists.txt). The same arithmetic in every variant.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "exponential.h"
#include "lanes.h"
#include "softmax_blocks.h"

namespace m2rl {
namespace {

// One number from 2 * kWidth, in pairs: four steps of waiting where a chain has fifteen.
template <int kWidth, typename F>
inline float folded(float* v, F&& f) {
  for (int q = 0; q < kWidth; ++q) v[q] = f(v[q], v[q + kWidth]);
  if constexpr (kWidth > 1) return folded<kWidth / 2>(v, f);
  return v[0];
}

template <typename F>
inline float folded(const Lanes& x, F&& f) {
  float v[kLanes];
  std::memcpy(v, &x, sizeof v);
  return folded<kLanes / 2>(v, f);
}

inline float sum(const Lanes& x) {
  return folded(x, [](float a, float b) { return a + b; });
}

void row(const float* z, int n, float scale, int64_t target, float weight, float* grad, float* logp, float* plogp) {
  const Lanes none = {}, lowest = none - std::numeric_limits<float>::infinity();
  const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int full = n / kLanes, rest = n % kLanes, steps = full + (rest != 0);
  Lanes e[kSoftmaxRow / kLanes], high = lowest, total = none, spread = none;
  for (int s = 0; s < full; ++s) e[s] = load_lanes(z + s * kLanes);
  if (rest != 0) {  // the row's last lanes; what the full ones have seen, or the row lacks, weighs nothing
    float last[kLanes];
    for (int q = 0; full == 0 && q < kLanes; ++q) last[q] = z[q < kLanes - rest ? 0 : q - (kLanes - rest)];
    e[full] = lane >= kLanes - rest ? load_lanes(full == 0 ? last : z + n - kLanes) : lowest;
  }
  for (int s = 0; s < steps; ++s) {
    e[s] *= scale;
    high = e[s] > high ? e[s] : high;
  }
  const float most = folded(high, [](float a, float b) { return a > b ? a : b; });
  for (int s = 0; s < steps; ++s) {
    const Lanes x = e[s] - most;
    e[s] = exponential_of<Words>(x);
    total += e[s];
    if (plogp != nullptr) spread += e[s] == none ? none : e[s] * x;  // 0 log 0 = 0
  }
  const float whole = sum(total), log_whole = std::log(whole), inverse = 1.0f / whole;
  const bool known = target >= 0 && target < n;
  *logp = known ? z[target] * scale - most - log_whole : std::numeric_limits<float>::quiet_NaN();
  if (plogp != nullptr) *plogp = sum(spread) * inverse - log_whole;
  if (grad == nullptr) return;
  for (int q = kLanes - rest; rest != 0 && q < kLanes; ++q) grad[n - kLanes + q] = e[full][q] * inverse * weight;
  for (int s = 0; s < full; ++s) {
    const Lanes p = e[s] * inverse * weight;
    std::memcpy(grad + s * kLanes, &p, sizeof p);
  }
  if (known) grad[target] -= weight;
}

}  // namespace

#define M2RL_JOIN(a, b) a##b
#define M2RL_TABLE(isa) M2RL_JOIN(softmax_blocks_, isa)
extern const SoftmaxBlocks M2RL_TABLE(M2RL_ISA);
const SoftmaxBlocks M2RL_TABLE(M2RL_ISA) = {row};

}  // namespace m2rl
