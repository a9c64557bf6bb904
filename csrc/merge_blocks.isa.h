// Compiled once per instruction set (see CMakeLists.txt). Plain loops that the compiler vectorises, except
// where a loop over experts or a compression is written out.
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(M2RL_ISA_avx2) || defined(M2RL_ISA_avx512)
#include <immintrin.h>
#endif

#include "lanes.h"
#include "merge_blocks.h"
#include "ops.h"
#include "radix.h"

namespace m2rl {
namespace {

template <typename T>
inline T load_word(const void* base, int i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(base) + static_cast<int64_t>(i) * sizeof(T), sizeof(T));
  return value;
}

struct F32 {
  using Word = uint32_t;
  static constexpr uint32_t kInf = 0x7f800000u, kMagnitude = 0x7fffffffu;
  static float to_float(uint32_t w) { return bits_float(w); }
  static uint32_t from_float(float x) { return float_bits(x); }
};
struct Bf16 {
  using Word = uint16_t;
  static constexpr uint32_t kInf = 0x7f80u, kMagnitude = 0x7fffu;
  static float to_float(uint16_t w) { return from_bf16(w); }
  static uint16_t from_float(float x) { return to_bf16(x); }
};
struct F16 {
  using Word = uint16_t;
  static constexpr uint32_t kInf = 0x7c00u, kMagnitude = 0x7fffu;
  static float to_float(uint16_t w) { return from_f16(w); }
  static uint16_t from_float(float x) { return to_f16(x); }
};

template <typename R>
inline float rounded(float x) {
  return R::to_float(R::from_float(x));
}
template <>
inline float rounded<F32>(float x) {
  return x;
}

template <typename F>
inline auto with_dtype(int dtype, F&& f) {
  switch (dtype) {
    case M2RL_BF16: return f(Bf16{});
    case M2RL_F16: return f(F16{});
    default: return f(F32{});
  }
}

// How many words are NaN or infinite: rarely any, so first whether there is one.
template <typename S>
inline int64_t count_nonfinite(const void* src, int n) {
  using Word = typename S::Word;
  Word largest = 0;
  for (int i = 0; i < n; ++i) {
    const Word m = load_word<Word>(src, i) & static_cast<Word>(S::kMagnitude);
    largest = largest > m ? largest : m;
  }
  if (largest < S::kInf) return 0;
  int64_t count = 0;
  for (int i = 0; i < n; ++i) count += (load_word<Word>(src, i) & S::kMagnitude) >= S::kInf;
  return count;
}

// body(i) for all i in order. Meanwhile the next n elements of the same stream come nearer, a line at a time: the hardware
// prefetcher loses its way among K + 1 streams.
template <typename Word, typename F>
inline void streamed(const void* src, int n, F&& body) {
  constexpr int kLine = 64 / sizeof(Word);
  const char* ahead = static_cast<const char*>(src) + static_cast<int64_t>(n) * sizeof(Word);
  int i = 0;
  for (; i + kLine <= n; i += kLine, ahead += 64) {
    __builtin_prefetch(ahead);
    for (int j = i; j < i + kLine; ++j) body(j);
  }
  for (; i < n; ++i) body(i);
}

int64_t load(const void* src, int dtype, int n, float* __restrict dst) {
  return with_dtype(dtype, [=](auto s) -> int64_t {
    using S = decltype(s);
    streamed<typename S::Word>(src, n, [=](int i) { dst[i] = S::to_float(load_word<typename S::Word>(src, i)); });
    return count_nonfinite<S>(src, n);
  });
}

int64_t load_delta(const void* src, int dtype, int n, const float* __restrict b, int round, float* __restrict d, int64_t* nonzero) {
  return with_dtype(dtype, [=](auto s) -> int64_t {
    using S = decltype(s);
    return with_dtype(round, [=](auto r) -> int64_t {
      using R = decltype(r);
      uint32_t moved = 0;
      streamed<typename S::Word>(src, n, [&](int i) {
        const float delta = rounded<R>(S::to_float(load_word<typename S::Word>(src, i)) - b[i]);
        moved += delta != 0.0f;
        d[i] = delta;
      });
      *nonzero += moved;
      return count_nonfinite<S>(src, n);
    });
  });
}

int64_t store(const float* __restrict v, int n, int dtype, void* dst) {
  return with_dtype(dtype, [=](auto s) -> int64_t {
    using S = decltype(s);
    using Word = typename S::Word;
    Word words[kBlock];
    for (int i = 0; i < n; ++i) words[i] = S::from_float(v[i]);
    std::memcpy(dst, words, static_cast<size_t>(n) * sizeof(Word));
    return count_nonfinite<S>(words, n);
  });
}

template <bool kAtoms>
void bracket_keys(const float* __restrict d, int n, uint32_t lo, uint32_t hi, uint32_t* inside, BracketCount* count) {
  const uint32_t top = hi + 1, bottom = lo - 1;
  uint32_t above = 0, above_top = 0, from_low = 0, from_bottom = 0;
  int i = 0;
  if (inside == nullptr) {
    for (; i < n; ++i) {
      const uint32_t key = magnitude_key(d[i]);
      above += key > hi, from_low += key >= lo;
      if (kAtoms) above_top += key > top, from_bottom += key >= bottom;
    }
  }
#if defined(M2RL_ISA_avx512)
  auto wide = [](uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); };
  const __m512i magnitude = wide(0x7fffffffu), v_lo = wide(lo), v_hi = wide(hi), v_top = wide(top), v_bottom = wide(bottom);
  for (; i + 16 <= n; i += 16) {
    const __m512i key = _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(d + i)), magnitude);
    const __mmask16 over = _mm512_cmpgt_epu32_mask(key, v_hi), low = _mm512_cmpge_epu32_mask(key, v_lo);
    // compress in the register, then a full store: the compressing store is microcoded on Zen 4
    _mm512_storeu_si512(inside, _mm512_maskz_compress_epi32(_kandn_mask16(over, low), key));
    const uint32_t n_over = static_cast<uint32_t>(__builtin_popcount(over)), n_low = static_cast<uint32_t>(__builtin_popcount(low));
    inside += n_low - n_over;  // lo <= hi + 1
    above += n_over, from_low += n_low;
    if (kAtoms) {
      above_top += static_cast<uint32_t>(__builtin_popcount(_mm512_cmpgt_epu32_mask(key, v_top)));
      from_bottom += static_cast<uint32_t>(__builtin_popcount(_mm512_cmpge_epu32_mask(key, v_bottom)));
    }
  }
