// Merging on CUDA: the passes of merge.cpp as multi-tensor kernels over one table of chunks. Same rules, same order of float32
// operations, same Philox: elementwise results and kept sets are those of the CPU, bit for bit; float64 sums add in another
// order. Tables arrive on the host and are uploaded by each call; answers come back to the host, so each call synchronises once.
//
//   select   histogram of the high 15 bits of the key in shared memory (zeros counted in a register), then of the low 16 bits of
//            the boundary bin, then ties per chunk: three readings
//   apply    8 elements per thread, 16-byte loads where the addresses allow, K <= 8 experts in registers
#include <cerrno>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "counter_rng.h"
#include "ops.h"
#include "radix.h"

using namespace m2rl;

namespace {

constexpr int kThreads = 256, kVector = 8, kMaxExperts = 8;
constexpr int kHighBins = 32768, kLowBins = 65536;
using U64 = unsigned long long;

struct Chunk {
  int64_t tensor, begin, end;
};

// Device copies of M2rlTensors and M2rlRule.
struct View {
  const int64_t* offset;
  const void* const* base;
  const int32_t* base_dtype;
  const void* const* expert;
  const int32_t* expert_dtype;
  int32_t experts;
};

struct RuleView {
  int32_t combine, round, normalize;
  float den_floor, den_substitute, epsilon;
  const float *weight, *elect, *scale, *lambda, *divisor;
  const int8_t* zero_sign;
  const uint32_t *low_key, *high_key, *variance_key;
  const int64_t *low_cut, *high_cut, *variance_cut;
  const uint64_t* random_key;
  const uint32_t* expert_id;
  const double* keep;
};

// Uploads, scratch and downloads of one call, freed in stream order when it returns.
class Arena {
 public:
  explicit Arena(cudaStream_t stream) : stream_(stream) {}
  ~Arena() {
    for (void* p : owned_) cudaFreeAsync(p, stream_);
  }
  template <typename T>
  T* zeros(size_t count) {
    T* p = raw<T>(count);
    if (p != nullptr) note(cudaMemsetAsync(p, 0, count * sizeof(T), stream_));
    return p;
  }
  template <typename T>
  T* raw(size_t count) {
    void* p = nullptr;
    note(cudaMallocAsync(&p, std::max<size_t>(count, 1) * sizeof(T), stream_));
    if (p != nullptr) owned_.push_back(p);
    return static_cast<T*>(p);
  }
  template <typename T>
  const T* up(const T* host, size_t count) {
    if (host == nullptr) return nullptr;
    T* p = raw<T>(count);
    if (p != nullptr && count != 0) note(cudaMemcpyAsync(p, host, count * sizeof(T), cudaMemcpyHostToDevice, stream_));
    return p;
  }
  template <typename T>
  std::vector<T> down(const T* device, size_t count) {
    std::vector<T> host(count);
    if (count != 0) note(cudaMemcpyAsync(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost, stream_));
    note(cudaStreamSynchronize(stream_));
    return host;
  }
  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  void launched() { note(cudaGetLastError()); }
  // -1000 - the CUDA error, so that it cannot be taken for an errno
  int32_t status() const { return error_ == cudaSuccess ? 0 : -1000 - static_cast<int32_t>(error_); }
  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_;
  std::vector<void*> owned_;
  cudaError_t error_ = cudaSuccess;
};

View upload(Arena& arena, const M2rlTensors& in) {
  const size_t T = static_cast<size_t>(in.tensors), TK = static_cast<size_t>(in.tensors * in.experts);
  return {arena.up(in.offset, T), arena.up(in.base, T), arena.up(in.base_dtype, T), arena.up(in.expert, TK), arena.up(in.expert_dtype, TK),
          static_cast<int32_t>(in.experts)};
}

RuleView upload(Arena& arena, const M2rlTensors& in, const M2rlRule& r) {
  const size_t T = static_cast<size_t>(in.tensors), K = static_cast<size_t>(in.experts), TK = T * K;
  return {r.combine, r.round, r.normalize, r.den_floor, r.den_substitute, r.epsilon,
          arena.up(r.weight, TK), arena.up(r.elect, TK), arena.up(r.scale, TK), arena.up(r.lambda, T), arena.up(r.divisor, T),
          arena.up(r.zero_sign, T), arena.up(r.low_key, TK), arena.up(r.high_key, TK), arena.up(r.variance_key, T),
          arena.up(r.low_cut, TK), arena.up(r.high_cut, TK), arena.up(r.variance_cut, T), arena.up(r.random_key, T),
          arena.up(r.expert_id, K), arena.up(r.keep, TK)};
}

std::vector<Chunk> cut_chunks(const M2rlTensors& in, int64_t chunk) {
  std::vector<Chunk> chunks;
  chunk = std::max<int64_t>(1024, chunk / 1024 * 1024);
  for (int64_t t = 0; t < in.tensors; ++t)
    for (int64_t i = 0; i < in.numel[t]; i += chunk) chunks.push_back({t, i, std::min(i + chunk, in.numel[t])});
  return chunks;
}

// The rare paths are calls, not copies: they would triple the code of every kernel and the time it takes to compile.
__device__ __noinline__ float rounded_to(float x, int round) { return round == M2RL_BF16 ? from_bf16(to_bf16(x)) : from_f16(to_f16(x)); }

__device__ __forceinline__ float rounded(float x, int round) { return round == M2RL_F32 ? x : rounded_to(x, round); }

__device__ __noinline__ uint32_t load_word(const char* at, int dtype, int j) {
  return dtype == M2RL_F32 ? reinterpret_cast<const uint32_t*>(at)[j] : reinterpret_cast<const uint16_t*>(at)[j];
}

__device__ __noinline__ void store_word(char* at, int dtype, int j, uint32_t word) {
  if (dtype == M2RL_F32) reinterpret_cast<uint32_t*>(at)[j] = word;
  else reinterpret_cast<uint16_t*>(at)[j] = static_cast<uint16_t>(word);
}

__device__ __noinline__ bool keep_alone(uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold) {
  return keep_element(index, expert, key, threshold);
}

// Elements [i, i + n) as float32; zeros beyond n. Returns how many are NaN or infinite.
__device__ __forceinline__ int load8(const void* from, int dtype, int64_t i, int n, float* out) {
  const char* at = static_cast<const char*>(from) + i * (dtype == M2RL_F32 ? 4 : 2);
  uint32_t words[kVector];
  if (n < kVector || (reinterpret_cast<uintptr_t>(at) & 15) != 0) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) words[j] = j < n ? load_word(at, dtype, j) : 0;
  } else if (dtype == M2RL_F32) {
    const uint4 a = __ldg(reinterpret_cast<const uint4*>(at)), b = __ldg(reinterpret_cast<const uint4*>(at) + 1);
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w, words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
  } else {
    const uint4 a = __ldg(reinterpret_cast<const uint4*>(at));
    const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int j = 0; j < kVector; ++j) words[j] = (pairs[j / 2] >> (16 * (j & 1))) & 0xffffu;
  }
  int bad = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint16_t half = static_cast<uint16_t>(words[j]);
    out[j] = dtype == M2RL_F32 ? bits_float(words[j]) : dtype == M2RL_BF16 ? from_bf16(half) : from_f16(half);
    bad += magnitude_key(out[j]) >= 0x7f800000u;
  }
  return bad;
}

