// Merging on CUDA: the passes of merge.cpp as multi-tensor kernels over one table of chunks. Same rules, same order of float32
// operations, same Philox: elementwise results and kept sets are those of the CPU, bit for bit; float64 sums add in another
// order. Tables arrive on the host and are uploaded by each call; answers come back to the host, so each call synchronises once.
//
//   select   a sample brackets each rank; one reading counts what lies above, stores what lies inside, and counts a heavy value per
//            chunk; digit by digit the stored keys give the answer. A bracket that missed costs four more readings
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

__device__ __noinline__ void store_word(char* at, int dtype, int j, uint32_t word) {
  if (dtype == M2RL_F32) reinterpret_cast<uint32_t*>(at)[j] = word;
  else reinterpret_cast<uint16_t*>(at)[j] = static_cast<uint16_t>(word);
}

__device__ __noinline__ bool keep_alone(uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold) {
  return keep_element(index, expert, key, threshold);
}

// Elements [i, i + n) as stored, zeros beyond n: a word each, or two to a word. Apart from their conversion, so that several loads can
// be on their way at a time.
struct Raw {
  uint32_t word[kVector];
};

__device__ __noinline__ Raw fetch_some(const char* at, int dtype, int n) {
  Raw raw = {};
  for (int j = 0; j < n; ++j) {
    if (dtype == M2RL_F32) raw.word[j] = reinterpret_cast<const uint32_t*>(at)[j];
    else raw.word[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at)[j]) << (16 * (j & 1));
  }
  return raw;
}

__device__ __forceinline__ Raw fetch8(const void* from, int dtype, int64_t i, int n) {
  const char* at = static_cast<const char*>(from) + i * (dtype == M2RL_F32 ? 4 : 2);
  if (n < kVector || (reinterpret_cast<uintptr_t>(at) & 15) != 0) return fetch_some(at, dtype, n);
  Raw raw = {};
  const uint4 a = __ldg(reinterpret_cast<const uint4*>(at));
  raw.word[0] = a.x, raw.word[1] = a.y, raw.word[2] = a.z, raw.word[3] = a.w;
  if (dtype == M2RL_F32) {
    const uint4 b = __ldg(reinterpret_cast<const uint4*>(at) + 1);
    raw.word[4] = b.x, raw.word[5] = b.y, raw.word[6] = b.z, raw.word[7] = b.w;
  }
  return raw;
}

// As float32. Returns how many are NaN or infinite.
__device__ __forceinline__ int convert8(const Raw& raw, int dtype, float* out) {
  int bad = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const uint16_t half = static_cast<uint16_t>(raw.word[j / 2] >> (16 * (j & 1)));
    out[j] = dtype == M2RL_F32 ? bits_float(raw.word[j]) : dtype == M2RL_BF16 ? from_bf16(half) : from_f16(half);
    bad += magnitude_key(out[j]) >= 0x7f800000u;
  }
  return bad;
}

