// Magnitudes as integers, the tie rule, and storage conversions: shared by C++ and CUDA.
//
//   key(x) = the 31 low bits of float32 x, so key(a) < key(b) iff |a| < |b|
//   the k largest keys with ties broken by the lowest flat index are exactly { i : key > t, or key == t and i <= cut }
#pragma once
#include <cstdint>
#include <cstring>

#include "counter_rng.h"

namespace m2rl {

static M2RL_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

static M2RL_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

static M2RL_HD uint32_t magnitude_key(float x) { return float_bits(x) & 0x7fffffffu; }

static M2RL_HD bool kept_by_magnitude(uint32_t key, int64_t index, uint32_t threshold, int64_t cut) {
  return key > threshold || (key == threshold && index <= cut);
}

// The same bits as another type of the same size.
template <typename To, typename From>
static M2RL_HD To bits_as(const From& from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Storage conversions, written for one float F with its word U, and for vectors of them.

static M2RL_HD float from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even. NaN stays NaN. The result sits in the low half of the word.
template <typename U, typename F>
static M2RL_HD U bf16_word(const F& x) {
  const U u = bits_as<U>(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = (u >> 16) | 0x40u;
  return (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}
static M2RL_HD uint16_t to_bf16(float x) { return static_cast<uint16_t>(bf16_word<uint32_t>(x)); }

template <typename F, typename U>
static M2RL_HD F f16_float(const U& word) {
  const U sign = (word & 0x8000u) << 16, magnitude = word & 0x7fffu;
  const F scaled = bits_as<F>(magnitude << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent bias from 15 to 127, subnormals too
  const U special = 0x7f800000u | (magnitude << 13), normal = bits_as<U>(scaled);
  return bits_as<F>(sign | (magnitude >= 0x7c00u ? special : normal));
}
static M2RL_HD float from_f16(uint16_t h) { return f16_float<float>(static_cast<uint32_t>(h)); }

// Round to nearest even; 65520 and above become infinity, as IEEE says.
template <typename U, typename F>
static M2RL_HD U f16_word(const F& x) {
  const U u = bits_as<U>(x), a = u & 0x7fffffffu, infinity = (u & 0u) + 0x7c00u, nan = infinity + 0x200u;
  const U normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const F shifted = bits_as<F>(a) + 0.5f;  // adding 0.5 rounds at 2^-24, the step of float16 subnormals
  const U tiny = bits_as<U>(shifted) - 0x3f000000u, special = a > 0x7f800000u ? nan : infinity;
  U magnitude = a < 0x38800000u ? tiny : normal;
  magnitude = a >= 0x47800000u ? special : magnitude;
  return magnitude | ((u >> 16) & 0x8000u);
}
static M2RL_HD uint16_t to_f16(float x) { return static_cast<uint16_t>(f16_word<uint32_t>(x)); }

}  // namespace m2rl