// Keep decisions of 8 neighbours as bits. Sixteen threads cover the 128 elements of a span: each makes one Philox block and hands its
// lanes round through `lanes` [kThreads * 8]. All threads of the warp must call it.
__device__ __forceinline__ uint32_t random_bits(uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold, uint16_t* lanes) {
  uint32_t bits = 0;
  const uint32_t bar = static_cast<uint32_t>(threshold >> 16);
  const bool aligned = __all_sync(0xffffffffu, (index & 7) == 0 && (index >> 3 & 15) == (threadIdx.x & 15));
  if (!aligned) {  // a shard that starts inside a span: every element on its own
    for (int j = 0; j < kVector; ++j) bits |= static_cast<uint32_t>(keep_alone(index + j, expert, key, threshold)) << j;
    return bits;
  }
  uint16_t* span = lanes + (threadIdx.x & ~15) * kVector;
  const Philox4 block = philox4x32_7((index >> 7) * 16 + (threadIdx.x & 15), expert, 0, key);
  __syncwarp();
#pragma unroll
  for (int lane = 0; lane < 8; ++lane)
    span[16 * lane + (threadIdx.x & 15)] = static_cast<uint16_t>(block.word[lane & 3] >> (lane < 4 ? 0 : 16));
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint32_t draw = span[(threadIdx.x & 15) * kVector + j];
    const bool keep = draw == bar ? keep_alone(index + j, expert, key, threshold) : draw < bar;
    bits |= static_cast<uint32_t>(keep) << j;
  }
  return bits;
}

struct Counters {  // per chunk and thread, reduced at the end
  int bad_base = 0, bad[kMaxExperts] = {}, nonzero[kMaxExperts] = {};
};

template <int K>
__device__ __forceinline__ void variance8(int experts, const float (&d)[K][kVector], float* v) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    float mean = 0.0f, total = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) mean += k < experts ? d[k][j] : 0.0f;
    mean /= static_cast<float>(experts);
#pragma unroll
    for (int k = 0; k < K; ++k) total += k < experts ? (d[k][j] - mean) * (d[k][j] - mean) : 0.0f;
    v[j] = total / static_cast<float>(experts);
  }
}

// d = expert k's filtered task vector at 8 elements, b loaded already. `before` and `after` get sums of |d| around the filters.
__device__ __forceinline__ void delta8(const View& in, const RuleView& r, int filter, int64_t t, int k, int64_t i, int n, bool has_base,
                                       const float* b, float* d, uint16_t* lanes, int& bad, int& nonzero, double* before, double* after) {
  const int64_t e = t * in.experts + k;
  bad += load8(in.expert[e], in.expert_dtype[e], i, n, d);
  if (has_base) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      d[j] = rounded(d[j] - b[j], r.round);
      nonzero += d[j] != 0.0f;
    }
  }
  if (before != nullptr) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) *before += fabs(static_cast<double>(d[j]));
  }
  if ((filter & M2RL_RANDOM) && r.keep[e] < 1.0) {
    const uint64_t threshold = static_cast<uint64_t>(llrint(r.keep[e] * 4294967296.0));
    const uint32_t bits = random_bits(static_cast<uint64_t>(in.offset[t] + i), r.expert_id[k], r.random_key[t], threshold, lanes);
#pragma unroll
    for (int j = 0; j < kVector; ++j) d[j] = (bits >> j) & 1 ? d[j] : 0.0f;
  }
  if (filter & M2RL_MAGNITUDE) {
    const uint32_t low = r.low_key[e];
    const int64_t low_cut = r.low_cut[e];
#pragma unroll
    for (int j = 0; j < kVector; ++j) d[j] = kept_by_magnitude(magnitude_key(d[j]), i + j, low, low_cut) ? d[j] : 0.0f;
    if (r.high_key != nullptr) {
      const uint32_t high = r.high_key[e];
      const int64_t high_cut = r.high_cut[e];
#pragma unroll
      for (int j = 0; j < kVector; ++j) d[j] = kept_by_magnitude(magnitude_key(d[j]), i + j, high, high_cut) ? 0.0f : d[j];
    }
  }
  if (after != nullptr) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) *after += fabs(static_cast<double>(d[j]));
  }
  if ((filter & M2RL_SCALE) && r.scale[e] != 1.0f) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) d[j] = rounded(d[j] * r.scale[e], r.round);
  }
}