// Keep decisions of 8 neighbours as bits. Sixteen threads cover the 128 elements of a span: each makes one Philox block and hands its
// lanes round through `lanes` [kThreads * 8]. All threads of the warp must call it; or, where each has a tensor of its own, with null.
__device__ __forceinline__ uint32_t random_bits(uint64_t index, uint32_t expert, uint64_t key, uint64_t threshold, uint16_t* lanes) {
  uint32_t bits = 0;
  const uint32_t bar = static_cast<uint32_t>(threshold >> 16);
  const bool aligned = lanes != nullptr && __all_sync(0xffffffffu, (index & 7) == 0 && (index >> 3 & 15) == (threadIdx.x & 15));
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
__device__ __forceinline__ void delta8(const View& in, const RuleView& r, int filter, int64_t t, int k, int64_t i, const Raw& raw,
                                       bool has_base, const float* b, float* d, uint16_t* lanes, int& bad, int& nonzero, double* before, double* after) {
  const int64_t e = t * in.experts + k;
  bad += convert8(raw, in.expert_dtype[e], d);
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
  if (has_base) bad += convert8(fetch8(in.base[t], in.base_dtype[t], i, n), in.base_dtype[t], b);
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
      const int64_t e = t * in.experts + k;
      delta8(in, r, filter, t, k, i, fetch8(in.expert[e], in.expert_dtype[e], i, n), has_base, b, d[k], lanes, count.bad[k], count.nonzero[k], before == nullptr ? nullptr : before + k,
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

constexpr int kBins = 2048, kDigit = 11, kDigits = 3;  // 3 digits of 11 bits hold the 31 bits of a key
constexpr int kMaxRanks = 2, kStage = 2 * kThreads * kVector;
constexpr int kCluster = 32, kMostDraws = 65536;                  // elements per draw of the sample, and draws at most
constexpr int64_t kWhole = 4096;                                  // up to here every key is stored and no sample is needed
constexpr int64_t kMostStored = int64_t{1} << 24;                 // keys of one search
constexpr int64_t kSlab = int64_t{1} << 26, kMostSearches = 4096;  // stored keys (512 MiB, unless one group needs more) and searches of one slab
constexpr int kRunsPerProcessor = 4;                              // blocks of the reading, per list
constexpr int kBracketThreads = 1024;                             // one block reads a whole sample, some ten times
constexpr uint32_t kNone = 0xffffffffu;                           // no key

// Stored keys of one search: several times what the bracket should hold.
int64_t room_for(int64_t total) { return total <= kWhole ? total : std::min(kMostStored, total / 32 + 8 * kWhole); }

enum Where : int { kTop, kInside, kBottom, kSearched, kPlaces };  // whose ties are counted per chunk

struct Search {  // one (group, list, rank): the rank-th largest key of a list
  int64_t rank, total;              // elements to keep (0: answered on the host) and in the group
  int64_t first_chunk, last_chunk;  // of its group
  int64_t sample, draws;            // first key of its list's sample, and how many clusters
  int64_t store, room;              // its stretch of the stored keys
  uint32_t lo, hi;                  // the bracket; heavy values (zero, a step of bfloat16) at its ends lie just outside
  uint32_t top, bottom;             //   and are counted, not stored; kNone: no such value
  U64 over, count[kSearched];       // keys above all that; keys at the top value, inside the bracket, at the bottom value
  U64 stored;
  int32_t place;                    // where the answer lies, kSearched until it is known
  int32_t missed;                   // outside the bracket, or not all of it was stored
  uint32_t digits;                  // the leading digits of (answer - lo)
  int64_t left;                     // the answer's rank among the keys that begin with them
  uint32_t threshold;
  int64_t above, equal, cut;        // keys above the threshold, keys at it, flat index of the last that is kept
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
    const int64_t e = t * in.experts + list;
    const Raw raw = fetch8(in.expert[e], in.expert_dtype[e], i, n);  // on its way while the base is read
    const bool has_base = base8(in, t, i, n, b, count.bad_base);
    delta8(in, r, filter, t, list, i, raw, has_base, b, d, lanes, count.bad[0], count.nonzero[0], nullptr, nullptr);
#pragma unroll
    for (int j = 0; j < kVector; ++j) key[j] = magnitude_key(d[j]);
  }
}

__device__ __forceinline__ int within(int64_t upto, int64_t i) {  // of 8 elements from i
  return static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kVector), upto - i)));
}

template <typename T>
__device__ __forceinline__ T sum_upto(T value) {  // of this lane and those before it
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, value, offset);
    if (static_cast<int>(threadIdx.x & 31) >= offset) value += other;
  }
  return value;
}

// Where bin by bin from the top the rank falls (1: the largest). For the whole block; the answer is shared.
struct Bin {
  uint32_t bin;
  U64 before, here;  // in the bins above it, and in it
};

template <int kTeam, typename Count>
__device__ void find_bin(const Count* bins, U64 rank, Bin& found) {
  __shared__ U64 warps[kTeam / 32];
  const int share = kBins / kTeam, top = kBins - 1 - static_cast<int>(threadIdx.x) * share;  // thread 0 owns the top bins
  U64 total = 0;
  for (int j = 0; j < share; ++j) total += bins[top - j];
  const U64 upto = sum_upto(total);
  if ((threadIdx.x & 31) == 31) warps[threadIdx.x / 32] = upto;
  __syncthreads();
  U64 before = upto - total;
  for (int w = 0; w < static_cast<int>(threadIdx.x / 32); ++w) before += warps[w];
  if (rank > before && rank <= before + total) {
    int bin = top;
    while (rank > before + bins[bin]) before += bins[bin--];
    found = {static_cast<uint32_t>(bin), before, static_cast<U64>(bins[bin])};
  }
  __syncthreads();
}

