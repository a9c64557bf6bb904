// Group advantages on the host. The definition is group_advantages_ref in kernels/m2rl_kernels/advantages.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"

namespace {

enum Mode : int32_t { kGrpo = 0, kDrGrpo = 1, kRloo = 2, kBatchStd = 3 };  // MODES in advantages.py

struct Moments {
  double count = 0, mean = 0, std = 0;  // of the rewards present; std is unbiased, 0 unless alive
  bool alive = false;                   // two of them differ (a rounded std > 0 would not say so)
};

template <class Real>
Moments moments(const Real* rewards, int64_t begin, int64_t end) {
  Moments m;
  double sum = 0, square = 0, low = std::numeric_limits<double>::infinity(), high = -low;
  for (int64_t i = begin; i < end; ++i) {
    const double r = rewards[i];
    if (r != r) continue;
    sum += r, m.count += 1;
    low = std::min(low, r), high = std::max(high, r);
  }
  m.mean = sum / m.count;  // 0/0: NaN where no reward is present
  m.alive = low < high;
  if (!m.alive) return m;
  for (int64_t i = begin; i < end; ++i) {
    const double r = rewards[i], d = r - m.mean;
    if (r == r) square += d * d;
  }
  m.std = std::sqrt(square / (m.count - 1));
  return m;
}

template <class Real>
void advantages(const Real* rewards, const int64_t* offsets, int64_t groups, int32_t mode, double eps, const int64_t* cu_seqlens,
                Real* adv, Real* mean, Real* std, uint8_t* live, Real* token_adv) {
  const double batch = mode == kBatchStd ? moments(rewards, 0, offsets[groups]).std : 0;
  for (int64_t g = 0; g < groups; ++g) {
    const Moments m = moments(rewards, offsets[g], offsets[g + 1]);
    mean[g] = static_cast<Real>(m.mean);
    std[g] = static_cast<Real>(m.std);
    const double scale = mode == kGrpo     ? 1 / (m.std + eps)
                         : mode == kRloo   ? m.count / (m.count - 1)
                         : mode == kDrGrpo ? 1.0
                                           : 1 / (batch + eps);
    for (int64_t s = offsets[g]; s < offsets[g + 1]; ++s) {
      live[s] = m.alive && rewards[s] == rewards[s];
      adv[s] = live[s] ? static_cast<Real>((rewards[s] - m.mean) * scale) : Real{0};
      if (cu_seqlens) std::fill(token_adv + cu_seqlens[s], token_adv + cu_seqlens[s + 1], adv[s]);
    }
  }
}

}  // namespace

void m2rl_group_advantages(int32_t is_double, const void* rewards, const int64_t* offsets, int64_t groups, int32_t mode, double eps,
                           const int64_t* cu_seqlens, void* adv, void* mean, void* std, uint8_t* live, void* token_adv) {
  if (is_double)
    advantages(static_cast<const double*>(rewards), offsets, groups, mode, eps, cu_seqlens, static_cast<double*>(adv),
               static_cast<double*>(mean), static_cast<double*>(std), live, static_cast<double*>(token_adv));
  else
    advantages(static_cast<const float*>(rewards), offsets, groups, mode, eps, cu_seqlens, static_cast<float*>(adv),
               static_cast<float*>(mean), static_cast<float*>(std), live, static_cast<float*>(token_adv));
}