__device__ __forceinline__ bool base8(const View& in, int64_t t, int64_t i, int n, float* b, int& bad) {
  const bool has_base = in.base != nullptr && in.base[t] != nullptr;
#pragma unroll
  for (int j = 0; j < kVector; ++j) b[j] = 0.0f;
  if (has_base) bad += load8(in.base[t], in.base_dtype[t], i, n, b);
  return has_base;
}

// Base and all experts (at most K) of 8 elements of one tensor, filtered.
template <int K>
__device__ __forceinline__ void prepare(const View& in, const RuleView& r, int filter, int64_t t, int64_t i, int n, float* b,
                                        float (&d)[K][kVector], uint16_t* lanes, Counters& count, double* before, double* after) {
  const bool has_base = base8(in, t, i, n, b, count.bad_base);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k < in.experts) {
      delta8(in, r, filter, t, k, i, n, has_base, b, d[k], lanes, count.bad[k], count.nonzero[k], before == nullptr ? nullptr : before + k,
             after == nullptr ? nullptr : after + k);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) d[k][j] = 0.0f;
    }
  }
  if (filter & M2RL_VARIANCE) {
    float v[kVector];
    variance8<K>(in.experts, d, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const bool keep = kept_by_magnitude(magnitude_key(v[j]), i + j, r.variance_key[t], r.variance_cut[t]);
#pragma unroll
      for (int k = 0; k < K; ++k) d[k][j] = keep ? d[k][j] : 0.0f;
    }
  }
}

__device__ __forceinline__ void add_count(int64_t* where, int64_t value) {
  if (where == nullptr) return;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if ((threadIdx.x & 31) == 0 && value != 0) atomicAdd(reinterpret_cast<U64*>(where), static_cast<U64>(value));
}

struct ReportView {
  int64_t *nonfinite, *overflow, *nonzero, *changed;
};

template <int K>
__device__ __forceinline__ void add_inputs(const ReportView& report, int experts, int64_t t, const Counters& count) {
  if (report.nonfinite != nullptr) add_count(report.nonfinite + t * (experts + 1), count.bad_base);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= experts) break;
    if (report.nonfinite != nullptr) add_count(report.nonfinite + t * (experts + 1) + k + 1, count.bad[k]);
    if (report.nonzero != nullptr) add_count(report.nonzero + t * experts + k, count.nonzero[k]);
  }
}

// ---- apply ----

template <int K>
__global__ void __launch_bounds__(kThreads) apply_kernel(View in, RuleView r, int filter, const Chunk* chunks, void* const* out,
                                                         const int32_t* out_dtype, ReportView report) {
  __shared__ uint16_t lanes[kThreads * kVector];
  const Chunk chunk = chunks[blockIdx.x];
  const int64_t t = chunk.tensor, e = t * in.experts;
  const int dtype = out_dtype[t];
  Counters count;
  int64_t overflow = 0, changed = 0;
  const int64_t step = kThreads * kVector, rounds = (chunk.end - chunk.begin + step - 1) / step;
  for (int64_t round = 0; round < rounds; ++round) {  // every thread takes every round: random_bits talks across the warp
    const int64_t i = chunk.begin + round * step + threadIdx.x * kVector;
    const int n = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kVector), chunk.end - i)));
    float b[kVector], d[K][kVector], v[kVector];
    prepare<K>(in, r, filter, t, i, n, b, d, lanes, count, nullptr, nullptr);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float num = 0.0f;
      if (r.combine == M2RL_ELECT) {
        float sum = 0.0f, den = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (k < in.experts) sum += rounded(r.elect[e + k] * d[k][j], r.round);
        const float sign = sum > 0.0f ? 1.0f : sum < 0.0f ? -1.0f : static_cast<float>(r.zero_sign[t]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k >= in.experts) break;
          const bool same = d[k][j] * sign > 0.0f;
          num += same ? rounded(r.weight[e + k] * d[k][j], r.round) : 0.0f;
          den += same ? r.weight[e + k] : 0.0f;
        }
        if (r.normalize) {
          const float total = rounded(den, r.round), size = fabsf(total);
          num = rounded(rounded(num, r.round) / (size >= r.den_floor && size > 0.0f ? total : r.den_substitute), r.round);
        }
      } else if (r.combine == M2RL_RAM) {
        float changed_by = 0.0f, total = 0.0f, mass = 0.0f, alone = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k >= in.experts) break;
          const bool moved = fabsf(d[k][j]) > r.epsilon;
          changed_by += moved ? 1.0f : 0.0f;
          total += moved ? r.weight[e + k] * d[k][j] : 0.0f;
          mass += moved ? r.weight[e + k] : 0.0f;
          alone += moved ? r.scale[e + k] * d[k][j] : 0.0f;
        }
        num = changed_by > 1.0f ? total / (mass == 0.0f ? 1.0f : mass) : alone;
      } else {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (k < in.experts) num += rounded(r.weight[e + k] * d[k][j], r.round);
        if (r.normalize) num = rounded(rounded(num, r.round) / (r.divisor[t] != 0.0f ? rounded(r.divisor[t], r.round) : 1.0f), r.round);
      }
      v[j] = r.combine == M2RL_LINEAR ? num : rounded(b[j] + rounded(r.lambda[t] * rounded(num, r.round), r.round), r.round);
    }
    uint32_t words[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      words[j] = dtype == M2RL_F32 ? float_bits(v[j]) : dtype == M2RL_BF16 ? to_bf16(v[j]) : to_f16(v[j]);
      const float stored = dtype == M2RL_F32 ? v[j] : dtype == M2RL_BF16 ? from_bf16(static_cast<uint16_t>(words[j])) : from_f16(static_cast<uint16_t>(words[j]));
      if (j < n) overflow += magnitude_key(stored) >= 0x7f800000u, changed += stored != b[j];
    }
    char* at = static_cast<char*>(out[t]) + i * (dtype == M2RL_F32 ? 4 : 2);
    if (n == kVector && (reinterpret_cast<uintptr_t>(at) & 15) == 0) {
      if (dtype == M2RL_F32) {
        __stcs(reinterpret_cast<uint4*>(at), make_uint4(words[0], words[1], words[2], words[3]));
        __stcs(reinterpret_cast<uint4*>(at) + 1, make_uint4(words[4], words[5], words[6], words[7]));
      } else {
        __stcs(reinterpret_cast<uint4*>(at), make_uint4(words[0] | words[1] << 16, words[2] | words[3] << 16, words[4] | words[5] << 16,
                                                        words[6] | words[7] << 16));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (j < n) store_word(at, dtype, j, words[j]);
    }
  }
  add_inputs<K>(report, in.experts, t, count);
  if (report.overflow != nullptr) add_count(report.overflow + t, overflow);
  if (report.changed != nullptr) add_count(report.changed + t, changed);
}

