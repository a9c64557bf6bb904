// The table of contents of m2rl's native libraries: every exported function, on raw pointers, sizes and a stream.
// Plain C ABI; knows nothing of torch or Python. CPU functions are in libm2rl_cpu, those ending in _cuda in libm2rl_cuda.
#pragma once
#include <cstdint>

#define M2RL_API extern "C" __attribute__((visibility("default")))

// Version of this table; native.py refuses a library with another number (a stale build).
#define M2RL_ABI_VERSION 4
M2RL_API int32_t m2rl_abi_version();
M2RL_API int32_t m2rl_cuda_abi_version();

// Storage types, shared with native.py.
enum M2rlDtype : int32_t { M2RL_F32 = 0, M2RL_BF16 = 1, M2RL_F16 = 2 };

// ---- merge: batched sparse merging of T tensors x K experts (merge.cpp, merge.cu; Python: m2rl_kernels/delta_merge.py) ----
// d_k = expert_k - base, filtered (top-k, random mask, variance), combined (sum, sign election, ...), base + lambda * result.
// All arithmetic is float32 in expert order without contraction; results do not depend on threads, chunk or instruction set.
struct M2rlTensors {
  int64_t tensors, experts;       // T, K
  const int64_t* numel;           // [T]
  const int64_t* row;             // [T] elements per row (last axis); DELLA ranks within rows
  const int64_t* offset;          // [T] flat index of element 0 within its whole tensor: 0, or where a shard starts
  const void* const* base;        // [T] or null for combine = linear
  const int32_t* base_dtype;      // [T] M2rlDtype
  const void* const* expert;      // [T*K]
  const int32_t* expert_dtype;    // [T*K]
};
enum M2rlFilter : int32_t { M2RL_RANDOM = 1, M2RL_MAGNITUDE = 2, M2RL_VARIANCE = 4, M2RL_SCALE = 8 };  // applied in this order
enum M2rlCombine : int32_t { M2RL_LINEAR = 0, M2RL_SUM = 1, M2RL_ELECT = 2, M2RL_RAM = 3 };
struct M2rlRule {
  int32_t filter, combine, round, normalize;  // round: dtype of every intermediate; normalize: divide by the weights that count
  float den_floor, den_substitute;            // a divisor below the floor is replaced
  float epsilon;                              // RAM: |d| above it counts as changed
  int32_t inverse_keep;                       // DELLA: multiply what is kept by 1 / its own keep probability
  const float* weight;            // [T*K]
  const float* elect;             // [T*K] weights of the sign election
  const float* scale;             // [T*K] factor after the filters (DARE rescale, RAM+ lambda)
  const float* lambda;            // [T]
  const float* divisor;           // [T] for linear and sum
  const int8_t* zero_sign;        // [T] elected sign where the sum is 0: +1, -1, or 0 for none
  const uint32_t* low_key; const int64_t* low_cut;    // [T*K] keep key > low_key, or == and flat index <= low_cut
  const uint32_t* high_key; const int64_t* high_cut;  // [T*K] or null: and drop what this pair would keep (breadcrumbs)
  const uint32_t* variance_key; const int64_t* variance_cut;  // [T]
  const uint64_t* random_key;     // [T] Philox key: hash of (seed, tensor name)
  const uint32_t* expert_id;      // [K]
  const double* keep;             // [T*K] keep probability
  const double* spread;           // [T*K] or null; above 0: keep probability runs from keep - spread to keep + spread by rank (DELLA)
};
struct M2rlOutput {
  void* const* address;           // [T] or null: write to files
  const int32_t* file; const int64_t* position;  // [T] descriptor and byte offset
  const int32_t* dtype;           // [T]
};
struct M2rlReport {               // any pointer may be null; counters are added to
  int64_t* nonfinite;             // [T*(K+1)] NaN or infinite inputs: base, experts
  int64_t* overflow;              // [T] NaN or infinite outputs
  int64_t* nonzero;               // [T*K] elements with d != 0
  int64_t* changed;               // [T] outputs whose stored bits differ from the base's
  uint64_t* checksum;             // [T*(K+2)] base, experts, output
  int64_t* elements;              // [1] CPU only: merged elements looked at so far, to be watched meanwhile
};
struct M2rlSums {                 // any pointer may be null
  double* abs_before;             // [T*K] sum |d| before the filters
  double* abs_after;              // [T*K] and after, before scale
  double* square;                 // [T*K] sum d^2 after the filters
  double* gram;                   // [T*K*K] sum d_i d_j (no filters); of experts themselves if base is null
  int64_t* sign;                  // [T] (positive) - (negative) of the elected sums
  int64_t* variance_nonzero;      // [T] CUDA only: the CPU counts them while it selects
  int64_t* unique; int64_t* shared;  // [T*K] RAM
};
struct M2rlSelect {               // exact top-k: groups of consecutive tensors, K lists each (one list for the variance)
  int32_t key, ranks;             // 0 magnitude of d, 1 variance over experts; R ranks per list
  int64_t groups;                 // G
  const int64_t* start;           // [G+1] first tensor of each group
  const int64_t* rank;            // [G*L*R] how many to keep, or null:
  const double* share;            // [G*L*R] keep floor(share * how many keys are not zero); everything from 1 on
  uint32_t* threshold;            // [G*L*R] keep key > threshold, or == and flat index in the group <= cut
  int64_t* cut;
  int64_t* above; int64_t* equal; // [G*L*R] how many are above and at the threshold (-1 where no scan was needed)
};
M2RL_API int32_t m2rl_merge_select(const M2rlTensors*, const M2rlRule*, const M2rlSelect*, const M2rlReport*, int64_t chunk, int32_t threads);
M2RL_API int32_t m2rl_merge_sums(const M2rlTensors*, const M2rlRule*, const M2rlSums*, const M2rlReport*, int64_t chunk, int32_t threads);
// 0, or the errno of a failed write
M2RL_API int32_t m2rl_merge_apply(const M2rlTensors*, const M2rlRule*, const M2rlOutput*, const M2rlReport*, int64_t chunk, int32_t threads);
// The same on device addresses; the tables stay on the host. At most 8 experts, no DELLA, output in memory: -ENOTSUP otherwise;
// a failed CUDA call is -1000 - its cudaError_t.
M2RL_API int32_t m2rl_merge_select_cuda(const M2rlTensors*, const M2rlRule*, const M2rlSelect*, const M2rlReport*, int64_t chunk, void* stream);
M2RL_API int32_t m2rl_merge_sums_cuda(const M2rlTensors*, const M2rlRule*, const M2rlSums*, const M2rlReport*, int64_t chunk, void* stream);
M2RL_API int32_t m2rl_merge_apply_cuda(const M2rlTensors*, const M2rlRule*, const M2rlOutput*, const M2rlReport*, int64_t chunk, void* stream);
M2RL_API uint64_t m2rl_merge_checksum(const void* bytes, int64_t size, int32_t threads);
M2RL_API int32_t m2rl_merge_isa_limit(int32_t limit);  // tests: 0 base, 1 AVX2, 2 AVX-512; returns what will run

