// The exponential of the CPU kernels, for loops that the compiler vectorises: the same bits in every variant. Everything is static:
// each instruction set compiles its own.
#pragma once
#include <cstdint>
#include <limits>

#include "radix.h"

namespace m2rl {

// e^x to 2 units in the last place, of one float F with its unsigned integer U, or of vectors of them: x = n log 2 + f, a polynomial of
// degree 7 on f (Cephes' coefficients), 2^n in two factors, so that results near both ends of the range are right as well.
template <typename U, typename F>
static inline __attribute__((always_inline)) F exponential_of(const F& x) {
  const F shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer in the low bits of the mantissa
  const F n = shifted - 12582912.0f;
  const F f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const U power = bits_as<U>(shifted) - (0x4b400000u - 256u), half = power >> 1;  // n + 256: unsigned, so that it may wrap
  const U low = (half - 1u) << 23, high = (power - half - 1u) << 23;              // biased by 127: half is n / 2 + 128
  const F scaled = p * bits_as<F>(low) * bits_as<F>(high), none = {}, infinite = none + std::numeric_limits<float>::infinity();
  const F bounded = x < -104.0f ? none : scaled;
  return x > 88.8f ? infinite : bounded;
}

static inline __attribute__((always_inline)) float exponential(float x) { return exponential_of<uint32_t>(x); }

}  // namespace m2rl