// ---- sums ----

constexpr int kSumWidth = 3 * kMaxExperts + kMaxExperts * kMaxExperts;  // before, after, squares, products

// Partial sums per chunk: threads in order within a warp tree, warps in order; the host adds chunks in order.
template <int K>
__global__ void __launch_bounds__(kThreads) sums_kernel(View in, RuleView r, int filter, const Chunk* chunks, double* partial, int64_t* sign,
                                                        int64_t* varied, int64_t* unique, int64_t* shared, bool want_gram, ReportView report) {
  __shared__ uint16_t lanes[kThreads * kVector];
  __shared__ double warps[kThreads / 32];
  const Chunk chunk = chunks[blockIdx.x];
  const int64_t t = chunk.tensor, e = t * in.experts;
  Counters count;
  double before[K] = {}, after[K] = {}, square[K] = {}, gram[K * (K + 1) / 2] = {};
  int64_t signs = 0, variances = 0, alone[K] = {}, common[K] = {};
  const int64_t step = kThreads * kVector, rounds = (chunk.end - chunk.begin + step - 1) / step;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t i = chunk.begin + round * step + threadIdx.x * kVector;
    const int n = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kVector), chunk.end - i)));
    float b[kVector], d[K][kVector];
    prepare<K>(in, r, filter, t, i, n, b, d, lanes, count, before, after);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {  // beyond n every d is 0 and adds nothing; a constant bound keeps d in registers
#pragma unroll
      for (int k = 0; k < K; ++k) {
        square[k] += static_cast<double>(d[k][j]) * static_cast<double>(d[k][j]);
        if (want_gram)
#pragma unroll
          for (int q = 0; q <= k; ++q) gram[k * (k + 1) / 2 + q] += static_cast<double>(d[k][j]) * static_cast<double>(d[q][j]);
      }
      if (sign != nullptr) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (k < in.experts) sum += rounded(r.elect[e + k] * d[k][j], r.round);
        signs += (sum > 0.0f) - (sum < 0.0f);
      }
      if (unique != nullptr) {
        int moved = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) moved += fabsf(d[k][j]) > r.epsilon;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          alone[k] += moved == 1 && fabsf(d[k][j]) > r.epsilon;
          common[k] += moved > 1 && fabsf(d[k][j]) > r.epsilon;
        }
      }
    }
    if (varied != nullptr) {
      float v[kVector];
      variance8<K>(in.experts, d, v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) variances += j < n && v[j] != 0.0f;
    }
  }
  auto block_sum = [&](double value, int slot) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0.0;
      for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
      partial[static_cast<int64_t>(blockIdx.x) * kSumWidth + slot] = total;
    }
    __syncthreads();
  };
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= in.experts) break;
    block_sum(before[k], k);
    block_sum(after[k], kMaxExperts + k);
    block_sum(square[k], 2 * kMaxExperts + k);
    for (int q = 0; want_gram && q <= k; ++q) block_sum(gram[k * (k + 1) / 2 + q], 3 * kMaxExperts + k * kMaxExperts + q);
    if (unique != nullptr) add_count(unique + e + k, alone[k]), add_count(shared + e + k, common[k]);
  }
  if (sign != nullptr) add_count(sign + t, signs);
  if (varied != nullptr) add_count(varied + t, variances);
  add_inputs<K>(report, in.experts, t, count);
}

// ---- select ----

struct Search {  // one (group, list, rank)
  int64_t pair, rank;                     // which histogram (local to the slab); how many to keep, still, from the current range
  int64_t first_chunk, last_chunk;        // of its group
  uint32_t prefix;                        // high 15 bits, then the whole key
  int64_t above, equal;                   // keys above the range; keys in it
  int64_t cut;
};

// Keys of one list at 8 elements: |d| of expert `list`, or the variance over experts.
template <bool kVariance>
__device__ __forceinline__ void keys8(const View& in, const RuleView& r, int filter, int64_t t, int list, int64_t i, int n, uint16_t* lanes,
                                      Counters& count, uint32_t* key) {
  float b[kVector];
  if (kVariance) {
    float d[kMaxExperts][kVector], v[kVector];
    prepare<kMaxExperts>(in, r, filter, t, i, n, b, d, lanes, count, nullptr, nullptr);
    variance8<kMaxExperts>(in.experts, d, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) key[j] = magnitude_key(v[j]);
  } else {
    float d[kVector];
    const bool has_base = base8(in, t, i, n, b, count.bad_base);
    delta8(in, r, filter, t, list, i, n, has_base, b, d, lanes, count.bad[0], count.nonzero[0], nullptr, nullptr);
#pragma unroll
    for (int j = 0; j < kVector; ++j) key[j] = magnitude_key(d[j]);
  }
}