// ---- packing (pack.cpp, pack.cu; Python: m2rl_kernels/packing.py) ----
// order [n] and bin_offsets [n + 2 * world_size + 1]: sequences bin by bin, bins rank by rank. Returns the number of bins.
// lengths in [0, max_tokens]; costs rise with lengths; tolerance: imbalance above which one more bin per rank is tried.
M2RL_API int64_t m2rl_plan_packing(const int64_t* lengths, const double* costs, int64_t n, int64_t max_tokens, int64_t world_size,
                                   double tolerance, int64_t* order, int64_t* bin_offsets);
// Rows [src_start, +length) of every field to rows [dst_start, +length). shift 1: the row after, and `fill` (row_bytes <= 8 bytes
// of it) in each sequence's last row.
M2RL_API void m2rl_pack_rows(int32_t n_fields, const void* const* src, void* const* dst, const int64_t* row_bytes,
                             const int32_t* shift, const int64_t* fill, int64_t n_seqs, const int64_t* src_start,
                             const int64_t* dst_start, const int64_t* lengths);
// The same in one launch, at most 16 fields. The tables of sequences are on the device, those of fields on the host; first_row
// [n_seqs]: running sum of lengths; rows: their sum. Returns a cudaError_t.
M2RL_API int32_t m2rl_pack_rows_cuda(int32_t n_fields, const void* const* src, void* const* dst, const int64_t* row_bytes,
                                     const int32_t* shift, const int64_t* fill, int64_t rows, int64_t n_seqs,
                                     const int64_t* src_start, const int64_t* dst_start, const int64_t* lengths,
                                     const int64_t* first_row, void* stream);

// ---- group advantages (advantages.cpp; Python: m2rl_kernels/advantages.py) ----
// rewards, adv, mean, std and token_adv are float or double; group g is [offsets[g], offsets[g + 1]), from 0 to the end. mode: 0 grpo,
// 1 dr_grpo, 2 rloo, 3 batch_std. live: 0 or 1. With cu_seqlens [samples + 1] every token gets its sample's advantage.
M2RL_API void m2rl_group_advantages(int32_t is_double, const void* rewards, const int64_t* offsets, int64_t groups, int32_t mode,
                                    double eps, const int64_t* cu_seqlens, void* adv, void* mean, void* std, uint8_t* live,
                                    void* token_adv);

