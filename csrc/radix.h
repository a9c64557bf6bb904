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

static M2RL_HD float from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even. NaN stays NaN.
static M2RL_HD uint16_t to_bf16(float x) {
  uint32_t u = float_bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  uint32_t nan = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static M2RL_HD float from_f16(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  float scaled = bits_float(magnitude << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent bias from 15 to 127, subnormals too
  uint32_t special = 0x7f800000u | (magnitude << 13);
  return bits_float(sign | (magnitude >= 0x7c00u ? special : float_bits(scaled)));
}

// Round to nearest even; 65520 and above become infinity, as IEEE says.
static M2RL_HD uint16_t to_f16(float x) {
  uint32_t u = float_bits(x), a = u & 0x7fffffffu;
  uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  uint32_t tiny = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;  // adding 0.5 rounds at 2^-24, the step of float16 subnormals
  uint32_t magnitude = a < 0x38800000u ? tiny : normal;
  magnitude = a >= 0x47800000u ? (a > 0x7f800000u ? 0x7e00u : 0x7c00u) : magnitude;
  return static_cast<uint16_t>(magnitude | ((u >> 16) & 0x8000u));
}

}  // namespace m2rl