// Neighbouring blocks are the lists of one run of chunks, so that the base comes out of the second-level cache for all but the first.
// The shared histogram is flushed when the group changes.
template <bool kVariance>
__global__ void __launch_bounds__(kThreads) high_kernel(View in, RuleView r, int filter, const Chunk* chunks, const int32_t* group_of,
                                                        int64_t chunk_count, int lists, U64* bins, ReportView report) {
  extern __shared__ uint32_t histogram[];
  __shared__ uint16_t lanes[kThreads * kVector];
  const int list = static_cast<int>(blockIdx.x) % lists;
  const int64_t run = blockIdx.x / lists, runs = gridDim.x / lists, from = chunk_count * run / runs, upto = chunk_count * (run + 1) / runs;
  for (int bin = threadIdx.x; bin < kHighBins; bin += kThreads) histogram[bin] = 0;
  __syncthreads();
  int64_t zeros = 0;
  auto flush = [&](int group) {
    __syncthreads();
    U64* target = bins + (static_cast<int64_t>(group) * lists + list) * kHighBins;
    add_count(reinterpret_cast<int64_t*>(target), zeros);
    zeros = 0;
    for (int bin = threadIdx.x; bin < kHighBins; bin += kThreads) {
      if (histogram[bin] != 0) atomicAdd(target + bin, static_cast<U64>(histogram[bin]));
      histogram[bin] = 0;
    }
    __syncthreads();
  };
  for (int64_t c = from; c < upto; ++c) {
    const Chunk chunk = chunks[c];
    Counters count;
    const int64_t step = kThreads * kVector, rounds = (chunk.end - chunk.begin + step - 1) / step;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t i = chunk.begin + round * step + threadIdx.x * kVector;
      const int n = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kVector), chunk.end - i)));
      uint32_t key[kVector];
      keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, lanes, count, key);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (j < n && key[j] == 0) ++zeros;
        else if (j < n) atomicAdd(histogram + (key[j] >> 16), 1u);
      }
    }
    if (report.nonfinite != nullptr) {
      int64_t* counts = report.nonfinite + chunk.tensor * (in.experts + 1);
      if (list == 0) add_count(counts, count.bad_base);
      if (kVariance) {
#pragma unroll
        for (int k = 0; k < kMaxExperts; ++k)
          if (k < in.experts) add_count(counts + k + 1, count.bad[k]);
      } else {
        add_count(counts + list + 1, count.bad[0]);
      }
    }
    if (c + 1 == upto || group_of[c + 1] != group_of[c]) flush(group_of[c]);
  }
}

// One block per search: from the top bin down, where does the rank fall? Leaves prefix, above, and the rank within the bin.
__global__ void find_bin_kernel(Search* searches, const U64* bins, int bin_count, bool low) {
  __shared__ U64 part[kThreads];
  Search& s = searches[blockIdx.x];
  const U64* mine = bins + (low ? static_cast<int64_t>(blockIdx.x) : s.pair) * bin_count;  // low bins: a row per search
  const int share = bin_count / kThreads;  // thread 0 owns the top bins
  const int top = bin_count - 1 - static_cast<int>(threadIdx.x) * share;
  U64 total = 0;
  for (int j = 0; j < share; ++j) total += mine[top - j];
  part[threadIdx.x] = total;
  __syncthreads();
  U64 before = 0;
  for (int q = 0; q < static_cast<int>(threadIdx.x); ++q) before += part[q];
  const U64 rank = static_cast<U64>(s.rank);
  __syncthreads();
  if (rank > before && rank <= before + total) {
    for (int j = 0; j < share; ++j) {
      const U64 here = mine[top - j];
      if (rank <= before + here) {
        s.prefix = low ? s.prefix << 16 | static_cast<uint32_t>(top - j) : static_cast<uint32_t>(top - j);
        s.above += static_cast<int64_t>(before);
        s.rank -= static_cast<int64_t>(before);
        s.equal = static_cast<int64_t>(here);
        break;
      }
      before += here;
    }
  }
}

// mode "low": histogram of the low 16 bits where the high bits equal the prefix. mode "ties": per chunk, how many keys equal it.
template <bool kVariance, bool kTies>
__global__ void __launch_bounds__(kThreads) refine_kernel(View in, RuleView r, int filter, const Chunk* chunks, const Search* searches,
                                                          const int32_t* first_search, const int32_t* group_of, int lists, int ranks, U64* bins,
                                                          int32_t* ties) {
  __shared__ uint16_t lanes[kThreads * kVector];
  const int64_t c = blockIdx.x / lists;
  const int list = static_cast<int>(blockIdx.x) % lists;
  const Chunk chunk = chunks[c];
  const int32_t first = first_search[group_of[c] * lists + list];
  Counters count;
  const int64_t step = kThreads * kVector, rounds = (chunk.end - chunk.begin + step - 1) / step;
  for (int q = 0; q < ranks; ++q) {
    const Search& s = searches[first + q];
    if (s.rank <= 0) continue;
    int64_t found = 0;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t i = chunk.begin + round * step + threadIdx.x * kVector;
      const int n = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kVector), chunk.end - i)));
      uint32_t key[kVector];
      keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, lanes, count, key);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const bool mine = j < n && (kTies ? key[j] == s.prefix : key[j] >> 16 == s.prefix);
        if (kTies) {
          found += mine;
          continue;
        }
        const uint32_t bin = mine ? key[j] & 0xffffu : kLowBins;  // neighbours often share a value: one addition per value and warp
        const uint32_t same = __match_any_sync(0xffffffffu, bin);
        if (mine && static_cast<int>(threadIdx.x & 31) == __ffs(static_cast<int>(same)) - 1)
          atomicAdd(bins + static_cast<int64_t>(first + q) * kLowBins + bin, static_cast<U64>(__popc(same)));
      }
    }
    if (kTies) {
      for (int offset = 16; offset > 0; offset /= 2) found += __shfl_down_sync(0xffffffffu, found, offset);
      if ((threadIdx.x & 31) == 0 && found != 0) atomicAdd(ties + (c * lists + list) * ranks + q, static_cast<int32_t>(found));
    }
  }
}