// A list's keys at clusters of neighbours, jittered inside equal strata of the group by a fixed hash. A block takes 64 of them.
template <bool kVariance>
__global__ void __launch_bounds__(kThreads) sample_kernel(View in, RuleView r, int filter, const Chunk* chunks, const int64_t* chunk_base,
                                                          const Search* searches, int lists, int ranks, uint32_t* sample) {
  const int list = static_cast<int>(blockIdx.y) % lists;
  const Search& s = searches[static_cast<int64_t>(blockIdx.y) * ranks];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVector / kCluster);
  if (first >= s.draws) return;
  const int64_t draw = min(s.draws - 1, first + threadIdx.x * kVector / kCluster), width = s.total / s.draws;
  const U64 jitter = (static_cast<U64>(draw) * 0x9E3779B97F4A7C15ull) >> 40;
  const int64_t at = draw * width + static_cast<int64_t>(jitter % static_cast<U64>(width));
  int64_t low = s.first_chunk, high = s.last_chunk;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (chunk_base[middle] <= at) low = middle;
    else high = middle;
  }
  const Chunk chunk = chunks[low];
  const int offset = static_cast<int>(threadIdx.x * kVector) % kCluster;
  const int64_t i = chunk.begin + (at - chunk_base[low]) / kCluster * kCluster + offset;
  const int n = within(chunk.end, i);
  Counters count;
  uint32_t key[kVector];
  keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, nullptr, count, key);
#pragma unroll
  for (int j = 0; j < kVector; ++j) sample[s.sample + draw * kCluster + offset + j] = j < n ? key[j] : kNone;
}

// Bracket one search's rank by 4 standard deviations of the sample: of a cluster's count within its stratum, measured by the differences
// of neighbouring strata. A bracket that misses costs time, never the answer.
__global__ void __launch_bounds__(kBracketThreads) bracket_kernel(Search* searches, const uint32_t* sample) {
  __shared__ uint32_t histogram[kBins];
  __shared__ Bin found;
  __shared__ U64 sums[3];
  __shared__ double spread[2][kBracketThreads];
  Search& s = searches[blockIdx.x];
  if (s.rank <= 0 || s.draws == 0) return;
  const uint32_t* keys = sample + s.sample;
  const int64_t size = s.draws * kCluster;
  auto total = [&](int64_t value, int slot) {  // over the block; a slot again only after another barrier
    if (threadIdx.x == 0) sums[slot] = 0;
    __syncthreads();
    add_count(reinterpret_cast<int64_t*>(sums + slot), value);
    __syncthreads();
    return static_cast<int64_t>(sums[slot]);
  };
  auto count = [&](auto&& wanted, int slot) {
    int64_t mine = 0;
    for (int64_t j = threadIdx.x; j < size; j += kBracketThreads) mine += keys[j] != kNone && wanted(keys[j]);
    return total(mine, slot);
  };
  auto pick = [&](int64_t rank) {  // the key with that many larger ones in the sample
    uint32_t digits = 0;
    U64 left = static_cast<U64>(rank) + 1;
    for (int shift = kDigit * (kDigits - 1); shift >= 0; shift -= kDigit) {
      for (int bin = threadIdx.x; bin < kBins; bin += kBracketThreads) histogram[bin] = 0;
      __syncthreads();
      for (int64_t j = threadIdx.x; j < size; j += kBracketThreads)
        if (keys[j] != kNone && static_cast<U64>(keys[j]) >> (shift + kDigit) == digits) atomicAdd(histogram + (keys[j] >> shift) % kBins, 1u);
      __syncthreads();
      find_bin<kBracketThreads>(histogram, left, found);
      digits = digits << kDigit | found.bin, left -= found.before;
    }
    return digits;
  };
  const int64_t m = count([](uint32_t) { return true; }, 0);
  const double centre = static_cast<double>(m) * static_cast<double>(s.rank) / static_cast<double>(s.total);
  const uint32_t middle = pick(min(m - 1, static_cast<int64_t>(centre)));
  auto counts = [&](int64_t cluster) {
    int2 c = {0, 0};  // above the middle; reaching it
    for (int j = 0; j < kCluster; ++j) {
      const uint32_t key = keys[cluster * kCluster + j];
      c.x += key != kNone && key > middle, c.y += key != kNone && key >= middle;
    }
    return c;
  };
  double above = 0.0, reached = 0.0;
  for (int64_t c = threadIdx.x; c + 1 < s.draws; c += kBracketThreads) {
    const int2 here = counts(c), next = counts(c + 1);
    above += 0.5 * (here.x - next.x) * (here.x - next.x), reached += 0.5 * (here.y - next.y) * (here.y - next.y);
  }
  spread[0][threadIdx.x] = above, spread[1][threadIdx.x] = reached;
  __syncthreads();
  for (int half = kBracketThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half)
      for (int a = 0; a < 2; ++a) spread[a][threadIdx.x] += spread[a][threadIdx.x + half];
    __syncthreads();
  }
  const double slack = 4.0 * sqrt(max(spread[0][0], spread[1][0])) + 3.0;
  const int64_t from = static_cast<int64_t>(floor(centre - slack)), to = static_cast<int64_t>(ceil(centre + slack));
  uint32_t hi = from < 0 ? 0x7fffffffu : pick(from), lo = to >= m ? 0 : pick(to), top = kNone, bottom = kNone;
  if (lo != hi) {  // else one heavy value, which is counted anyway
    const double heavy = max(8.0, static_cast<double>(m) * min(1.0 / 256, static_cast<double>(s.room) / static_cast<double>(s.total) / 8));
    if (static_cast<double>(count([&](uint32_t key) { return key == hi; }, 1)) > heavy) top = hi--;
    if (static_cast<double>(count([&](uint32_t key) { return key == lo; }, 2)) > heavy) bottom = lo++;
  }
  if (threadIdx.x == 0) s.lo = lo, s.hi = hi, s.top = top, s.bottom = bottom;
}

