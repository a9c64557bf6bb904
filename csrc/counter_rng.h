// Counter-based random numbers: Philox4x32-7 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), the same bits in C++, CUDA and the numpy oracle of the tests.
//
//   block(key, expert, c) = philox4x32_7(counter = (c low, c high, expert, stream), key) = four 32-bit words = eight 16-bit lanes
//   element i of a tensor:  c = (i >> 7) * 16 + (i & 15),   lane j = (i >> 4) & 7,
//                           draw(i) = (word[j & 3] >> (j < 4 ? 0 : 16)) & 0xffff
//   keep(i, p)            = 32-bit draw < round(p * 2^32), where the high half is draw(i) of stream 0 and the low half, looked at
//                           only when the high halves are equal, is draw(i) of stream 1
//
// So 128 consecutive elements share 16 blocks, lane by lane: sixteen neighbours are one vector, no transposition is needed,
// and p is exact to 2^-32 at the price of 16-bit draws. A draw depends on (key, expert, i) and on nothing else.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define M2RL_HD __host__ __device__ __forceinline__
#else
#define M2RL_HD inline
#endif

namespace m2rl {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Philox4 { uint32_t word[4]; };

static M2RL_HD Philox4 philox4x32_7(uint64_t counter, uint32_t expert, uint32_t stream, uint64_t key) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32), x2 = expert, x3 = stream;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0, p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    uint32_t y0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0, y2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x1 = static_cast<uint32_t>(p1), x3 = static_cast<uint32_t>(p0), x0 = y0, x2 = y2;
  }
  return {{x0, x1, x2, x3}};
}

static M2RL_HD uint32_t draw16(uint64_t index, uint32_t expert, uint32_t stream, uint64_t key) {
  Philox4 block = philox4x32_7((index >> 7) * 16 + (index & 15), expert, stream, key);
  uint32_t lane = static_cast<uint32_t>(index >> 4) & 7u;
  return (block.word[lane & 3u] >> (lane < 4 ? 0 : 16)) & 0xffffu;
}

// threshold = round(p * 2^32) in [0, 2^32].
static M2RL_HD bool keep_element(uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold) {
  uint32_t high = draw16(index, expert, 0, key), bar = static_cast<uint32_t>(threshold >> 16);
  if (high != bar) return high < bar;
  return draw16(index, expert, 1, key) < (threshold & 0xffffu);
}

}  // namespace m2rl