// One warp per search: the chunk in which the quota of ties runs out, then the element.
template <bool kVariance>
__global__ void cut_kernel(View in, RuleView r, int filter, const Chunk* chunks, const int64_t* chunk_base, Search* searches,
                           int lists, int ranks, const int32_t* ties) {
  __shared__ uint16_t lanes[kThreads * kVector];
  Search& s = searches[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x);
  const int q = static_cast<int>(blockIdx.x) % ranks, list = static_cast<int>(blockIdx.x) / ranks % lists;
  if (s.rank <= 0 || s.rank >= s.equal) return;  // every tie is kept: the cut stays at the end
  int64_t quota = s.rank, c = s.first_chunk;
  while (c < s.last_chunk) {  // 32 chunks at a time
    const int64_t mine = c + lane < s.last_chunk ? ties[((c + lane) * lists + list) * ranks + q] : 0;
    int64_t upto = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, upto, offset);
      if (lane >= offset) upto += other;
    }
    const uint32_t reached = __ballot_sync(0xffffffffu, upto >= quota);
    if (reached != 0) {
      const int winner = __ffs(static_cast<int>(reached)) - 1;
      quota -= __shfl_sync(0xffffffffu, upto - mine, winner);
      c += winner;
      break;
    }
    quota -= __shfl_sync(0xffffffffu, upto, 31);
    c += 32;
  }
  const Chunk chunk = chunks[c];
  Counters count;
  for (int64_t start = chunk.begin; start < chunk.end; start += 32 * kVector) {
    const int64_t i = start + lane * kVector;
    const int n = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kVector), chunk.end - i)));
    uint32_t key[kVector];
    keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, lanes, count, key);
    int64_t mine = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) mine += j < n && key[j] == s.prefix;
    int64_t upto = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, upto, offset);
      if (lane >= offset) upto += other;
    }
    const int64_t before = upto - mine;
    if (before < quota && upto >= quota) {
      int64_t left = quota - before;
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (j < n && key[j] == s.prefix && --left == 0) s.cut = chunk_base[c] + i + j - chunk.begin;
    }
    const int64_t total = __shfl_sync(0xffffffffu, upto, 31);
    if (total >= quota) return;
    quota -= total;
  }
}

// f with room for 2, 4 or 8 experts in registers
template <typename F>
int32_t with_room(int64_t experts, F&& f) {
  if (experts <= 2) return f(std::integral_constant<int, 2>{});
  if (experts <= 4) return f(std::integral_constant<int, 4>{});
  if (experts <= kMaxExperts) return f(std::integral_constant<int, kMaxExperts>{});
  return -ENOTSUP;
}

bool ranked(const M2rlRule& r) { return (r.filter & M2RL_RANDOM) && r.spread != nullptr; }

struct ReportArena {
  ReportArena(Arena& arena, const M2rlTensors& in, const M2rlReport* host) : arena_(arena), host_(host) {
    const size_t T = static_cast<size_t>(in.tensors), K = static_cast<size_t>(in.experts);
    sizes_[0] = T * (K + 1), sizes_[1] = T, sizes_[2] = T * K, sizes_[3] = T;
    if (host == nullptr) return;
    int64_t* const wanted[4] = {host->nonfinite, host->overflow, host->nonzero, host->changed};
    int64_t** const device[4] = {&view.nonfinite, &view.overflow, &view.nonzero, &view.changed};
    for (int i = 0; i < 4; ++i)
      if (wanted[i] != nullptr) *device[i] = arena.zeros<int64_t>(sizes_[i]);
  }
  void collect() {
    if (host_ == nullptr) return;
    int64_t* const wanted[4] = {host_->nonfinite, host_->overflow, host_->nonzero, host_->changed};
    int64_t* const device[4] = {view.nonfinite, view.overflow, view.nonzero, view.changed};
    for (int i = 0; i < 4; ++i) {
      if (wanted[i] == nullptr) continue;
      const auto found = arena_.down(device[i], sizes_[i]);
      for (size_t j = 0; j < sizes_[i]; ++j) wanted[i][j] += found[j];
    }
  }
  ReportView view{};

 private:
  Arena& arena_;
  const M2rlReport* host_;
  size_t sizes_[4]{};
};