// The reading: count what lies above, inside and at the ends of each bracket, and store what lies inside. Neighbouring blocks are the
// lists of one run of chunks, so that the base comes out of the second-level cache for all but the first.
template <bool kVariance, int kRanks>
__global__ void __launch_bounds__(kThreads, kVariance ? 1 : 4 / kRanks) scan_kernel(View in, RuleView r, int filter, const Chunk* chunks, const int32_t* group_of,
                                                        int64_t chunk_count, int lists, Search* searches, U64* stored,
                                                        int64_t* ties, ReportView report) {
  extern __shared__ uint32_t stage[];  // [kRanks, kStage]: keys on their way to `stored`
  __shared__ uint16_t lanes[kThreads * kVector];
  __shared__ int staged[kRanks];
  __shared__ U64 place[kRanks];
  const int list = static_cast<int>(blockIdx.x) % lists, lane = static_cast<int>(threadIdx.x & 31);
  const int64_t run = blockIdx.x / lists, runs = gridDim.x / lists, from = chunk_count * run / runs, upto = chunk_count * (run + 1) / runs;
  const int64_t slots = chunk_count * lists * kRanks;
  if (threadIdx.x < kRanks) staged[threadIdx.x] = 0;
  __syncthreads();
  int over[kRanks] = {}, counted[kRanks][kSearched] = {};  // of this thread: a 256th of the run
  for (int64_t c = from; c < upto; ++c) {
    const Chunk chunk = chunks[c];
    Search* const mine = searches + (static_cast<int64_t>(group_of[c]) * lists + list) * kRanks;
    uint32_t lo[kRanks], hi[kRanks], top[kRanks], bottom[kRanks];
    bool store[kRanks];
#pragma unroll
    for (int q = 0; q < kRanks; ++q) {
      const Search& s = mine[q];
      lo[q] = s.lo, hi[q] = s.hi, top[q] = s.top, bottom[q] = s.bottom;
      store[q] = s.rank > 0 && s.lo < s.hi;
    }
    auto flush = [&] {  // after a barrier
      if (static_cast<int>(threadIdx.x) < kRanks && staged[threadIdx.x] != 0)
        place[threadIdx.x] = atomicAdd(&mine[threadIdx.x].stored, static_cast<U64>(staged[threadIdx.x]));
      __syncthreads();
      for (int q = 0; q < kRanks; ++q)
        for (int j = threadIdx.x; j < staged[q]; j += kThreads) {
          const int64_t at = static_cast<int64_t>(place[q]) + j;
          if (at < mine[q].room) stored[mine[q].store + at] = static_cast<U64>(stage[q * kStage + j]) << 32 | static_cast<U64>(c);
        }
      __syncthreads();
      if (threadIdx.x < kRanks) staged[threadIdx.x] = 0;
      __syncthreads();
    };
    Counters count;
    int here[kRanks][kSearched] = {}, higher[kRanks] = {};
    const int64_t step = kThreads * kVector, rounds = (chunk.end - chunk.begin + step - 1) / step;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t i = chunk.begin + round * step + threadIdx.x * kVector;
      const int n = within(chunk.end, i);
      uint32_t key[kVector];
      keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, lanes, count, key);
      bool full = false;
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        int inside = 0;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const bool is_top = key[j] == top[q], in_bracket = key[j] >= lo[q] && key[j] <= hi[q];
          higher[q] += j < n && key[j] > hi[q] && !is_top;
          here[q][kTop] += j < n && is_top, here[q][kBottom] += j < n && key[j] == bottom[q];
          inside += j < n && in_bracket;
        }
        here[q][kInside] += inside;
        if (!store[q] || __ballot_sync(0xffffffffu, inside != 0) == 0) continue;
        const int last = sum_upto(inside);
        int at = lane == 31 ? atomicAdd(staged + q, last) : 0;
        at = __shfl_sync(0xffffffffu, at, 31) + last - inside;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          if (j < n && key[j] >= lo[q] && key[j] <= hi[q]) stage[q * kStage + at++] = key[j];
        full = full || staged[q] > kStage - kThreads * kVector;
      }
      if (__syncthreads_or(full)) flush();  // the last warp to add sees all that was added
    }
    flush();
