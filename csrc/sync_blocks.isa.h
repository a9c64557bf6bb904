// Compiled once per instruction set (see CMakeLists.txt). Plain loops that the compiler vectorises.
#include <cstdint>
#include <cstring>

#include "ops.h"
#include "radix.h"
#include "sync_blocks.h"

namespace m2rl {
namespace {

template <typename To>
void from_f32(const void* src, void* dst, int64_t n, To&& to) {
  const char* from = static_cast<const char*>(src);
  char* out = static_cast<char*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    float x;
    std::memcpy(&x, from + 4 * i, 4);
    uint16_t y = to(x);
    std::memcpy(out + 2 * i, &y, 2);
  }
}

template <typename From>
void to_f32(const void* src, void* dst, int64_t n, From&& from) {
  const char* in = static_cast<const char*>(src);
  char* out = static_cast<char*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t x;
    std::memcpy(&x, in + 2 * i, 2);
    float y = from(x);
    std::memcpy(out + 4 * i, &y, 4);
  }
}

void convert(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n) {
  if (src_dtype == dst_dtype) {
    std::memcpy(dst, src, n * (src_dtype == M2RL_F32 ? 4 : 2));
  } else if (src_dtype == M2RL_F32) {
    if (dst_dtype == M2RL_BF16) from_f32(src, dst, n, [](float x) { return to_bf16(x); });
    else from_f32(src, dst, n, [](float x) { return to_f16(x); });
  } else if (dst_dtype == M2RL_F32) {
    if (src_dtype == M2RL_BF16) to_f32(src, dst, n, [](uint16_t w) { return from_bf16(w); });
    else to_f32(src, dst, n, [](uint16_t w) { return from_f16(w); });
  } else {  // between the two half precisions
    float part[256];
    for (int64_t i = 0; i < n; i += 256) {
      const int64_t m = n - i < 256 ? n - i : 256;
      convert(static_cast<const char*>(src) + 2 * i, src_dtype, part, M2RL_F32, m);
      convert(part, M2RL_F32, static_cast<char*>(dst) + 2 * i, dst_dtype, m);
    }
  }
}

template <typename Word>
void hash_words(const void* bits, int64_t n, uint64_t first, uint64_t* sum) {
  uint64_t a = 0, b = 0;
  for (int64_t i = 0; i < n; ++i) {
    Word w;
    std::memcpy(&w, static_cast<const char*>(bits) + i * sizeof(Word), sizeof(Word));
    add_hash(first + static_cast<uint64_t>(i), w, a, b);
  }
  sum[0] += a;
  sum[1] += b;
}

void checksum(const void* bits, int size, int64_t n, uint64_t first, uint64_t* sum) {
  if (size == 1) hash_words<uint8_t>(bits, n, first, sum);
  else if (size == 2) hash_words<uint16_t>(bits, n, first, sum);
  else if (size == 4) hash_words<uint32_t>(bits, n, first, sum);
  else hash_words<uint64_t>(bits, n, first, sum);
}

}  // namespace

#define M2RL_JOIN(a, b) a##b
#define M2RL_TABLE(isa) M2RL_JOIN(sync_blocks_, isa)
extern const SyncBlocks M2RL_TABLE(M2RL_ISA);
const SyncBlocks M2RL_TABLE(M2RL_ISA) = {convert, checksum};

}  // namespace m2rl