// The group's chunks are consecutive: histograms of as many groups as fit a slab of bins.
template <bool kVariance>
int32_t select_slab(Arena& arena, const M2rlTensors& in, const View& view, const RuleView& rule, int filter, const M2rlSelect& want,
                    const std::vector<Chunk>& all, const std::vector<int64_t>& chunk_first, int64_t g0, int64_t g1, const ReportView& report) {
  const int lists = kVariance ? 1 : static_cast<int>(in.experts), ranks = want.ranks, groups = static_cast<int>(g1 - g0);
  const int64_t c0 = chunk_first[static_cast<size_t>(g0)], c1 = chunk_first[static_cast<size_t>(g1)], chunk_count = c1 - c0;
  if (chunk_count == 0) return 0;
  std::vector<int32_t> group_of, first_search;
  std::vector<int64_t> chunk_base;
  std::vector<Search> searches;
  for (int64_t g = g0; g < g1; ++g) {
    int64_t base = 0;
    for (int64_t c = chunk_first[static_cast<size_t>(g)]; c < chunk_first[static_cast<size_t>(g + 1)]; ++c) {
      const Chunk& chunk = all[static_cast<size_t>(c)];
      group_of.push_back(static_cast<int32_t>(g - g0));
      chunk_base.push_back(base);
      base += chunk.end - chunk.begin;
    }
    for (int list = 0; list < lists; ++list) {
      first_search.push_back(static_cast<int32_t>(searches.size()));
      for (int q = 0; q < ranks; ++q) {
        int64_t rank = want.rank[(g * lists + list) * ranks + q];
        if (rank >= base) rank = 0;  // nothing or everything: answered on the host
        searches.push_back({(g - g0) * lists + list, std::max<int64_t>(rank, 0), chunk_first[static_cast<size_t>(g)] - c0,
                            chunk_first[static_cast<size_t>(g + 1)] - c0, 0, 0, 0, base - 1});
      }
    }
  }
  const Chunk* chunks = arena.up(all.data() + c0, static_cast<size_t>(chunk_count));
  const int32_t* groups_d = arena.up(group_of.data(), group_of.size());
  const int32_t* first_d = arena.up(first_search.data(), first_search.size());
  const int64_t* base_d = arena.up(chunk_base.data(), chunk_base.size());
  Search* searches_d = const_cast<Search*>(arena.up(searches.data(), searches.size()));
  U64* high = arena.zeros<U64>(static_cast<size_t>(groups) * static_cast<size_t>(lists) * kHighBins);
  int device = 0, processors = 0;
  arena.note(cudaGetDevice(&device));
  arena.note(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (arena.status() != 0) return arena.status();
  const auto kernel = high_kernel<kVariance>;
  arena.note(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kHighBins * 4));
  const unsigned runs = static_cast<unsigned>(std::min<int64_t>(chunk_count, std::max(1, processors)));
  kernel<<<runs * static_cast<unsigned>(lists), kThreads, kHighBins * 4, arena.stream()>>>(
      view, rule, filter, chunks, groups_d, chunk_count, lists, high, report);
  const unsigned count = static_cast<unsigned>(searches.size());
  find_bin_kernel<<<count, kThreads, 0, arena.stream()>>>(searches_d, high, kHighBins, false);
  U64* low = arena.zeros<U64>(static_cast<size_t>(count) * kLowBins);
  int32_t* ties = arena.zeros<int32_t>(static_cast<size_t>(chunk_count) * static_cast<size_t>(lists * ranks));
  if (arena.status() != 0) return arena.status();
  const unsigned grid = static_cast<unsigned>(chunk_count * lists);
  refine_kernel<kVariance, false><<<grid, kThreads, 0, arena.stream()>>>(view, rule, filter, chunks, searches_d, first_d, groups_d, lists, ranks,
                                                                low, nullptr);
  find_bin_kernel<<<count, kThreads, 0, arena.stream()>>>(searches_d, low, kLowBins, true);
  refine_kernel<kVariance, true><<<grid, kThreads, 0, arena.stream()>>>(view, rule, filter, chunks, searches_d, first_d, groups_d, lists, ranks,
                                                               nullptr, ties);
  cut_kernel<kVariance><<<count, 32, 0, arena.stream()>>>(view, rule, filter, chunks, base_d, searches_d, lists, ranks, ties);
  arena.launched();
  const auto found = arena.down(searches_d, searches.size());
  for (size_t i = 0; i < found.size(); ++i) {
    const size_t slot = static_cast<size_t>(g0 * lists * ranks) + i;
    const int64_t rank = want.rank[slot];
    const Search& s = found[i];
    const bool none = rank <= 0, everything = !none && rank > s.cut && searches[i].rank == 0;
    want.threshold[slot] = none ? 0xffffffffu : everything ? 0 : s.prefix;
    want.cut[slot] = none ? -1 : s.cut;
    if (want.above != nullptr) want.above[slot] = everything ? -1 : s.above;
    if (want.equal != nullptr) want.equal[slot] = everything ? -1 : s.equal;
  }
  return arena.status();
}

}  // namespace

int32_t m2rl_merge_select_cuda(const M2rlTensors* in, const M2rlRule* rule, const M2rlSelect* want, const M2rlReport* report, int64_t chunk,
                               void* stream) {
  if (ranked(*rule) || in->experts > kMaxExperts) return -ENOTSUP;
  if (want->share != nullptr) {  // the histograms need ranks: count first
    if (want->key != 1 || want->ranks != 1) return -ENOTSUP;
    std::vector<int64_t> varied(static_cast<size_t>(in->tensors)), rank;
    M2rlSums sums{};
    sums.variance_nonzero = varied.data();
    const int32_t status = m2rl_merge_sums_cuda(in, rule, &sums, nullptr, chunk, stream);
    if (status != 0) return status;
    for (int64_t g = 0; g < want->groups; ++g) {
      int64_t nonzero = 0, total = 0;
      for (int64_t t = want->start[g]; t < want->start[g + 1]; ++t) nonzero += varied[static_cast<size_t>(t)], total += in->numel[t];
      rank.push_back(want->share[g] >= 1.0 ? total : static_cast<int64_t>(want->share[g] * static_cast<double>(nonzero)));
    }
    M2rlSelect known = *want;
    known.rank = rank.data(), known.share = nullptr;
    return m2rl_merge_select_cuda(in, rule, &known, report, chunk, stream);
  }
  Arena arena(static_cast<cudaStream_t>(stream));
  const View view = upload(arena, *in);
  const RuleView rules = upload(arena, *in, *rule);
  ReportArena counters(arena, *in, report);
  const auto chunks = cut_chunks(*in, chunk);
  const int64_t lists = want->key == 0 ? in->experts : 1;
  std::vector<int64_t> chunk_first;
  size_t c = 0;
  for (int64_t g = 0; g <= want->groups; ++g) {
    while (c < chunks.size() && chunks[c].tensor < want->start[g]) ++c;
    chunk_first.push_back(static_cast<int64_t>(c));
  }
  for (int64_t slot = 0; slot < want->groups * lists * want->ranks; ++slot)  // groups without elements keep this
    want->threshold[slot] = want->rank[slot] > 0 ? 0 : 0xffffffffu, want->cut[slot] = -1;
  const int filter = rule->filter & (M2RL_RANDOM | M2RL_SCALE);
  const int64_t slab = std::max<int64_t>(1, 512 / (lists * want->ranks));  // 512 searches: 384 MiB of bins
  for (int64_t g = 0; g < want->groups; g += slab) {
    Arena scratch(static_cast<cudaStream_t>(stream));
    const auto run = want->key == 0 ? select_slab<false> : select_slab<true>;
    const int32_t status = run(scratch, *in, view, rules, filter, *want, chunks, chunk_first, g, std::min(g + slab, want->groups), counters.view);
    if (status != 0) return status;
  }
  counters.collect();
  return arena.status();
}