#pragma unroll
    for (int q = 0; q < kRanks; ++q) {
      const int64_t slot = (c * lists + list) * kRanks + q;
      over[q] += higher[q];
#pragma unroll
      for (int where = 0; where < kSearched; ++where) {
        counted[q][where] += here[q][where];
        if (where != kInside || !store[q]) add_count(ties + where * slots + slot, here[q][where]);
      }
    }
    if (c + 1 == upto || group_of[c + 1] != group_of[c]) {
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        add_count(reinterpret_cast<int64_t*>(&mine[q].over), over[q]);
        over[q] = 0;
#pragma unroll
        for (int where = 0; where < kSearched; ++where) {
          add_count(reinterpret_cast<int64_t*>(mine[q].count + where), counted[q][where]);
          counted[q][where] = 0;
        }
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
  }
}

// From the counts to the answer, or to where it must be looked for.
__global__ void settle_kernel(Search* searches, int count) {
  const int index = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (index >= count) return;
  Search& s = searches[index];
  if (s.rank <= 0) return;
  const int64_t over = static_cast<int64_t>(s.over), tops = static_cast<int64_t>(s.count[kTop]), inside = static_cast<int64_t>(s.count[kInside]),
                bottoms = static_cast<int64_t>(s.count[kBottom]), down_to = over + tops + inside;
  auto known = [&](Where place, uint32_t threshold, int64_t above, int64_t equal) {
    s.place = place, s.threshold = threshold, s.above = above, s.equal = equal;
  };
  s.missed = s.rank <= over || s.rank > down_to + bottoms;
  if (s.missed) return;
  if (s.rank <= over + tops) return known(kTop, s.top, over, tops);
  if (s.rank > down_to) return known(kBottom, s.bottom, down_to, bottoms);
  if (s.lo == s.hi) return known(kInside, s.lo, over + tops, inside);
  s.missed = inside > s.room;
  s.above = over + tops, s.left = s.rank - s.above;
}

// A search that missed starts again, over all keys.
__global__ void widen_kernel(Search* searches, int count) {
  const int index = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (index >= count || !searches[index].missed) return;
  Search& s = searches[index];
  s.lo = 0, s.hi = 0x7fffffffu, s.digits = 0, s.above = 0, s.left = s.rank;
}

__device__ __forceinline__ bool searching(const Search& s, bool missed) { return s.rank > 0 && s.place == kSearched && (s.missed != 0) == missed; }

__device__ __forceinline__ bool begins(const Search& s, uint32_t key, int shift) {  // with the digits known so far
  return key >= s.lo && key <= s.hi && static_cast<U64>(key - s.lo) >> (shift + kDigit) == s.digits;
}

// Histogram of the next digit over a search's stored keys, several blocks per search.
__global__ void __launch_bounds__(kThreads) stored_digit_kernel(const Search* searches, const U64* stored, int shift, U64* bins) {
  __shared__ uint32_t histogram[kBins];
  const Search& s = searches[blockIdx.y];
  if (!searching(s, false) || (s.hi - s.lo) >> shift == 0) return;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
  __syncthreads();
  for (int64_t j = blockIdx.x * kThreads + threadIdx.x; j < static_cast<int64_t>(s.stored); j += gridDim.x * kThreads) {
    const uint32_t key = static_cast<uint32_t>(stored[s.store + j] >> 32);
    if (begins(s, key, shift)) atomicAdd(histogram + ((key - s.lo) >> shift) % kBins, 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    if (histogram[bin] != 0) atomicAdd(bins + static_cast<int64_t>(blockIdx.y) * kBins + bin, static_cast<U64>(histogram[bin]));
}

// The same over the tensors, for searches that missed; with kTies, per chunk, how many keys equal the threshold.
template <bool kVariance, bool kTies>
__global__ void __launch_bounds__(kThreads) refine_kernel(View in, RuleView r, int filter, const Chunk* chunks, const Search* searches,
                                                          const int32_t* group_of, int lists, int ranks, int shift, U64* bins, int64_t* ties) {
  __shared__ uint16_t lanes[kThreads * kVector];
  __shared__ uint32_t histogram[kBins];
  const int64_t c = blockIdx.x / lists;
  const int list = static_cast<int>(blockIdx.x) % lists;
  const Chunk chunk = chunks[c];
  Counters count;
  const int64_t step = kThreads * kVector, rounds = (chunk.end - chunk.begin + step - 1) / step;
  for (int q = 0; q < ranks; ++q) {
    const int64_t index = (static_cast<int64_t>(group_of[c]) * lists + list) * ranks + q;
    const Search& s = searches[index];
    if (!s.missed) continue;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
    int64_t found = 0;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t i = chunk.begin + round * step + threadIdx.x * kVector;
      const int n = within(chunk.end, i);
      uint32_t key[kVector];
      keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, lanes, count, key);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (kTies) found += j < n && key[j] == s.threshold;
        else if (j < n && begins(s, key[j], shift)) atomicAdd(histogram + ((key[j] - s.lo) >> shift) % kBins, 1u);
      }
    }
    if (kTies) add_count(ties + (c * lists + list) * ranks + q, found);
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins && !kTies; bin += kThreads)
      if (histogram[bin] != 0) atomicAdd(bins + index * kBins + bin, static_cast<U64>(histogram[bin]));
    __syncthreads();
  }
}