#elif defined(M2RL_ISA_avx2)
  auto reach = [](__m256i key, uint32_t bar) {  // key >= bar, unsigned
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(key, _mm256_set1_epi32(static_cast<int>(bar))), key))));
  };
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (; i + 8 <= n; i += 8) {
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(d + i)), magnitude);
    const unsigned over = reach(key, top), low = reach(key, lo);
    above += static_cast<uint32_t>(__builtin_popcount(over)), from_low += static_cast<uint32_t>(__builtin_popcount(low));
    for (unsigned m = low & ~over; m != 0; m &= m - 1) *inside++ = magnitude_key(d[i + __builtin_ctz(m)]);
    if (kAtoms) {
      above_top += static_cast<uint32_t>(__builtin_popcount(reach(key, top + 1)));
      from_bottom += static_cast<uint32_t>(__builtin_popcount(reach(key, bottom)));
    }
  }
#endif
  for (; i < n; ++i) {
    const uint32_t key = magnitude_key(d[i]);
    *inside = key;
    inside += (key >= lo) & (key <= hi);
    above += key > hi, from_low += key >= lo;
    if (kAtoms) above_top += key > top, from_bottom += key >= bottom;
  }
  count->above += above, count->above_top += above_top, count->from_low += from_low, count->from_bottom += from_bottom;
}

void bracket(const float* d, int n, uint32_t lo, uint32_t hi, bool atoms, uint32_t* inside, BracketCount* count) {
  if (atoms) bracket_keys<true>(d, n, lo, hi, inside, count);
  else bracket_keys<false>(d, n, lo, hi, inside, count);
}

