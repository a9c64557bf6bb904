// Which instruction set to run: cpuid, once. csrc/<name>.isa.h is compiled for each (see CMakeLists.txt).
#pragma once

namespace m2rl {

enum Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest set this machine has, never above `limit` (tests compare the variants by lowering it).
inline int best_isa(int limit) {
#if defined(__x86_64__)
  int best = kBase;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) best = kAvx2;
  if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    best = kAvx512;
  return best < limit ? best : limit;
#else
  (void)limit;
  return kBase;
#endif
}

inline int this_isa() {
  static const int isa = best_isa(kAvx512);
  return isa;
}

// Of <table>_base, <table>_avx2 and <table>_avx512, the one for an instruction set.
#if defined(__x86_64__)
#define M2RL_VARIANT(table, isa) ((isa) == kAvx512 ? table##_avx512 : (isa) == kAvx2 ? table##_avx2 : table##_base)
#else
#define M2RL_VARIANT(table, isa) (static_cast<void>(isa), table##_base)
#endif

}  // namespace m2rl