// ---- softmax rows (softmax.cpp; Python: m2rl_kernels/linear_logprob.py, token_logprob.py) ----
// z [rows, columns], columns at most 4096: p = softmax(z * scale), scale > 0. logp [rows] = log p at the target, NaN for a target
// outside [0, columns); plogp [rows] or null: sum p log p; grad [rows, columns] or null (it may be z): p, less 1 at
// the target, times weight [rows] unless that is null.
M2RL_API void m2rl_softmax_rows(const float* z, int64_t rows, int64_t columns, float scale, const int64_t* target, const float* weight,
                                float* grad, float* logp, float* plogp, int32_t threads);

// ---- policy loss (policy_loss.cpp; Python: m2rl_kernels/policy_loss.py) ----
enum M2rlLossKind : int32_t { M2RL_GRPO = 0, M2RL_CISPO = 1, M2RL_GSPO = 2, M2RL_REINFORCE = 3 };  // KINDS
enum M2rlKl : int32_t { M2RL_K1 = 0, M2RL_K2 = 1, M2RL_K3 = 2 };                                    // KLS
struct M2rlPolicyLoss {
  int64_t tokens, sequences, segments;
  const float *logp, *behaviour, *advantage, *weight, *old_logp, *ref_logp, *entropy;  // [tokens]; behaviour, old_logp, ref_logp
                                                                                       // and entropy may be null
  const int32_t* cu_seqlens;  // [sequences + 1], read for gspo
  const int64_t* segment;     // [tokens] row of stats, outside [0, segments): none; or null: row 0
  float *grad_logp, *grad_entropy;  // [tokens]; grad_entropy null: the entropy is only measured
  float *loss, *stats;              // [1], [segments * 15]
  int32_t kind, kl;
  float ratio_low, ratio_high, dual_clip, tis_cap, kl_coef, entropy_coef;  // dual_clip, tis_cap 0: off
};
M2RL_API void m2rl_policy_loss(const M2rlPolicyLoss* args);

// ---- weight synchronisation (sync.cpp, sync.cu; Python: m2rl_kernels/weight_sync.py) ----
// One strided 2-D copy; strides in elements. `tensor` and dst_first (flat index of dst[0] in its tensor) serve the checksum.
struct M2rlCopy {
  const void* src;
  void* dst;
  int64_t rows, columns, src_stride, dst_stride, tensor, dst_first;
};
M2RL_API void m2rl_sync_copy(const M2rlCopy* copies, int64_t n, int32_t src_dtype, int32_t dst_dtype, int32_t threads);
// sums[2 * tensor + 0, 1] += the two hashes of what m2rl_sync_copy would write; nothing is written.
M2RL_API void m2rl_sync_checksum(const M2rlCopy* copies, int64_t n, int32_t src_dtype, int32_t dst_dtype, uint64_t* sums,
                                 int32_t threads);
// The same in one launch. The table is on the device; first_tile [n]: running sum of ceil(rows * columns / 16384), tiles: the total.
M2RL_API int32_t m2rl_sync_copy_cuda(const M2rlCopy* copies, const int64_t* first_tile, int64_t n, int64_t tiles,
                                     int32_t src_dtype, int32_t dst_dtype, void* stream);
M2RL_API int32_t m2rl_sync_checksum_cuda(const M2rlCopy* copies, const int64_t* first_tile, int64_t n, int64_t tiles,
                                         int32_t src_dtype, int32_t dst_dtype, uint64_t* sums, void* stream);

// ---- delta statistics (stats.cpp; Python: m2rl_kernels/delta_stats.py); M models ----
// sums [M*M gram, M sum |d|, M max |d|] and counts [M*M both, M*M agree, M changed, M*256 exponents] are added to (max: replaced
// if larger). Of the M*M the upper triangle and the diagonal are filled.
M2RL_API void m2rl_delta_stats(int64_t numel, int32_t models, const void* base, int32_t base_dtype, const void* const* x,
                               const int32_t* x_dtype, double* sums, int64_t* counts, int32_t threads);
// sketch [size] += that of x, or of x - base; size at most 2^31.
M2RL_API void m2rl_count_sketch(int64_t numel, const void* x, int32_t x_dtype, const void* base, int32_t base_dtype, uint64_t key,
                                int64_t size, double* sketch, int32_t threads);