// One block per search: the next digit of the answer; after the last one the answer.
__global__ void __launch_bounds__(kThreads) digit_kernel(Search* searches, int shift, U64* bins, bool missed) {
  __shared__ Bin found;
  Search& s = searches[blockIdx.x];
  if (!searching(s, missed)) return;
  U64* const mine = bins + static_cast<int64_t>(blockIdx.x) * kBins;
  const uint32_t span = s.hi - s.lo;
  if (span >> shift != 0) find_bin<kThreads>(mine, static_cast<U64>(s.left), found);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) mine[bin] = 0;  // for the next digit
  if (threadIdx.x != 0) return;
  if (span >> shift != 0) {
    s.digits = s.digits << kDigit | found.bin, s.left -= static_cast<int64_t>(found.before);
    s.above += static_cast<int64_t>(found.before), s.equal = static_cast<int64_t>(found.here);
  }
  if (shift == 0) s.threshold = s.lo + s.digits;
}

// Per chunk, how many stored keys equal the threshold.
__global__ void __launch_bounds__(kThreads) stored_ties_kernel(const Search* searches, const U64* stored, int lists, int ranks, int64_t* ties) {
  const Search& s = searches[blockIdx.y];
  if (!searching(s, false) || s.rank - s.above >= s.equal) return;
  const int64_t pair = static_cast<int64_t>(blockIdx.y) % (lists * ranks);
  for (int64_t j = blockIdx.x * kThreads + threadIdx.x; j < static_cast<int64_t>(s.stored); j += gridDim.x * kThreads) {
    const U64 one = stored[s.store + j];
    if (one >> 32 == s.threshold) atomicAdd(reinterpret_cast<U64*>(ties) + static_cast<int64_t>(one & 0xffffffffu) * lists * ranks + pair, U64{1});
  }
}

