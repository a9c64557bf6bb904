// Compiled once per instruction set (see CMakeLists.txt). Plain loops that the compiler vectorises; the same arithmetic in every
// variant. Formulas: kernels/m2rl_kernels/policy_loss.py.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // or a comparison keeps a loop scalar; no value changes
#endif
#include <cstdint>
#include <cstring>

#include "exponential.h"
#include "policy_loss_blocks.h"
#include "radix.h"

namespace m2rl {
namespace {

// e^x - x - 1 without cancellation near 0.
inline __attribute__((always_inline)) float exponential_rest(float x) {
  const float series =
      x * x * (1.f / 2 + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720 + x * (1.f / 5040 + x * (1.f / 40320)))))));
  const float whole = exponential(x) - x - 1;
  return (x < 0 ? -x : x) < 0.3f ? series : whole;
}

inline float absolute(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

void fill(float* x, int n, float value) {
  for (int i = 0; i < n; ++i) x[i] = value;
}

void tokens(const M2rlPolicyLoss& a, int64_t at, int n, const float* ratio, float* slope_out, float* table) {
  enum { count, weight, pull, loss, logp, entropy, r, clip, k1, k3, mismatch, tis, tis_clip, kl_k1, kl_k3 };
  float* column[kLossStats];
  for (int c = 0; c < kLossStats; ++c) column[c] = table + c * kLossBlock;
  const float *lp = a.logp + at, *A = a.advantage + at, *w = a.weight + at;
  const float* old = a.old_logp ? a.old_logp + at : lp;
  float pg[kLossBlock], slope[kLossBlock];
  float *R = column[r], *C = column[clip];

  if (ratio) std::memcpy(R, ratio + at, n * sizeof(float));
  else if (a.old_logp) for (int i = 0; i < n; ++i) R[i] = exponential(lp[i] - old[i]);
  else for (int i = 0; i < n; ++i) R[i] = exponential(lp[i] - lp[i]);  // 1, or NaN

  const float low = a.ratio_low, high = a.ratio_high, dual = a.dual_clip;
  if (a.kind == M2RL_REINFORCE) {
    for (int i = 0; i < n; ++i) slope[i] = -A[i], pg[i] = -A[i] * lp[i], C[i] = 0;
  } else if (a.kind == M2RL_CISPO) {
    for (int i = 0; i < n; ++i) {
      const float capped = R[i] > high ? high : R[i], bounded = capped < low ? low : capped;
      slope[i] = -A[i] * bounded;
      pg[i] = slope[i] * lp[i];
      C[i] = ((R[i] < low) | (R[i] > high)) & (A[i] != 0) ? 1.f : 0.f;
    }
  } else {
    for (int i = 0; i < n; ++i) {
      const float capped = R[i] > high ? high : R[i], bounded = capped < low ? low : capped;
      const float free = -A[i] * R[i], held = -A[i] * bounded;
      const bool far = (dual > 0) & (A[i] < 0) & (R[i] > dual);
      const bool clipped = ((A[i] > 0) & (R[i] > high)) | ((A[i] < 0) & (R[i] < low)) | far;
      pg[i] = far ? -dual * A[i] : (held > free ? held : free);
      C[i] = clipped ? 1.f : 0.f;
      slope[i] = clipped ? 0.f : free;
    }
  }

  fill(column[tis], n, 1.f), fill(column[tis_clip], n, 0.f);
  if (a.behaviour) {
    const float *b = a.behaviour + at, cap = a.tis_cap;
    float *first = column[k1], *third = column[k3], *far = column[mismatch], *factor = column[tis], *capped = column[tis_clip];
    for (int i = 0; i < n; ++i) first[i] = b[i] - old[i];
    for (int i = 0; i < n; ++i) third[i] = exponential_rest(-first[i]);
    for (int i = 0; i < n; ++i) far[i] = exponential(absolute(first[i]));
    if (cap > 0)
      for (int i = 0; i < n; ++i) {
        const float e = exponential(-first[i]), t = e > cap ? cap : e;
        factor[i] = t;
        capped[i] = e > cap ? 1.f : 0.f;
        pg[i] *= t, slope[i] *= t;
      }
  } else {
    fill(column[k1], n, 0.f), fill(column[k3], n, 0.f), fill(column[mismatch], n, 1.f);
  }
  float* gradient = slope_out ? slope_out + at : a.grad_logp + at;
  for (int i = 0; i < n; ++i) gradient[i] = w[i] == 0 ? 0.f : w[i] * slope[i];
  if (slope_out) fill(a.grad_logp + at, n, 0.f);

  if (a.ref_logp) {
    const float *ref = a.ref_logp + at, coef = a.kl_coef;
    float *first = column[kl_k1], *third = column[kl_k3], *grad = a.grad_logp + at, value[kLossBlock], toward[kLossBlock];
    for (int i = 0; i < n; ++i) first[i] = lp[i] - ref[i];
    for (int i = 0; i < n; ++i) third[i] = exponential_rest(-first[i]);
    if (coef != 0) {
      if (a.kl == M2RL_K1)
        for (int i = 0; i < n; ++i) value[i] = first[i], toward[i] = 1;
      else if (a.kl == M2RL_K2)
        for (int i = 0; i < n; ++i) value[i] = first[i] * first[i] * 0.5f, toward[i] = first[i];
      else
        for (int i = 0; i < n; ++i) value[i] = third[i], toward[i] = first[i] - third[i];  // 1 - e^d, d = -first
      for (int i = 0; i < n; ++i) pg[i] += coef * value[i];
      for (int i = 0; i < n; ++i) grad[i] += w[i] == 0 ? 0.f : w[i] * coef * toward[i];
    }
  } else {
    fill(column[kl_k1], n, 0.f), fill(column[kl_k3], n, 0.f);
  }

  if (a.entropy) {
    std::memcpy(column[entropy], a.entropy + at, n * sizeof(float));
    if (a.grad_entropy) {
      const float *h = column[entropy], coef = a.entropy_coef;
      float* grad = a.grad_entropy + at;
      for (int i = 0; i < n; ++i) pg[i] -= coef * h[i];
      for (int i = 0; i < n; ++i) grad[i] = w[i] * -coef;
    }
  } else {
    fill(column[entropy], n, 0.f);
  }
  fill(column[count], n, 1.f);
  std::memcpy(column[weight], w, n * sizeof(float));
  std::memcpy(column[logp], lp, n * sizeof(float));
  float *pulls = column[pull], *losses = column[loss];
  for (int i = 0; i < n; ++i) pulls[i] = w[i] * absolute(A[i]);
  for (int i = 0; i < n; ++i) losses[i] = w[i] == 0 ? 0.f : w[i] * pg[i];
}

float sum(const float* x, int n) {
  float lane[16] = {};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) lane[l] += x[i + l];
  float total = 0;
  for (; i < n; ++i) total += x[i];
  for (int l = 0; l < 16; ++l) total += lane[l];
  return total;
}

float one(float x) { return exponential(x); }

}  // namespace

#define M2RL_JOIN(a, b) a##b
#define M2RL_TABLE(isa) M2RL_JOIN(policy_loss_blocks_, isa)
extern const PolicyLossBlocks M2RL_TABLE(M2RL_ISA);
const PolicyLossBlocks M2RL_TABLE(M2RL_ISA) = {tokens, sum, one};

}  // namespace m2rl