void keep_above(float* __restrict d, int n, uint32_t threshold, bool invert) {
  if (invert) {
    for (int i = 0; i < n; ++i) d[i] = magnitude_key(d[i]) >= threshold ? 0.0f : d[i];
  } else {
    for (int i = 0; i < n; ++i) d[i] = magnitude_key(d[i]) >= threshold ? d[i] : 0.0f;
  }
}

void keep_where(float* __restrict d, const float* __restrict v, int n, uint32_t threshold) {
  for (int i = 0; i < n; ++i) d[i] = magnitude_key(v[i]) >= threshold ? d[i] : 0.0f;
}

// Sixteen Philox blocks at once: counters c..c+15 are sixteen lanes of four word vectors. In the wide versions every 32-bit word
// sits in the low half of a 64-bit lane; the high half is rubbish, which the 32x32 multiplication does not look at.
#if defined(M2RL_ISA_avx512)
inline void philox16(uint64_t counter, uint32_t expert, uint32_t stream, uint64_t key, uint32_t (*__restrict out)[16]) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1), ramp = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i low = _mm512_set1_epi64(static_cast<int64_t>(counter & 0xffffffffu)), high = _mm512_set1_epi64(static_cast<int64_t>(counter >> 32));
  __m512i x0[2] = {_mm512_add_epi64(low, ramp), _mm512_add_epi64(low, _mm512_add_epi64(ramp, _mm512_set1_epi64(8)))}, x1[2] = {high, high};
  __m512i x2[2], x3[2];
  for (int h = 0; h < 2; ++h) x2[h] = _mm512_set1_epi64(expert), x3[h] = _mm512_set1_epi64(stream);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const __m512i v0 = _mm512_set1_epi64(k0), v1 = _mm512_set1_epi64(k1);
    for (int h = 0; h < 2; ++h) {
      __m512i p0 = _mm512_mul_epu32(m0, x0[h]), p1 = _mm512_mul_epu32(m1, x2[h]);
      x0[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1[h], v0, 0x96);
      x2[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3[h], v1, 0x96);
      x1[h] = p1, x3[h] = p0;
    }
  }
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  _mm512_storeu_si512(out[0], _mm512_permutex2var_epi32(x0[0], evens, x0[1]));
  _mm512_storeu_si512(out[1], _mm512_permutex2var_epi32(x1[0], evens, x1[1]));
  _mm512_storeu_si512(out[2], _mm512_permutex2var_epi32(x2[0], evens, x2[1]));
  _mm512_storeu_si512(out[3], _mm512_permutex2var_epi32(x3[0], evens, x3[1]));
}
#elif defined(M2RL_ISA_avx2)
inline __m256i low_halves(__m256i a, __m256i b) {  // eight words, in order
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  return _mm256_blend_epi32(_mm256_permutevar8x32_epi32(a, order), _mm256_permutevar8x32_epi32(b, order), 0xF0);
}

inline void philox16(uint64_t counter, uint32_t expert, uint32_t stream, uint64_t key, uint32_t (*__restrict out)[16]) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1), ramp = _mm256_setr_epi64x(0, 1, 2, 3);
  const int64_t low = static_cast<int64_t>(counter & 0xffffffffu), high = static_cast<int64_t>(counter >> 32);
  __m256i x0[4], x1[4], x2[4], x3[4];
  for (int h = 0; h < 4; ++h) {
    x0[h] = _mm256_add_epi64(_mm256_set1_epi64x(low + 4 * h), ramp);
    x1[h] = _mm256_set1_epi64x(high), x2[h] = _mm256_set1_epi64x(expert), x3[h] = _mm256_set1_epi64x(stream);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const __m256i v0 = _mm256_set1_epi64x(k0), v1 = _mm256_set1_epi64x(k1);
    for (int h = 0; h < 4; ++h) {
      __m256i p0 = _mm256_mul_epu32(m0, x0[h]), p1 = _mm256_mul_epu32(m1, x2[h]);
      x0[h] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), x1[h]), v0);
      x2[h] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), x3[h]), v1);
      x1[h] = p1, x3[h] = p0;
    }
  }
  for (int h = 0; h < 2; ++h) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[0] + 8 * h), low_halves(x0[2 * h], x0[2 * h + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[1] + 8 * h), low_halves(x1[2 * h], x1[2 * h + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[2] + 8 * h), low_halves(x2[2 * h], x2[2 * h + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[3] + 8 * h), low_halves(x3[2 * h], x3[2 * h + 1]));
  }
}
#else
inline void philox16(uint64_t counter, uint32_t expert, uint32_t stream, uint64_t key, uint32_t (*__restrict out)[16]) {
  for (uint64_t q = 0; q < 16; ++q) {
    Philox4 block = philox4x32_7(counter + q, expert, stream, key);
    for (int w = 0; w < 4; ++w) out[w][q] = block.word[w];
  }
}
#endif