int32_t m2rl_merge_sums_cuda(const M2rlTensors* in, const M2rlRule* rule, const M2rlSums* want, const M2rlReport* report, int64_t chunk,
                             void* stream) {
  if (ranked(*rule)) return -ENOTSUP;
  return with_room(in->experts, [&](auto k) -> int32_t {
    constexpr int K = decltype(k)::value;
    const int64_t experts = in->experts;
    Arena arena(static_cast<cudaStream_t>(stream));
    const View view = upload(arena, *in);
    const RuleView rules = upload(arena, *in, *rule);
    ReportArena counters(arena, *in, report);
    const auto chunks = cut_chunks(*in, chunk);
    if (chunks.empty()) return 0;
    const size_t T = static_cast<size_t>(in->tensors);
    double* partial = arena.zeros<double>(chunks.size() * kSumWidth);
    int64_t* sign = want->sign != nullptr ? arena.zeros<int64_t>(T) : nullptr;
    int64_t* varied = want->variance_nonzero != nullptr ? arena.zeros<int64_t>(T) : nullptr;
    int64_t* unique = want->unique != nullptr ? arena.zeros<int64_t>(T * static_cast<size_t>(experts)) : nullptr;
    int64_t* shared = want->unique != nullptr ? arena.zeros<int64_t>(T * static_cast<size_t>(experts)) : nullptr;
    const Chunk* chunks_d = arena.up(chunks.data(), chunks.size());
    if (arena.status() != 0) return arena.status();
    sums_kernel<K><<<static_cast<unsigned>(chunks.size()), kThreads, 0, arena.stream()>>>(
        view, rules, rule->filter, chunks_d, partial, sign, varied, unique, shared, want->gram != nullptr, counters.view);
    arena.launched();
    const auto found = arena.down(partial, chunks.size() * kSumWidth);
    for (size_t c = 0; c < chunks.size(); ++c) {
      const double* p = found.data() + c * kSumWidth;
      const int64_t t = chunks[c].tensor;
      for (int64_t a = 0; a < experts; ++a) {
        if (want->abs_before != nullptr) want->abs_before[t * experts + a] += p[a];
        if (want->abs_after != nullptr) want->abs_after[t * experts + a] += p[kMaxExperts + a];
        if (want->square != nullptr) want->square[t * experts + a] += p[2 * kMaxExperts + a];
        for (int64_t b = 0; want->gram != nullptr && b <= a; ++b) {
          want->gram[(t * experts + a) * experts + b] += p[3 * kMaxExperts + a * kMaxExperts + b];
          if (a != b) want->gram[(t * experts + b) * experts + a] += p[3 * kMaxExperts + a * kMaxExperts + b];
        }
      }
    }
    auto add = [&](int64_t* host, const int64_t* device, size_t count) {
      if (host == nullptr) return;
      const auto values = arena.down(device, count);
      for (size_t i = 0; i < count; ++i) host[i] += values[i];
    };
    add(want->sign, sign, T);
    add(want->variance_nonzero, varied, T);
    add(want->unique, unique, T * static_cast<size_t>(experts));
    add(want->shared, shared, T * static_cast<size_t>(experts));
    counters.collect();
    return arena.status();
  });
}

int32_t m2rl_merge_apply_cuda(const M2rlTensors* in, const M2rlRule* rule, const M2rlOutput* out, const M2rlReport* report, int64_t chunk,
                              void* stream) {
  if (ranked(*rule) || out->address == nullptr) return -ENOTSUP;
  return with_room(in->experts, [&](auto k) -> int32_t {
    constexpr int K = decltype(k)::value;
    Arena arena(static_cast<cudaStream_t>(stream));
    const View view = upload(arena, *in);
    const RuleView rules = upload(arena, *in, *rule);
    ReportArena counters(arena, *in, report);
    const auto chunks = cut_chunks(*in, chunk);
    if (chunks.empty()) return 0;
    const Chunk* chunks_d = arena.up(chunks.data(), chunks.size());
    void* const* address = arena.up(out->address, static_cast<size_t>(in->tensors));
    const int32_t* dtype = arena.up(out->dtype, static_cast<size_t>(in->tensors));
    if (arena.status() != 0) return arena.status();
    apply_kernel<K><<<static_cast<unsigned>(chunks.size()), kThreads, 0, arena.stream()>>>(view, rules, rule->filter, chunks_d, address, dtype,
                                                                                          counters.view);
    arena.launched();
    counters.collect();
    return arena.status();
  });
}
