// The table of contents of m2rl's native libraries: every exported function, on raw pointers, sizes and a stream.
// Plain C ABI; knows nothing of torch or Python. CPU functions are in libm2rl_cpu, those ending in _cuda in libm2rl_cuda.
#pragma once
#include <cstdint>

#define M2RL_API extern "C" __attribute__((visibility("default")))

// Version of this table; native.py refuses a library with another number (a stale build).
#define M2RL_ABI_VERSION 1
M2RL_API int32_t m2rl_abi_version();
M2RL_API int32_t m2rl_cuda_abi_version();

// Storage types, shared with native.py.
enum M2rlDtype : int32_t { M2RL_F32 = 0, M2RL_BF16 = 1, M2RL_F16 = 2 };