void keep_random(float* d, int n, uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold) {
  const uint32_t bar = static_cast<uint32_t>(threshold >> 16), fine = static_cast<uint32_t>(threshold & 0xffffu);
  for (int i = 0; i < n;) {
    uint64_t span = (index + static_cast<uint64_t>(i)) >> 7;
    int from = static_cast<int>((index + static_cast<uint64_t>(i)) & 127), upto = from + (n - i) < 128 ? from + (n - i) : 128;
    uint32_t words[4][16];
    philox16(span * 16, expert, 0, key, words);
    float* at = d + i - from;
    uint32_t tied = 0;
#if defined(M2RL_ISA_avx512)
    if (from == 0 && upto == 128) {
      const __m512i limit = _mm512_set1_epi32(static_cast<int>(bar)), low = _mm512_set1_epi32(0xffff);
      __mmask16 equal = 0;
      for (int w = 0; w < 4; ++w) {
        const __m512i word = _mm512_loadu_si512(words[w]), first = _mm512_and_si512(word, low), second = _mm512_srli_epi32(word, 16);
        float *a = at + 16 * w, *b = a + 64;
        equal |= _mm512_cmpeq_epi32_mask(first, limit) | _mm512_cmpeq_epi32_mask(second, limit);
        _mm512_storeu_ps(a, _mm512_maskz_loadu_ps(_mm512_cmple_epu32_mask(first, limit), a));
        _mm512_storeu_ps(b, _mm512_maskz_loadu_ps(_mm512_cmple_epu32_mask(second, limit), b));
      }
      tied = equal;
    } else
#endif
    if (from == 0 && upto == 128) {
      for (int lane = 0; lane < 8; ++lane) {
        const uint32_t* word = words[lane & 3];
        const int shift = lane < 4 ? 0 : 16;
        float* __restrict row = at + 16 * lane;
        for (int q = 0; q < 16; ++q) {
          uint32_t draw = (word[q] >> shift) & 0xffffu;
          tied |= draw == bar;
          row[q] = draw <= bar ? row[q] : 0.0f;
        }
      }
    } else {
      for (int e = from; e < upto; ++e) {
        uint32_t draw = (words[(e >> 4) & 3][e & 15] >> (e < 64 ? 0 : 16)) & 0xffffu;
        tied |= draw == bar;
        at[e] = draw <= bar ? at[e] : 0.0f;
      }
    }
    if (tied) {  // 1 element in 65536: the low half decides
      for (int e = from; e < upto; ++e) {
        uint32_t draw = (words[(e >> 4) & 3][e & 15] >> (e < 64 ? 0 : 16)) & 0xffffu;
        if (draw == bar && draw16(span * 128 + static_cast<uint64_t>(e), expert, 1, key) >= fine) at[e] = 0.0f;
      }
    }
    i += upto - from;
  }
}

void keep_factors(float* __restrict d, int n, const float* __restrict factor) {
  for (int i = 0; i < n; ++i) d[i] = factor[i] != 0.0f ? d[i] * factor[i] : 0.0f;
}

void scale(float* __restrict d, int n, float factor, int round) {
  with_dtype(round, [=](auto r) {
    for (int i = 0; i < n; ++i) d[i] = rounded<decltype(r)>(d[i] * factor);
  });
}

void accumulate(float* __restrict s, const float* __restrict d, int n, float w, int round) {
  with_dtype(round, [=](auto r) {
    for (int i = 0; i < n; ++i) s[i] += rounded<decltype(r)>(w * d[i]);
  });
}

