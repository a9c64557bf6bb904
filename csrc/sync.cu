// Weight synchronisation on the device: one launch for many strided 2-D copies with a conversion, and checksums of what such
// copies write. A block takes kTile elements of one copy; vectors of eight elements where pitch and addresses allow.
#include <cuda_runtime.h>

#include <type_traits>

#include "ops.h"
#include "sync_blocks.h"

namespace {

using namespace m2rl;

constexpr int kThreads = 256;
constexpr int kTile = 16384;  // elements per block; weight_sync.py lays out first_tile with it

template <int dtype> struct Type;
template <> struct Type<M2RL_F32> {
  using Word = uint32_t;
  static __device__ float widen(Word w) { return __uint_as_float(w); }
  static __device__ Word narrow(float x) { return __float_as_uint(x); }
};
template <> struct Type<M2RL_BF16> {
  using Word = uint16_t;
  static __device__ float widen(Word w) { return from_bf16(w); }
  static __device__ Word narrow(float x) { return to_bf16(x); }
};
template <> struct Type<M2RL_F16> {
  using Word = uint16_t;
  static __device__ float widen(Word w) { return from_f16(w); }
  static __device__ Word narrow(float x) { return to_f16(x); }
};

template <int from, int to>
__device__ typename Type<to>::Word converted(typename Type<from>::Word w) {
  if constexpr (from == to) return w;
  else return Type<to>::narrow(Type<from>::widen(w));
}

template <class Word> struct alignas(8 * sizeof(Word) < 16 ? 8 * sizeof(Word) : 16) Eight { Word word[8]; };

__device__ int64_t find(const int64_t* first_tile, int64_t n, int64_t tile) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_tile[middle] <= tile) low = middle;
    else high = middle;
  }
  return low;
}

template <int from, int to>
__global__ void __launch_bounds__(kThreads, 4) copy_tiles(const M2rlCopy* copies, const int64_t* first_tile, int64_t n) {
  using In = typename Type<from>::Word;
  using Out = typename Type<to>::Word;
  const int64_t which = find(first_tile, n, blockIdx.x);
  const M2rlCopy c = copies[which];
  const In* src = static_cast<const In*>(c.src);
  Out* dst = static_cast<Out*>(c.dst);
  const int64_t begin = (blockIdx.x - first_tile[which]) * kTile, total = c.rows * c.columns;
  const int64_t end = begin + kTile < total ? begin + kTile : total;
  const uint64_t pitch = static_cast<uint64_t>(c.columns | c.src_stride | c.dst_stride);
  const bool vectors = pitch % 8 == 0 && reinterpret_cast<uint64_t>(src) % alignof(Eight<In>) == 0 &&
                       reinterpret_cast<uint64_t>(dst) % alignof(Eight<Out>) == 0;
  if (vectors) {
    for (int64_t i = begin + threadIdx.x * 8; i < end; i += kThreads * 8) {
      const int64_t row = c.rows == 1 ? 0 : i / c.columns, column = i - row * c.columns;
      const Eight<In> in = *reinterpret_cast<const Eight<In>*>(src + row * c.src_stride + column);
      Eight<Out> out;
#pragma unroll
      for (int k = 0; k < 8; ++k) out.word[k] = converted<from, to>(in.word[k]);
      *reinterpret_cast<Eight<Out>*>(dst + row * c.dst_stride + column) = out;
    }
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const int64_t row = c.rows == 1 ? 0 : i / c.columns, column = i - row * c.columns;
      dst[row * c.dst_stride + column] = converted<from, to>(src[row * c.src_stride + column]);
    }
  }
}

template <int from, int to>
__global__ void __launch_bounds__(kThreads, 4) hash_tiles(const M2rlCopy* copies, const int64_t* first_tile, int64_t n,
                                                       unsigned long long* sums) {
  const int64_t which = find(first_tile, n, blockIdx.x);
  const M2rlCopy c = copies[which];
  const auto* src = static_cast<const typename Type<from>::Word*>(c.src);
  const int64_t begin = (blockIdx.x - first_tile[which]) * kTile, total = c.rows * c.columns;
  const int64_t end = begin + kTile < total ? begin + kTile : total;
  uint64_t first = 0, second = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t row = c.rows == 1 ? 0 : i / c.columns, column = i - row * c.columns;
    add_hash(static_cast<uint64_t>(c.dst_first + row * c.dst_stride + column),
             converted<from, to>(src[row * c.src_stride + column]), first, second);
  }
  for (int k = 16; k > 0; k /= 2) {
    first += __shfl_down_sync(0xffffffffu, first, k);
    second += __shfl_down_sync(0xffffffffu, second, k);
  }
  if (threadIdx.x % 32 == 0) {  // addition of integers: the order does not matter
    atomicAdd(sums + 2 * c.tensor, static_cast<unsigned long long>(first));
    atomicAdd(sums + 2 * c.tensor + 1, static_cast<unsigned long long>(second));
  }
}

template <class F>
int32_t dispatch(int32_t from, int32_t to, F&& run) {
  if (from == M2RL_F32 && to == M2RL_F32) return run(std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
  if (from == M2RL_F32 && to == M2RL_BF16) return run(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{});
  if (from == M2RL_F32 && to == M2RL_F16) return run(std::integral_constant<int, 0>{}, std::integral_constant<int, 2>{});
  if (from == M2RL_BF16 && to == M2RL_F32) return run(std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
  if (from == M2RL_BF16 && to == M2RL_BF16) return run(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
  if (from == M2RL_BF16 && to == M2RL_F16) return run(std::integral_constant<int, 1>{}, std::integral_constant<int, 2>{});
  if (from == M2RL_F16 && to == M2RL_F32) return run(std::integral_constant<int, 2>{}, std::integral_constant<int, 0>{});
  if (from == M2RL_F16 && to == M2RL_BF16) return run(std::integral_constant<int, 2>{}, std::integral_constant<int, 1>{});
  if (from == M2RL_F16 && to == M2RL_F16) return run(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  return cudaErrorInvalidValue;
}

}  // namespace

int32_t m2rl_sync_copy_cuda(const M2rlCopy* copies, const int64_t* first_tile, int64_t n, int64_t tiles, int32_t src_dtype,
                            int32_t dst_dtype, void* stream) {
  if (tiles == 0) return cudaSuccess;
  return dispatch(src_dtype, dst_dtype, [&](auto from, auto to) -> int32_t {
    copy_tiles<from.value, to.value>
        <<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(copies, first_tile, n);
    return cudaGetLastError();
  });
}

int32_t m2rl_sync_checksum_cuda(const M2rlCopy* copies, const int64_t* first_tile, int64_t n, int64_t tiles, int32_t src_dtype,
                                int32_t dst_dtype, uint64_t* sums, void* stream) {
  if (tiles == 0) return cudaSuccess;
  return dispatch(src_dtype, dst_dtype, [&](auto from, auto to) -> int32_t {
    hash_tiles<from.value, to.value><<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        copies, first_tile, n, reinterpret_cast<unsigned long long*>(sums));
    return cudaGetLastError();
  });
}
