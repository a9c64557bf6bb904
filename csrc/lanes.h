// Sixteen floats, whatever the registers' width: the same sums in every variant. Written out, because the compiler's own version of a
// loop over rows tests at run time whether they overlap, and takes the scalar branch. Everything is static: each instruction set
// compiles its own.
#pragma once
#include <cstdint>
#include <cstring>

namespace m2rl {

constexpr int kLanes = 16;  // partial sums are kept in 16 lanes, then added in lane order
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

static inline Lanes load_lanes(const float* x) {
  Lanes v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

}  // namespace m2rl