void finish(float* __restrict v, const float* __restrict num, const float* __restrict b, int n, float lambda, int round) {
  with_dtype(round, [=](auto r) {
    using R = decltype(r);
    for (int i = 0; i < n; ++i) v[i] = rounded<R>(b[i] + rounded<R>(lambda * rounded<R>(num[i])));
  });
}

template <typename R>
inline Lanes rounded(Lanes x) {
  if (std::is_same<R, Bf16>::value) return bits_as<Lanes>(bf16_word<Words>(x) << 16);
  if (std::is_same<R, F16>::value) return f16_float<Lanes>(f16_word<Words>(x));
  return x;
}

template <typename R>
inline void conclude(float* v, Lanes num, Lanes den, const float* b, const Combine& c) {
  if (c.normalize) {
    const Lanes total = rounded<R>(den), size = total < 0.0f ? -total : total, substitute = c.den_substitute - Lanes{};
    num = rounded<R>(rounded<R>(num) / ((size >= c.den_floor) & (size > 0.0f) ? total : substitute));
  }
  if (c.add_base) num = rounded<R>(load_lanes(b) + rounded<R>(c.lambda * rounded<R>(num)));
  std::memcpy(v, &num, sizeof num);
}

void combine_sum(float* __restrict v, const float* const* d, const float* __restrict b, int n, const Combine& c) {
  with_dtype(c.round, [=, &c](auto r) {
    using R = decltype(r);
    for (int i = 0; i < n; i += kLanes) {
      Lanes num = {};
      for (int k = 0; k < c.experts; ++k) num += rounded<R>(c.weight[k] * load_lanes(d[k] + i));
      conclude<R>(v + i, num, c.divisor - Lanes{}, b + i, c);
    }
  });
}

void combine_elect(float* __restrict v, const float* const* d, const float* __restrict b, int n, const Combine& c) {
  with_dtype(c.round, [=, &c](auto r) {
    using R = decltype(r);
    const Lanes none = {}, one = 1.0f - none, zero = static_cast<float>(c.zero_sign) - none;
    for (int i = 0; i < n; i += kLanes) {
      Lanes s = {}, num = {}, den = {};
      for (int k = 0; k < c.experts; ++k) s += rounded<R>(c.elect[k] * load_lanes(d[k] + i));
      s = s > 0.0f ? one : (s < 0.0f ? -one : zero);
      for (int k = 0; k < c.experts; ++k) {
        const Lanes x = load_lanes(d[k] + i);
        const auto same = x * s > 0.0f;  // s is +1, -1 or 0: the product is exact
        num += same ? rounded<R>(c.weight[k] * x) : none;
        den += same ? c.weight[k] - none : none;
      }
      conclude<R>(v + i, num, den, b + i, c);
    }
  });
}

void variance(float* __restrict v, const float* const* d, int experts, int n) {
  const float share = static_cast<float>(experts), inverse = 1.0f / share;
  const bool exact = (experts & (experts - 1)) == 0;  // a power of two: the product is the quotient, bit for bit
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes mean = {}, total = {};
    for (int k = 0; k < experts; ++k) mean += load_lanes(d[k] + i);
    if (exact) mean *= inverse;
    else mean /= share;
    for (int k = 0; k < experts; ++k) {
      const Lanes x = load_lanes(d[k] + i) - mean;
      total += x * x;
    }
    if (exact) total *= inverse;
    else total /= share;
    std::memcpy(v + i, &total, sizeof total);
  }
  for (; i < n; ++i) {
    float mean = 0.0f, total = 0.0f;
    for (int k = 0; k < experts; ++k) mean += d[k][i];
    mean /= share;
    for (int k = 0; k < experts; ++k) total += (d[k][i] - mean) * (d[k][i] - mean);
    v[i] = total / share;
  }
}