// One warp per search: the chunk in which the quota of ties runs out, then the element.
template <bool kVariance>
__global__ void cut_kernel(View in, RuleView r, int filter, const Chunk* chunks, const int64_t* chunk_base, Search* searches, int64_t chunk_count,
                           int lists, int ranks, const int64_t* ties) {
  __shared__ uint16_t lanes[kThreads * kVector];
  Search& s = searches[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) % (lists * ranks);
  const int list = static_cast<int>(pair) / ranks;
  int64_t quota = s.rank - s.above, c = s.first_chunk;
  if (s.rank <= 0 || quota >= s.equal) return;  // every tie is kept: the cut stays at the end
  const int64_t* const mine_of = ties + s.place * chunk_count * lists * ranks + pair;
  while (c < s.last_chunk) {  // 32 chunks at a time
    const int64_t mine = c + lane < s.last_chunk ? mine_of[(c + lane) * lists * ranks] : 0, upto = sum_upto(mine);
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
    const int n = within(chunk.end, i);
    uint32_t key[kVector];
    keys8<kVariance>(in, r, filter, chunk.tensor, list, i, n, lanes, count, key);
    int64_t mine = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) mine += j < n && key[j] == s.threshold;
    const int64_t upto = sum_upto(mine), before = upto - mine;
    if (before < quota && upto >= quota) {
      int64_t left = quota - before;
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (j < n && key[j] == s.threshold && --left == 0) s.cut = chunk_base[c] + i + j - chunk.begin;
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

// Run the searches; they come back with their answers.
template <bool kVariance>
int32_t run_searches(Arena& arena, const View& view, const RuleView& rule, int filter, const std::vector<Chunk>& read,
                     const std::vector<int32_t>& group_of, const std::vector<int64_t>& chunk_base, std::vector<Search>& searches, int lists,
                     int ranks, const ReportView& report) {
  int64_t sample_size = 0, stored_size = 0, most_draws = 0, most_room = 0;
  for (const Search& s : searches) {
    sample_size = std::max(sample_size, s.sample + s.draws * kCluster), stored_size = std::max(stored_size, s.store + s.room);
    most_draws = std::max(most_draws, s.draws), most_room = std::max(most_room, s.room);
  }
  const unsigned count = static_cast<unsigned>(searches.size()), thread_blocks = (count + kThreads - 1) / kThreads;
  const int64_t chunk_count = static_cast<int64_t>(read.size()), slots = chunk_count * lists * ranks;
  const Chunk* chunks = arena.up(read.data(), read.size());
  const int32_t* groups = arena.up(group_of.data(), group_of.size());
  const int64_t* base = arena.up(chunk_base.data(), chunk_base.size());
  Search* device = const_cast<Search*>(arena.up(searches.data(), searches.size()));
  uint32_t* sample = arena.raw<uint32_t>(static_cast<size_t>(sample_size));
  U64* stored = arena.raw<U64>(static_cast<size_t>(stored_size));
  U64* bins = arena.zeros<U64>(static_cast<size_t>(count) * kBins);
  int64_t* ties = arena.zeros<int64_t>(static_cast<size_t>(slots * kPlaces));
  int gpu = 0, processors = 0;
  arena.note(cudaGetDevice(&gpu));
  arena.note(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, gpu));
  if (arena.status() != 0) return arena.status();
  if (most_draws > 0) {
    const int64_t per_block = kThreads * kVector / kCluster;
    const dim3 grid(static_cast<unsigned>((most_draws + per_block - 1) / per_block), count / static_cast<unsigned>(ranks));
    sample_kernel<kVariance><<<grid, kThreads, 0, arena.stream()>>>(view, rule, filter, chunks, base, device, lists, ranks, sample);
    bracket_kernel<<<count, kBracketThreads, 0, arena.stream()>>>(device, sample);
  }
  const unsigned runs = static_cast<unsigned>(std::min<int64_t>(chunk_count, std::max(1, kRunsPerProcessor * processors)));
  const auto scan = ranks == 1 ? scan_kernel<kVariance, 1> : scan_kernel<kVariance, kMaxRanks>;
  scan<<<runs * static_cast<unsigned>(lists), kThreads, static_cast<size_t>(ranks) * kStage * 4, arena.stream()>>>(
      view, rule, filter, chunks, groups, chunk_count, lists, device, stored, ties, report);
  settle_kernel<<<thread_blocks, kThreads, 0, arena.stream()>>>(device, static_cast<int>(count));
  const dim3 shared_out(static_cast<unsigned>(std::min<int64_t>(128, 1 + most_room / (kThreads * 32))), count);
  for (int shift = kDigit * (kDigits - 1); shift >= 0; shift -= kDigit) {
    stored_digit_kernel<<<shared_out, kThreads, 0, arena.stream()>>>(device, stored, shift, bins);
    digit_kernel<<<count, kThreads, 0, arena.stream()>>>(device, shift, bins, false);
  }
  stored_ties_kernel<<<shared_out, kThreads, 0, arena.stream()>>>(device, stored, lists, ranks, ties + kSearched * slots);
  cut_kernel<kVariance><<<count, 32, 0, arena.stream()>>>(view, rule, filter, chunks, base, device, chunk_count, lists, ranks, ties);
  arena.launched();
  searches = arena.down(device, searches.size());
  if (std::any_of(searches.begin(), searches.end(), [](const Search& s) { return s.missed != 0; })) {
    const unsigned grid = static_cast<unsigned>(chunk_count * lists);
    widen_kernel<<<thread_blocks, kThreads, 0, arena.stream()>>>(device, static_cast<int>(count));
    for (int shift = kDigit * (kDigits - 1); shift >= 0; shift -= kDigit) {
      refine_kernel<kVariance, false><<<grid, kThreads, 0, arena.stream()>>>(view, rule, filter, chunks, device, groups, lists, ranks, shift, bins,
                                                                             nullptr);
      digit_kernel<<<count, kThreads, 0, arena.stream()>>>(device, shift, bins, true);
    }
    refine_kernel<kVariance, true><<<grid, kThreads, 0, arena.stream()>>>(view, rule, filter, chunks, device, groups, lists, ranks, 0, nullptr,
                                                                          ties + kSearched * slots);
    cut_kernel<kVariance><<<count, 32, 0, arena.stream()>>>(view, rule, filter, chunks, base, device, chunk_count, lists, ranks, ties);
    arena.launched();
    searches = arena.down(device, searches.size());
  }
  return arena.status();
}

// The searches of consecutive groups: as many as fit the room for stored keys.
template <bool kVariance>
int32_t select_slab(Arena& arena, const M2rlTensors& in, const View& view, const RuleView& rule, int filter, const M2rlSelect& want,
                    const std::vector<Chunk>& all, const std::vector<int64_t>& chunk_first, int64_t g0, int64_t g1, const ReportView& report) {
  const int lists = kVariance ? 1 : static_cast<int>(in.experts), ranks = want.ranks;
  std::vector<Chunk> read;  // of groups that need it
  std::vector<int32_t> group_of;
  std::vector<int64_t> chunk_base;
  std::vector<Search> searches;
  int64_t sample_size = 0, stored_size = 0;
  for (int64_t g = g0; g < g1; ++g) {
    Search s{};
    const int64_t first = chunk_first[static_cast<size_t>(g)], last = chunk_first[static_cast<size_t>(g + 1)];
    for (int64_t c = first; c < last; ++c) s.total += all[static_cast<size_t>(c)].end - all[static_cast<size_t>(c)].begin;
    const int64_t* rank = want.rank + g * lists * ranks;
    const bool needed = std::any_of(rank, rank + lists * ranks, [&](int64_t r) { return r > 0 && r < s.total; });
    s.first_chunk = static_cast<int64_t>(read.size());
    for (int64_t c = first, base = 0; needed && c < last; ++c) {
      read.push_back(all[static_cast<size_t>(c)]);
      group_of.push_back(static_cast<int32_t>(g - g0));
      chunk_base.push_back(base);
      base += read.back().end - read.back().begin;
    }
    s.last_chunk = static_cast<int64_t>(read.size());
    s.draws = !needed || s.total <= kWhole ? 0 : std::min<int64_t>(kMostDraws, std::max<int64_t>(128, s.total / 2048));
    s.hi = 0x7fffffffu, s.top = s.bottom = kNone, s.place = kSearched, s.cut = s.total - 1;
    for (int list = 0; list < lists; ++list, sample_size += s.draws * kCluster)
      for (int q = 0; q < ranks; ++q) {
        const int64_t wanted = rank[list * ranks + q];
        s.rank = wanted >= s.total ? 0 : std::max<int64_t>(wanted, 0);  // nothing or everything: answered on the host
        s.sample = sample_size, s.store = stored_size, s.room = s.rank == 0 ? 0 : room_for(s.total);
        stored_size += s.room;
        searches.push_back(s);
      }
  }
  if (!read.empty()) {
    const int32_t status = run_searches<kVariance>(arena, view, rule, filter, read, group_of, chunk_base, searches, lists, ranks, report);
    if (status != 0) return status;
  }
  for (size_t i = 0; i < searches.size(); ++i) {
    const size_t slot = static_cast<size_t>(g0 * lists * ranks) + i;
    const Search& s = searches[i];
    const bool none = want.rank[slot] <= 0, everything = !none && s.rank == 0;
    want.threshold[slot] = none ? 0xffffffffu : everything ? 0 : s.threshold;
    want.cut[slot] = none ? -1 : s.cut;
    if (want.above != nullptr) want.above[slot] = everything ? -1 : s.above;
    if (want.equal != nullptr) want.equal[slot] = everything ? -1 : s.equal;
  }
  return 0;
}

}  // namespace

int32_t m2rl_merge_select_cuda(const M2rlTensors* in, const M2rlRule* rule, const M2rlSelect* want, const M2rlReport* report, int64_t chunk,
                               void* stream) {
  if (ranked(*rule) || in->experts > kMaxExperts || want->ranks > kMaxRanks) return -ENOTSUP;
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
  const int filter = rule->filter & (M2RL_RANDOM | M2RL_SCALE);
  const auto run = want->key == 0 ? select_slab<false> : select_slab<true>;
  auto room = [&](int64_t g) {  // for the stored keys of a group
    int64_t total = 0;
    for (int64_t t = want->start[g]; t < want->start[g + 1]; ++t) total += in->numel[t];
    return room_for(total) * lists * want->ranks;
  };
  for (int64_t g = 0, end = 0; g < want->groups; g = end) {
    int64_t taken = room(end++);
    while (end < want->groups && (end - g) * lists * want->ranks < kMostSearches && taken + room(end) <= kSlab) taken += room(end++);
    Arena scratch(static_cast<cudaStream_t>(stream));
    const int32_t status = run(scratch, *in, view, rules, filter, *want, chunks, chunk_first, g, end, counters.view);
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
