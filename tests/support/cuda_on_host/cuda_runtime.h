// As much of CUDA as csrc/*.cu uses, on the host: a block's threads are fibers of one thread, so that every kernel can be run and
// compared where there is no GPU. It is strict where a GPU is silent: device memory starts as garbage and ends at an inaccessible
// page, vector accesses must be aligned, and a barrier or a warp's exchange that some thread misses ends the process. Blocks run
// one after the other; of a block's threads the first that can go on does, or the last after emulated_order(1), as far as it can:
// a missing barrier shows. What hangs on real concurrency or on time does not.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct int2 { int x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u,%u of %u,%u, thread %u)\n", what, blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, threadIdx.x);
  std::abort();
}

// Memory that ends, to 16 bytes, where an inaccessible page begins.
class Guarded {
 public:
  void* allocate(size_t bytes) {
    const size_t used = (bytes + 15) / 16 * 16, pages = (used + kPage - 1) / kPage * kPage;
    char* start = static_cast<char*>(mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start == MAP_FAILED || mprotect(start + pages, kPage, PROT_NONE) != 0) die("no memory");
    std::memset(start, 0xa5, pages);
    blocks_[start + pages - used] = {start, pages + kPage};
    return start + pages - used;
  }
  void release(void* p) {
    const auto found = blocks_.find(static_cast<char*>(p));
    if (found == blocks_.end()) die("freed what was not allocated");
    munmap(found->second.first, found->second.second);
    blocks_.erase(found);
  }

 private:
  static constexpr size_t kPage = 4096;
  std::map<char*, std::pair<char*, size_t>> blocks_;
};
inline Guarded memory;

// Threads [first, first + members) of a block meet here: all of them, or the lanes of a warp.
struct Barrier {
  unsigned first = 0, members = 0, arrived = 0, passed = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][32];
  const char* operation = nullptr;
};

struct Fiber {
  ucontext_t start;
  std::vector<char> stack;
  jmp_buf resume;
};

constexpr size_t kStack = 256 << 10;
constexpr unsigned kMostThreads = 1024;
inline Fiber fibers[kMostThreads];
inline uint64_t runnable[kMostThreads / 64];  // a bit per thread of the block that can go on
inline unsigned running = 0;                  // threads of the block that have not ended
inline std::vector<Warp> warps;
inline Barrier block;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline char* dynamic_shared = nullptr;
inline bool last_first = false;

inline void set_runnable(unsigned i, bool yes) {
  const uint64_t bit = uint64_t{1} << i % 64;
  runnable[i / 64] = yes ? runnable[i / 64] | bit : runnable[i / 64] & ~bit;
}

inline unsigned next_runnable() {
  for (unsigned n = 0; n < kMostThreads / 64; ++n) {
    const unsigned word = last_first ? kMostThreads / 64 - 1 - n : n;
    const uint64_t bits = runnable[word];
    if (bits != 0) return 64 * word + static_cast<unsigned>(last_first ? 63 - __builtin_clzll(bits) : __builtin_ctzll(bits));
  }
  die("threads wait at a barrier that others never reach");
}

inline void leave() {  // for the scheduler; back when it chooses this thread again
  if (_setjmp(fibers[threadIdx.x].resume) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived < barrier.members) {
    set_runnable(threadIdx.x, false);
    return leave();
  }
  barrier.arrived = 0, ++barrier.passed;
  for (unsigned i = 0; i < barrier.members; ++i) set_runnable(barrier.first + i, true);
}

inline void run_fiber() {
  for (;;) {  // a fiber serves block after block
    body();
    set_runnable(threadIdx.x, false), --running;
    leave();
  }
}

inline void start(Fiber& fiber) {
  fiber.stack.resize(kStack);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data(), fiber.start.uc_stack.ss_size = kStack, fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline void run_block(unsigned threads) {
  if (threads > kMostThreads) die("too many threads");
  running = threads, block = {0, threads, 0, 0};
  warps.assign((threads + 31) / 32, Warp{});
  for (unsigned w = 0; w < warps.size(); ++w) warps[w].barrier = {32 * w, std::min(32u, threads - 32 * w), 0, 0};
  for (unsigned i = 0; i < threads; ++i) set_runnable(i, true);
  while (running != 0) {
    threadIdx = dim3(next_runnable());
    if (_setjmp(scheduler) != 0) continue;
    Fiber& fiber = fibers[threadIdx.x];
    if (!fiber.stack.empty()) _longjmp(fiber.resume, 1);
    start(fiber);
  }
}

struct Launch {
  dim3 grid, threads;
  size_t shared = 0;
  void* stream = nullptr;

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    gridDim = grid, blockDim = threads;
    dynamic_shared = static_cast<char*>(memory.allocate(shared));
    body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        std::memset(dynamic_shared, 0xa5, shared);
        run_block(threads.x);
      }
    memory.release(dynamic_shared);
  }
};

// Every lane's value of one exchange; a slot is overwritten only after all have met again.
inline const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value) {
  Warp& warp = warps[threadIdx.x / 32];
  if (mask != 0xffffffffu || warp.barrier.members != 32) die("an exchange of less than a warp");
  if (warp.barrier.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0) die("the lanes of a warp meet at different operations");
  uint64_t* slot = warp.slot[warp.barrier.passed & 1];
  slot[threadIdx.x % 32] = value;
  wait(warp.barrier);
  return slot;
}

template <typename T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
void aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) die("a misaligned vector access");
}

}  // namespace emulated

extern "C" __attribute__((visibility("default"), used)) inline void emulated_order(int last_first) { emulated::last_first = last_first != 0; }

// ---- in a kernel ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

inline void __syncthreads() { emulated::wait(emulated::block); }
inline bool __syncthreads_or(int predicate) {
  static bool any[2];  // of this barrier and of the next, which begins only when all have left this one
  const unsigned which = emulated::block.passed & 1;
  if (emulated::block.arrived == 0) any[which] = false;
  any[which] |= predicate != 0;
  emulated::wait(emulated::block);
  return any[which];
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::exchange("syncwarp", mask, 0); }
inline bool __all_sync(unsigned mask, int predicate) {
  const uint64_t* all = emulated::exchange("all", mask, predicate != 0);
  return std::all_of(all, all + 32, [](uint64_t x) { return x != 0; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = emulated::exchange("ballot", mask, predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulated::unpacked<T>(emulated::exchange("shfl", mask, emulated::packed(value))[from % 32]);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const uint64_t* all = emulated::exchange("shfl_down", mask, emulated::packed(value));
  const int from = static_cast<int>(threadIdx.x % 32) + by;
  return from < 32 ? emulated::unpacked<T>(all[from]) : value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const uint64_t* all = emulated::exchange("shfl_up", mask, emulated::packed(value));
  const int from = static_cast<int>(threadIdx.x % 32) - by;
  return from >= 0 ? emulated::unpacked<T>(all[from]) : value;
}
template <typename T>
T atomicAdd(T* where, T value) {
  const T before = *where;
  *where = before + value;
  return before;
}
template <typename T>
T __ldg(const T* p) {
  emulated::aligned(p);
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  emulated::aligned(p);
  *p = value;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(uint32_t x) { return emulated::unpacked<float>(x); }
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(emulated::packed(x)); }

// ---- on the host ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

template <typename T>
cudaError_t cudaMallocAsync(T** p, size_t bytes, cudaStream_t) {
  *p = static_cast<T*>(emulated::memory.allocate(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return emulated::memory.release(p), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return std::memset(p, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