void ram(float* __restrict num, const float* const* d, int experts, int n, float epsilon, const float* scale_k, const float* weight,
         int64_t* unique, int64_t* shared) {
  float changed[kBlock], total[kBlock], alone[kBlock], mass[kBlock];
  for (int i = 0; i < n; ++i) changed[i] = total[i] = alone[i] = mass[i] = 0.0f;
  for (int k = 0; k < experts; ++k) {
    const float* __restrict dk = d[k];
    const float w = weight[k], s = scale_k[k];
    for (int i = 0; i < n; ++i) {
      bool moved = (dk[i] < 0.0f ? -dk[i] : dk[i]) > epsilon;
      changed[i] += moved ? 1.0f : 0.0f;
      total[i] += moved ? w * dk[i] : 0.0f;
      mass[i] += moved ? w : 0.0f;
      alone[i] += moved ? s * dk[i] : 0.0f;
    }
  }
  for (int k = 0; k < experts; ++k) {
    const float* __restrict dk = d[k];
    uint32_t one = 0, more = 0;
    for (int i = 0; i < n; ++i) {
      bool moved = (dk[i] < 0.0f ? -dk[i] : dk[i]) > epsilon;
      one += moved & (changed[i] == 1.0f);
      more += moved & (changed[i] > 1.0f);
    }
    unique[k] += one;
    shared[k] += more;
  }
  for (int i = 0; i < n; ++i) num[i] = changed[i] > 1.0f ? total[i] / (mass[i] == 0.0f ? 1.0f : mass[i]) : alone[i];
}

void sum_abs(const float* __restrict d, int n, double* __restrict lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int q = 0; q < kLanes; ++q) lanes[q] += static_cast<double>(bits_float(magnitude_key(d[i + q])));
  for (int q = 0; i < n; ++i, ++q) lanes[q] += static_cast<double>(bits_float(magnitude_key(d[i])));
}

void sum_product(const float* __restrict a, const float* __restrict b, int n, double* __restrict lanes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int q = 0; q < kLanes; ++q) lanes[q] += static_cast<double>(a[i + q]) * static_cast<double>(b[i + q]);
  for (int q = 0; i < n; ++i, ++q) lanes[q] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
}

int64_t count_nonzero(const float* __restrict d, int n) {
  uint32_t count = 0;
  for (int i = 0; i < n; ++i) count += d[i] != 0.0f;
  return count;
}

int64_t count_different(const float* __restrict a, const float* __restrict b, int n) {
  uint32_t count = 0;
  for (int i = 0; i < n; ++i) count += a[i] != b[i];
  return count;
}

int64_t sum_sign(const float* __restrict s, int n) {
  int32_t total = 0;
  for (int i = 0; i < n; ++i) total += (s[i] > 0.0f) - (s[i] < 0.0f);
  return total;
}

uint64_t checksum(const void* bytes, int64_t size, uint64_t first) {
  uint64_t total = 0;
  const int64_t words = size / 8;
  const char* p = static_cast<const char*>(bytes);
  for (int64_t i = 0; i < words; ++i) {
    uint64_t w;
    std::memcpy(&w, p + 8 * i, 8);
    uint32_t a = (static_cast<uint32_t>(first) + static_cast<uint32_t>(i)) * 0x9E3779B9u + 0x7F4A7C15u;
    uint32_t b = a ^ 0x85EBCA6Bu;
    total += static_cast<uint64_t>(static_cast<uint32_t>(w) + a) * static_cast<uint64_t>(static_cast<uint32_t>(w >> 32) + b) + w;
  }
  if (size % 8) {
    uint64_t w = 0;
    std::memcpy(&w, p + 8 * words, static_cast<size_t>(size % 8));
    uint32_t a = (static_cast<uint32_t>(first) + static_cast<uint32_t>(words)) * 0x9E3779B9u + 0x7F4A7C15u;
    uint32_t b = a ^ 0x85EBCA6Bu;
    total += static_cast<uint64_t>(static_cast<uint32_t>(w) + a) * static_cast<uint64_t>(static_cast<uint32_t>(w >> 32) + b) + w;
  }
  return total;
}

}  // namespace

#define M2RL_JOIN(a, b) a##b
#define M2RL_TABLE(isa) M2RL_JOIN(merge_blocks_, isa)
extern const MergeBlocks M2RL_TABLE(M2RL_ISA);
const MergeBlocks M2RL_TABLE(M2RL_ISA) = {
    load,   load_delta, store,  bracket,  keep_above, keep_where, keep_random, keep_factors, scale, accumulate,
    combine_sum, combine_elect, finish, variance, ram, sum_abs, sum_product, count_nonzero, count_different, sum_sign, checksum};

}  // namespace m2rl
