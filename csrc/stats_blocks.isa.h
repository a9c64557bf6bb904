// Compiled once per instruction set (see CMakeLists.txt). Plain loops that the compiler vectorises; the same order of additions
// in every variant.
#include <cstdint>
#include <cstring>

#include "radix.h"
#include "stats_blocks.h"

namespace m2rl {
namespace {

constexpr int kStatLanes = 16;

void delta(const float* b, float* x, int n, uint64_t* nonzero, uint64_t* negative, int64_t* changed, double* l1, double* largest,
           int64_t* exponents) {
  int64_t different = 0;
  for (int i = 0; i < n; ++i) different += to_bf16(x[i]) != to_bf16(b[i]);
  *changed += different;
  for (int i = 0; i < n; ++i) x[i] -= b[i];
  float sum[kStatLanes] = {}, most[kStatLanes] = {};
  int i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes)
    for (int l = 0; l < kStatLanes; ++l) {
      const float a = bits_float(float_bits(x[i + l]) & 0x7fffffffu);
      sum[l] += a;
      most[l] = a > most[l] ? a : most[l];
    }
  for (; i < n; ++i) {
    const float a = bits_float(float_bits(x[i]) & 0x7fffffffu);
    sum[i % kStatLanes] += a;
    most[i % kStatLanes] = a > most[i % kStatLanes] ? a : most[i % kStatLanes];
  }
  for (int l = 0; l < kStatLanes; ++l) {
    *l1 += sum[l];
    *largest = most[l] > *largest ? most[l] : *largest;
  }
  for (int w = 0; w * 64 < n; ++w) {
    uint64_t z = 0, s = 0;
    const int m = n - w * 64 < 64 ? n - w * 64 : 64;
    for (int j = 0; j < m; ++j) {
      const float d = x[w * 64 + j];
      z |= static_cast<uint64_t>(d != 0) << j;
      s |= static_cast<uint64_t>(d < 0) << j;
    }
    nonzero[w] = z;
    negative[w] = s;
  }
  int64_t zeros = 0;  // most deltas: counted apart, so that no single bin is written again and again
  for (i = 0; i < n; ++i) zeros += (float_bits(x[i]) & 0x7f800000u) == 0;
  exponents[0] += zeros;
  if (zeros < n)
    for (i = 0; i < n; ++i) {
      const uint32_t e = (float_bits(x[i]) >> 23) & 0xffu;
      if (e) ++exponents[e];
    }
}

double dot(const float* a, const float* c, int n) {
  float sum[kStatLanes] = {};
  int i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes)
    for (int l = 0; l < kStatLanes; ++l) sum[l] += a[i + l] * c[i + l];
  for (; i < n; ++i) sum[i % kStatLanes] += a[i] * c[i];
  double total = 0;
  for (int l = 0; l < kStatLanes; ++l) total += sum[l];
  return total;
}

void overlap(const uint64_t* p, const uint64_t* q, const uint64_t* s, const uint64_t* t, int words, int64_t* both, int64_t* agree) {
  int64_t b = 0, g = 0;
  for (int w = 0; w < words; ++w) {
    const uint64_t common = p[w] & q[w];
    b += __builtin_popcountll(common);
    g += __builtin_popcountll(common & ~(s[w] ^ t[w]));
  }
  *both += b;
  *agree += g;
}

void add_signed(const float* x, int n, const uint32_t* signs, int64_t shift, int64_t size, double* sum) {
  float signed_x[kStatsBlock];
  for (int64_t from = 0; from < n; from += kStatsBlock) {
    const int m = n - from < kStatsBlock ? static_cast<int>(n - from) : kStatsBlock;
    for (int j = 0; j < m; ++j)
      signed_x[j] = bits_float(float_bits(x[from + j]) ^ ((signs[(from + j) / 32] >> ((from + j) % 32)) << 31));
    const int64_t start = (from + shift) % size, head = m < size - start ? m : size - start;
    for (int64_t j = 0; j < head; ++j) sum[start + j] += signed_x[j];
    for (int64_t j = head; j < m; ++j) sum[j - head] += signed_x[j];
  }
}

}  // namespace

#define M2RL_JOIN(a, b) a##b
#define M2RL_TABLE(isa) M2RL_JOIN(stats_blocks_, isa)
extern const StatsBlocks M2RL_TABLE(M2RL_ISA);
const StatsBlocks M2RL_TABLE(M2RL_ISA) = {delta, dot, overlap, add_signed};

}  // namespace m2rl
